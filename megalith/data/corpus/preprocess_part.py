"""One part of a corpus to one part of an indexed dataset: read, parse, split, encode, write.

Workers of every engine run this.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError
from megalith.common.files import write_text
from megalith.data.corpus.readers import Batch, Part, read_part
from megalith.data.corpus.sentences import sentence_splitter
from megalith.data.indexed import IndexedWriter
from megalith.data.tokenizers.tokenizer import Tokenizer, build_tokenizer

LISTED_PROBLEMS = 200  # of each part; all are counted
STAGES = ("reading and JSON", "sentences", "tokenizing", "writing")
COUNTS = ("documents", "sequences", "tokens", "bytes", "num_problems", "num_empty")  # of a part's record


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings of a preprocessing run that every worker gets."""

    folder: str  # that parts are written to
    tokenizer: dict[str, Any]  # arguments of build_tokenizer
    keys: tuple[str, ...]
    fast: bool  # whether the faster encoder gave the same ids for a sample
    split_sentences: bool
    language: str
    keep_newlines: bool
    append_eod: bool
    prepend_bos: bool
    fail: bool  # stop at the first document that cannot be used
    dtype: str
    keep_empty: bool = False  # documents without text are kept
    key: str = ""  # digest of everything that the parts depend on: a part of another key is another job's

    def worker(self) -> PartEncoder:
        """What encodes parts, with the tokenizer loaded."""
        return PartEncoder(self)


class BadDocument(DataError):
    """With --on-error fail: the first document that cannot be used."""

    def __init__(self, part: int, index: int, line: int, reason: str):
        """index: of the slice in the part. line: in the slice, from 1."""
        super().__init__(part, index, line, reason)
        self.part, self.index, self.line, self.reason = part, index, line, reason


class PartEncoder:
    """Encodes parts for one job; built once in each worker, so that the tokenizer loads once."""

    def __init__(self, job: Job):
        """Load the tokenizer and the sentence splitter of `job`."""
        self.job = job
        self.tokenizer: Tokenizer = build_tokenizer(**job.tokenizer)
        if job.fast:
            self.tokenizer.accelerate([])
        self.split: Callable | None = None
        if job.split_sentences:
            self.split = sentence_splitter(job.language, job.keep_newlines)
        self.eod = self.tokenizer.require("eod") if job.append_eod else None
        self.bos = self.tokenizer.require("bos") if job.prepend_bos else None
        # Tokens of a text without text: those that the tokenizer adds to every text do not make a document.
        self.empty_length = len(self.tokenizer.encode(""))

    def __call__(self, part: Part) -> dict:
        """Write the part's dataset of each key, then its record; a part with a record is finished."""
        job, started = self.job, time.perf_counter()
        prefixes = [part_prefix(job.folder, part.number, i, job.key) for i in range(len(job.keys))]
        writers = {key: IndexedWriter(prefix, job.dtype) for key, prefix in zip(job.keys, prefixes)}
        record: dict[str, Any] = {"key": job.key, "part": part.number, **dict.fromkeys(COUNTS, 0), "size": part.size}
        record |= {"problems": [], "lines": [0] * len(part.slices), "seconds": dict.fromkeys(STAGES, 0.0)}
        try:
            for index, batch in read_part(part, job.keys):
                started = self._clock(record, "reading and JSON", started)
                record["lines"][index] = batch.num_lines
                record["bytes"] += batch.size
                started = self._write(batch, writers, index, record, started)
        except BaseException:
            for writer in writers.values():
                writer.abandon()
            raise
        for writer in writers.values():
            writer.finish()
        record["sums"] = [checksums(prefix) for prefix in prefixes]
        self._clock(record, "writing", started)
        write_text(record_path(job.folder, part.number, job.key), json.dumps(record))
        return record

    def _write(self, batch: Batch, writers: dict, index: int, record: dict, started: float) -> float:
        """Encode a batch and add it to the writers; returns the time."""
        count, several_keys = len(batch.lines), len(batch.texts) > 1
        encoded, keep = {}, np.ones(count, bool)
        refused: dict[int, str] = {}  # document -> why it cannot be used
        empty: dict[int, list[str]] = {}  # document -> the keys under which it has no text
        for key, texts in batch.texts.items():
            if self.split:
                sentences = [self.split(text) or [""] for text in texts]
                per_document = np.fromiter(map(len, sentences), np.int64, count)
                texts = [sentence for document in sentences for sentence in document]
                started = self._clock(record, "sentences", started)
            else:
                per_document = np.ones(count, np.int64)
            ids, lengths, reasons = self._encode(texts)
            if reasons:
                document = np.repeat(np.arange(count), per_document)
                where = f"key {key!r}: " if several_keys else ""
                refused |= {int(document[text]): f"{where}{reason}" for text, reason in reasons.items()}
            encoded[key] = (ids, lengths, per_document)
            for i in np.flatnonzero(document_sums(lengths > self.empty_length, per_document) == 0).tolist():
                empty.setdefault(i, []).append(repr(key))
            started = self._clock(record, "tokenizing", started)
        if not self.job.keep_empty:
            dropped = {i: "empty document" for i in empty if i not in refused}
            if several_keys:  # one empty key is enough to drop a document
                dropped = {i: f"{reason} (no text in {' and '.join(empty[i])})" for i, reason in dropped.items()}
            record["num_empty"] += len(dropped)
            refused |= dropped
        keep[list(refused)] = False
        batch.problems += [(batch.lines[i], reason) for i, reason in refused.items()]
        if batch.problems:
            batch.problems.sort()
            if self.job.fail:
                raise BadDocument(record["part"], index, *batch.problems[0])
            record["num_problems"] += len(batch.problems)
            room = LISTED_PROBLEMS - len(record["problems"])
            record["problems"] += [[index, line, reason] for line, reason in batch.problems[:room]]
        for key, arrays in encoded.items():
            # Dropped for all keys or for none, so that title k stays with body k.
            ids, lengths, per_document = assemble(
                *arrays, eod=self.eod, bos=self.bos, keep=keep, empty_length=self.empty_length
            )
            writers[key].add_many(ids, lengths, per_document)
            record["tokens"] += len(ids)
            record["sequences"] += len(lengths)
        record["documents"] += int(keep.sum())
        return self._clock(record, "writing", started)

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Ids of all texts in a row, the number of ids of each, and {index: reason} of texts the tokenizer refuses."""
        try:
            return *self.tokenizer.encode_flat(texts), {}
        except DataError:  # one by one, to find which
            rows: list[Sequence[int]] = []
            refused: dict[int, str] = {}
            for number, text in enumerate(texts):
                try:
                    rows.append(self.tokenizer.encode(text))
                except DataError as error:
                    rows.append(())
                    refused[number] = str(error)
            return np.array([i for row in rows for i in row], np.int64), np.array([len(row) for row in rows]), refused

    def _clock(self, record: dict, stage: str, started: float) -> float:
        now = time.perf_counter()
        record["seconds"][stage] += now - started
        return now


def document_sums(lengths: np.ndarray, per_document: np.ndarray) -> np.ndarray:
    """Tokens of each document, from tokens of each sequence and sequences of each document."""
    total = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.cumsum(per_document)
    return total[ends] - total[ends - per_document]


def assemble(
    ids: np.ndarray,
    lengths: np.ndarray,
    per_document: np.ndarray,
    *,
    keep: np.ndarray,
    eod: int | None = None,
    bos: int | None = None,
    empty_length: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Drop documents that are not in `keep` and sequences without text; put bos before and eod after every document.

    ids: all tokens in a row. lengths: tokens of each sequence. per_document: sequences of each document.
    keep: bool [documents]. empty_length: tokens of a sequence without text. A kept document without text keeps its
    first sequence, so that it stays a document. As in Megatron, eod lengthens the last sequence of a document and bos
    its first.
    """
    used = lengths > empty_length
    if not (used.all() and keep.all()):
        document = np.repeat(np.arange(len(per_document)), per_document)
        empty = (document_sums(used, per_document) == 0) & (per_document > 0)
        used[(np.cumsum(per_document) - per_document)[empty]] = True
        used &= keep[document]
        ids = ids[np.repeat(used, lengths)]
        per_document = np.bincount(document[used], minlength=len(per_document))[keep]
        lengths = lengths[used]
    last = np.cumsum(per_document) - 1
    first = last - per_document + 1
    for token, sequences, after in ((eod, last, True), (bos, first, False)):
        if token is not None and len(last):
            ends = np.cumsum(lengths)
            ids = np.insert(ids, (ends if after else ends - lengths)[sequences], token)
            lengths = lengths.copy()
            lengths[sequences] += 1
    return ids, lengths, per_document


