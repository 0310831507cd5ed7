"""Reads the data of these examples from local files, without a package for data sets and without a network.

A data set is a folder. Its training texts are the files with `train` in their names, its validation texts those with
`valid` or `dev`; without any of the latter, the last twentieth of the training texts. Files that end in .json or .jsonl
have an object with `text` in each line, all others a text in each line.
"""

from __future__ import annotations

import json
import pathlib

SPLITS = {"train": ("train",), "validation": ("valid", "dev")}


def read_texts(dataset_name: str, config_name: str | None = None) -> dict[str, list[str]]:
    """{"train": texts, "validation": texts} of a folder, or of its subfolder `config_name` where it has that."""
    folder = pathlib.Path(dataset_name)
    if not folder.is_dir():
        raise SystemExit(f"--dataset_name must be a local folder with text files; there is no folder {folder}")
    if config_name and (folder / config_name).is_dir():
        folder = folder / config_name
    texts = {
        split: [
            text
            for path in sorted(folder.iterdir())
            if path.is_file() and any(word in path.name for word in words)
            for text in read_file(path)
        ]
        for split, words in SPLITS.items()
    }
    if not texts["train"]:
        raise SystemExit(f"{folder} must have a file with `train` in its name, which has the training texts")
    if not texts["validation"]:
        held_out = max(1, len(texts["train"]) // 20)
        texts["validation"], texts["train"] = texts["train"][-held_out:], texts["train"][:-held_out]
    return texts


def read_file(path: pathlib.Path) -> list[str]:
    """The texts of a file that are not empty."""
    lines = path.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["text"] for line in lines if line] if path.suffix in (".json", ".jsonl") else lines
    return [text for text in texts if text.strip()]


def blocks(tokenizer, texts: list[str], block_size: int, special: bool = False) -> list[list[int]]:
    """The tokens of all texts, one after the other, in blocks of block_size; what is left over is dropped.

    special: each block begins with the tokenizer's [CLS] and ends with its [SEP].
    """
    ids = [token for row in tokenizer(texts, add_special_tokens=False)["input_ids"] for token in row]
    size = block_size - 2 if special else block_size
    cut = [ids[first : first + size] for first in range(0, len(ids) - size + 1, size)]
    if not cut:
        raise SystemExit(f"the texts have {len(ids)} tokens, too few for a block of {block_size}")
    return [[tokenizer.cls_token_id, *block, tokenizer.sep_token_id] for block in cut] if special else cut
