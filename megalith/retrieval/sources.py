"""What is embedded: blocks of an indexed dataset, as ICT cuts them, or passages of a file of evidence.

A source has `columns` and `rows(numbers)`, which say where each text is; `ids(numbers)`, what the model reads;
`describe()`, by which it is opened again (`open_source`) and compared when work is resumed; and `text(row)`.
"""

from __future__ import annotations

import csv
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from megalith.common import json_lines
from megalith.common.errors import DataError, problem
from megalith.common.files import sampled_digest
from megalith.common.registry import load
from megalith.config.flags.text import Words
from megalith.data.corpus.compression import SUFFIXES
from megalith.data.indexed import IndexedDataset
from megalith.data.indexed.format import dataset_files
from megalith.data.samples.ict_dataset import IctDataset

SAMPLED_BLOCKS = 8  # of 4 KiB: how much of a file is read to notice that it has changed
APPENDED = ("[BOS]", "[EOS]")
FIELDS = ("id", "text", "title")


class Source(Protocol):
    """Texts by number."""

    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def rows(self, numbers: range) -> np.ndarray:
        """int64 [n, columns]: where these texts are."""

    def ids(self, numbers: range) -> list[list[int]]:
        """The ids of these texts as contexts: [CLS] title [SEP] text [SEP]."""

    def describe(self) -> dict[str, Any]:
        """What `open_source` takes, and fingerprints of the files."""

    def text(self, row: Mapping[str, int]) -> tuple[str, str]:
        """(title, text) of one row, for people."""