def part_prefix(folder: str, number: int, dataset: int, key: str = "") -> str:
    """Prefix of dataset number `dataset` of part `number` of the job `key`.

    Workers of a killed job may still write; their files have another key in their names.
    """
    return f"{folder}/{number:06d}-{dataset}{key and '-'}{key[:12]}"


def record_path(folder: str, number: int, key: str = "") -> pathlib.Path:
    """The file whose existence says that the part is finished."""
    return pathlib.Path(folder) / f"{number:06d}{key and '-'}{key[:12]}.json"


def checksums(prefix: str) -> list[int]:
    """CRC-32 of .bin and .idx: a power cut can keep a record and lose the data it describes."""
    sums = []
    for suffix in (".bin", ".idx"):
        value = 0
        with open(prefix + suffix, "rb") as file:
            while block := file.read(1 << 20):
                value = zlib.crc32(block, value)
        sums.append(value)
    return sums


def finished_parts(
    folder: str,
    keys: Sequence[str],
    key: str = "",
    *,
    without_problems: bool = False,
) -> dict[int, dict]:
    """Records of the parts in `folder` that the job `key` wrote and whose files match the record; others are removed.

    without_problems: parts in which a document could not be used are removed too.
    """
    records: dict[int, dict] = {}
    for path in sorted(pathlib.Path(folder).glob("[0-9]*.json")):
        try:
            record = json.loads(path.read_text())
            good = record["key"] == key and not (without_problems and record["num_problems"])
            prefixes = [part_prefix(folder, record["part"], i, key) for i in range(len(keys))]
            good = good and list(map(checksums, prefixes)) == record["sums"]
        except (OSError, ValueError, KeyError, TypeError):
            good = False
        if good:
            records[record["part"]] = record
        else:
            path.unlink()
    return records
