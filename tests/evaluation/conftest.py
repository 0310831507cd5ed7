"""A GPT-2 of transformers at toy size, trained for a moment so that it knows some answers; and texts for it."""

import json
import pathlib

import pytest
import torch

from tests.toy import make_corpus

POSITIONS = 32
LAMBADA = [
    "the cat sat on the mat", "the dog ran to the house", "she gave him a red ball", "we read the book at home",
    "the sun was over the sea", "he put the key in the lock", "they sang a song of the sea",
    "a bird flew over the house",
    "the man at the door had a hat", "rain fell on the roof all night", "the child had a red hat",
    "this passage is longer than what the model can read at a time, so that its beginning has to be cut off before the "
    "last word can be looked for, whatever that is, in a book or in a song",
]  # fmt: skip
SENTENCE = (
    ' \n = A Title = \n \n It was a well @-@ known " song " of 1 @,@ 200 words ; ( he said ) it \'s 3 @.@ 5 m long . \n'
)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of transformers: config.json, weights, tokenizer.json; and beside it vocab.json and merges.txt."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    make_corpus(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>")
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=POSITIONS, n_embd=32, n_layer=4, n_head=4, initializer_range=0.2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    rows = [tokenizer.encode(text)[-POSITIONS:] for text in LAMBADA]
    batch = torch.tensor([row + [0] * (POSITIONS - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(25):
        labels = batch.where(torch.arange(POSITIONS) < torch.tensor([[len(row)] for row in rows]), -100)
        model(batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """wiki.txt, lambada.jsonl, and a.txt and mixed.jsonl for ppl."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "wiki.txt").write_text(SENTENCE * 2)
    unknown = ["the boat went over the roof", *(text.rpartition(" ")[0] + " roof" for text in LAMBADA[8:11])]
    passages = [*LAMBADA[:8], *unknown, LAMBADA[11]]
    (folder / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    (folder / "a.txt").write_text("The first text is a file.\nIt has two lines.\n")
    lines = [{"text": text, "from": "songs" if "song" in text else "rest"} for text in LAMBADA]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
