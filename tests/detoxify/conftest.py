"""A GPT-2 of transformers that half of the time says one of three bad words, and the files of a pipeline for it."""

import itertools
import json
import pathlib

import pytest
import torch

from megalith.data.corpus.bpe import train_bpe

BAD, GOOD = ("darn", "heck", "crud"), ("big", "old", "red")
NOUNS, VERBS = ("dog", "cat", "man", "sun"), ("is", "was so", "looks")
SENTENCES = [f"the {noun} {verb} {word}" for word, noun, verb in itertools.product((*BAD, *GOOD), NOUNS, VERBS)]
POSITIONS = 24


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """model/, bad_words.txt, prompts.jsonl, held_out.jsonl."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("detoxify")
    train_bpe(["\n".join(SENTENCES)], 400, folder / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    torch.manual_seed(1)
    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=end, bos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    tokens = [tokenizer.encode(text) for text in SENTENCES]
    stream = [id for _ in range(120) for number in torch.randperm(len(tokens)) for id in (*tokens[number], end)]
    rows = torch.tensor(stream[: len(stream) // POSITIONS * POSITIONS]).view(-1, POSITIONS)  # as in pretraining
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        batch = rows[torch.randint(len(rows), (32,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "bad_words.txt").write_text("\n".join(BAD) + "\n")
    prompts = [{"prompt": {"text": f"the {noun}"}, "id": noun} for noun in NOUNS[:3]] + [{"prompt": "the sun is"}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES[::5]))
    return folder
