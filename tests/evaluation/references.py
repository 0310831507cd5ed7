"""The same measurements by transformers alone, as Megatron's tasks/zeroshot_gpt does them, one sample at a time."""

import json
import math
import pathlib

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalith.evaluation.detokenizers import detokenize


def load(folder: pathlib.Path) -> tuple:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def wikitext(folder: pathlib.Path, path: pathlib.Path, stride: int, length: int) -> tuple[list[float], float, int, int]:
    """Losses of Megatron's windows (those that count nothing too), their sum, predicted tokens, predicted words."""
    model, tokenizer = load(folder)
    text = path.read_text()
    words = len(text.strip().split(" "))
    tokens = tokenizer.encode(detokenize(text, "wikitext"))
    number = max(math.ceil(max(len(tokens) - 1 - stride, 0) / stride) + 1, 1)
    losses = []
    for index in range(number):
        window = tokens[index * stride : index * stride + length + 1]
        mask = [1.0] * (len(window) - 1) + [0.0] * (length + 1 - len(window))
        window = window + [tokenizer.eos_token_id] * (length + 1 - len(window))
        if stride != length and index:
            mask[: length - stride] = [0.0] * (length - stride)
        logits = model(torch.tensor([window[:-1]])).logits[0]
        each = F.cross_entropy(logits, torch.tensor(window[1:]), reduction="none")
        losses.append(float((each * torch.tensor(mask)).sum()))
    return losses, sum(losses), len(tokens) - 1, words - 1


@torch.no_grad()
def lambada(folder: pathlib.Path, path: pathlib.Path, strict: bool, length: int) -> list[tuple[bool, float]]:
    """For each passage whether the answer is right, and its loss."""
    (model, tokenizer), found = load(folder), []
    for line in path.read_text().splitlines():
        text = json.loads(line)["text"]
        if strict:
            word = text.split()[-1]
            answer = tokenizer.encode(" " + word)
            ids = tokenizer.encode(text[: text.rfind(word)].strip()) + answer
        else:
            ids = tokenizer.encode(text)
            answer = ids[-1:]
        ids = ids[-length - 1 :]
        logits = model(torch.tensor([ids[:-1]])).logits[0, -len(answer) :]
        loss = F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        found.append((logits.argmax(dim=-1).tolist() == answer, float(loss)))
    return found
