"""Real pieces at toy size: a corpus that every machine has, vocabularies made from it, and how commands run on them."""

import json
import os
import pathlib
import re
import subprocess
import sys

from tokenizers import Tokenizer

from megalith.data.corpus.bpe import train_bpe
from megalith.workflows.corpus import write_corpus

ROOT = pathlib.Path(__file__).parents[1]


def make_corpus(folder: pathlib.Path) -> None:
    """corpus.jsonl and its vocabularies: tokenizer.json, the same for GPT-2 (vocab.json, merges.txt), vocab.txt."""
    write_corpus(folder / "corpus.jsonl", megabytes=0.3)
    train_bpe([(folder / "corpus.jsonl").read_text()], 512, folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    # Model.save leaves out <|endoftext|>
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab(with_added_tokens=True)))
    words = sorted(set(re.findall(r"[a-z]+", (folder / "corpus.jsonl").read_text().lower())))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))


def run(command: list[str], folder: pathlib.Path, **variables: str) -> str:
    """Run a command in `folder` with this Python's scripts first on the path; its output.

    A failure shows all it printed.
    """
    paths = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout}"
    return done.stdout