class Blocks:
    """Blocks of an indexed dataset of sentences, in the order of their numbers."""

    columns: tuple[str, ...] = ("first", "last", "document", "block")

    def __init__(
        self, data_path: str, titles_data_path: str | None, tokenizer: Any, seq_length: int,
        block_samples_mapping: str | None = None, **options: Any,
    ):  # fmt: skip
        """block_samples_mapping: module:name of what cuts the blocks instead of build_blocks (samples/ict_dataset.py).

        options: numbers that IctDataset takes.
        """
        self.paths = data_path, titles_data_path
        titles = IndexedDataset(titles_data_path) if titles_data_path else None
        self.tokenizer, self.options, own = tokenizer, {"seq_length": seq_length, **options}, {}
        if block_samples_mapping is not None:
            self.options["block_samples_mapping"] = block_samples_mapping
            own = {"make_blocks": load("block samples mapping", block_samples_mapping)}
        self.dataset = IctDataset(
            IndexedDataset(data_path), titles=titles, tokenizer=tokenizer, seq_length=seq_length, **options, **own
        )
        self.order = np.argsort(self.dataset.mapping[:, 3], kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def rows(self, numbers: range) -> np.ndarray:
        """See Source."""
        return self.dataset.mapping[self.order[numbers.start : numbers.stop]].astype(np.int64)

    def ids(self, numbers: range) -> list[list[int]]:
        """See Source."""
        return [
            self.dataset.context(int(document), self.dataset.sentences(int(first), int(last)))
            for first, last, document, _ in self.rows(numbers)
        ]

    def describe(self) -> dict[str, Any]:
        """See Source."""
        paths = [path for path in self.paths if path]
        files = [file for file in dataset_files(paths) if os.path.exists(file)]
        return {
            "kind": "blocks", "data_path": os.path.abspath(paths[0]),
            "titles_data_path": os.path.abspath(paths[1]) if len(paths) > 1 else None, "options": self.options,
            "fingerprints": [*(sampled_digest(file, SAMPLED_BLOCKS) for file in files), *self._own_blocks()],
        }  # fmt: skip

    def _own_blocks(self) -> list[str]:
        """A digest of the blocks that --block-samples-mapping cuts, as the function may change."""
        if "block_samples_mapping" not in self.options:
            return []
        return [hashlib.sha256(self.dataset.mapping.tobytes()).hexdigest()]

    def text(self, row: Mapping[str, int]) -> tuple[str, str]:
        """See Source."""
        titles, dataset = self.dataset.titles, self.dataset
        title = "" if titles is None else self.tokenizer.decode(titles.get(row["document"]).tolist())
        return title, self.tokenizer.decode(np.concatenate(dataset.sentences(row["first"], row["last"])).tolist())


class Passages:
    """Passages of a file of evidence: TSV with the header id, text, title (that of DPR), or JSON lines of these keys.

    The file is read once to find its lines (8 bytes of memory for each), and a line again when it is needed.
    """

    columns: tuple[str, ...] = ("id", "offset")

    def __init__(self, path: str | os.PathLike, tokenizer: Any, seq_length: int):
        """Raises DataError where the file cannot be read by lines, or has no passage."""
        self.path, self.tokenizer, self.seq_length = pathlib.Path(path), tokenizer, seq_length
        if self.path.suffix in SUFFIXES:
            rule = "must not be compressed, as its lines are read where they lie"
            raise DataError(problem("The evidence", str(path), rule, "Decompress it first"))
        self.json = self.path.suffix in (".jsonl", ".json")
        self.cls, self.sep = (tokenizer.require(name) for name in ("cls", "sep"))
        offsets, offset = [], 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(offset)
                offset += len(line)
        if not self.json and offsets:
            header = self._fields(offsets[0])
            if sorted(header) != sorted(FIELDS):
                rule = "must begin with a line of the names id, text and title, with tabs between them"
                raise DataError(problem(str(path), Words(" ".join(header)[:80]), rule, "Add it"))
            self.header, offsets = header, offsets[1:]
        if not offsets:
            raise DataError(problem(str(path), Words("none"), "must have passages", "Name another file"))
        self.offsets = np.array(offsets, np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def rows(self, numbers: range) -> np.ndarray:
        """See Source. An id that is no number is -1: its text is found by the offset."""
        found = []
        for number in numbers:
            name = self.passage(int(self.offsets[number]))["id"]
            known = name.isascii() and name.isdecimal() and int(name) < 2**63
            found.append((int(name) if known else -1, int(self.offsets[number])))
        return np.array(found, np.int64).reshape(-1, 2)

    def ids(self, numbers: range) -> list[list[int]]:
        """See Source."""
        passages = [self.passage(int(self.offsets[number])) for number in numbers]
        return pack(self.tokenizer, [(each["title"], each["text"]) for each in passages], self.seq_length)

    def describe(self) -> dict[str, Any]:
        """See Source."""
        return {
            "kind": "passages", "path": os.path.abspath(self.path), "options": {"seq_length": self.seq_length},
            "fingerprints": [sampled_digest(self.path, SAMPLED_BLOCKS)],
        }  # fmt: skip

    def text(self, row: Mapping[str, int]) -> tuple[str, str]:
        """See Source."""
        passage = self.passage(row["offset"])
        return passage["title"], passage["text"]

    def passage(self, offset: int) -> dict[str, str]:
        """{"id": ..., "text": ..., "title": ...} of the line at a byte of the file."""
        if not self.json:
            values = self._fields(offset)
            if len(values) != len(self.header):
                rule = f"must have the {len(self.header)} fields of the first line"
                raise self._problem(offset, f"{len(values)}", rule)
            return dict(zip(self.header, values))
        try:
            found = json_lines.parse(self._line(offset))
        except ValueError as error:
            raise self._problem(offset, str(error)[:80], "must be JSON") from None
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise self._problem(offset, "none", "must be a JSON object with a `text`")
        return {"id": str(found.get("id", "")), "text": found["text"], "title": str(found.get("title") or "")}

    def _line(self, offset: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.readline()

    def _fields(self, offset: int) -> list[str]:
        try:
            line = self._line(offset).decode("utf-8").rstrip("\r\n")
            return next(csv.reader([line], delimiter="\t"))
        except (UnicodeDecodeError, csv.Error) as error:
            raise self._problem(offset, str(error)[:80], "must be UTF-8, with tabs between the fields") from None

    def _problem(self, offset: int, found: str, rule: str) -> DataError:
        with open(self.path, "rb") as file:
            number = file.read(offset).count(b"\n") + 1
        return DataError(problem(f"{self.path}, line {number},", Words(found), rule, "Correct the line"))


class PassagesById(Passages):
    """The passages of vectors of which the ids alone are known, as of Megatron's pickle."""

    def __init__(self, path: str | os.PathLike, tokenizer: Any, seq_length: int):
        """Reads every line once, for its id. Memory: 16 bytes for each."""
        super().__init__(path, tokenizer, seq_length)
        rows = self.rows(range(len(self)))
        self.by_id = rows[np.argsort(rows[:, 0], kind="stable")]

    def text(self, row: Mapping[str, int]) -> tuple[str, str]:
        """See Source."""
        place = int(np.searchsorted(self.by_id[:, 0], row["id"]))
        if place == len(self) or self.by_id[place, 0] != row["id"]:
            rule = "must have the passages of all vectors of the index"
            raise DataError(problem(str(self.path), Words(f"none of id {row['id']}"), rule, "Name their file"))
        return super().text({"offset": int(self.by_id[place, 1])})


def pack(tokenizer: Any, texts: Sequence[tuple[str, str]], seq_length: int) -> list[list[int]]:
    """[CLS] title [SEP] text [SEP] of (title, text), cut to seq_length tokens, the last of them [SEP]."""
    cls, sep = tokenizer.require("cls"), tokenizer.require("sep")
    titles, bodies = (text_ids(tokenizer, column) for column in zip(*texts))
    rows = [[cls, *title, sep, *body] for title, body in zip(titles, bodies)]
    return [[*row[: seq_length - 1], sep] for row in rows]


def pack_queries(tokenizer: Any, texts: Sequence[str], seq_length: int) -> list[list[int]]:
    """[CLS] text [SEP], cut to seq_length tokens."""
    cls, sep = tokenizer.require("cls"), tokenizer.require("sep")
    return [[cls, *ids[: seq_length - 2], sep] for ids in text_ids(tokenizer, texts)]


def text_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts alone, without the [CLS] and [SEP] that a BERT's tokenizer of Hugging Face puts around each."""
    before, after = (len(getattr(tokenizer, name, ())) for name in ("prefix", "suffix"))
    return [row.tolist()[before : len(row) - after] for row in tokenizer.encode_batch(list(texts))]


def words(tokenizer: Any) -> list[str]:
    """The vocabulary, without the [BOS] and [EOS] that Megatron appends to one of BERT; no text has them."""
    tokens = tokenizer.tokens()
    return tokens[: -len(APPENDED)] if tuple(tokens[-len(APPENDED) :]) == APPENDED else tokens


def open_source(description: Mapping[str, Any], tokenizer: Any) -> Source:
    """The source of a store, to show its texts. Raises DataError where its files are gone or have changed."""
    kind, options = description.get("kind"), dict(description.get("options", {}))
    if kind == "blocks":
        found: Source = Blocks(description["data_path"], description["titles_data_path"], tokenizer, **options)
    elif kind == "passages":
        found = Passages(description["path"], tokenizer, **options)
    else:
        rule = "must be blocks or passages, whose texts can be read again"
        cure = "Give --evidence FILE with the passages that these vectors are of"
        raise DataError(problem("The texts of the index", Words(str(kind)), rule, cure))
    if found.describe()["fingerprints"] != description["fingerprints"]:
        what = description.get("path") or description.get("data_path")
        rule = "must be the files, cut into the blocks, that were embedded, as the index points into them"
        raise DataError(problem(str(what), Words("others"), rule, "Restore them, or build the index again"))
    return found
