"""Files of instructions as tokens: read and tokenized once, and mapped from the index cache from then on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.common.files import sha256
from megalith.common.locks import LockedError, locked
from megalith.config.flags.text import Words
from megalith.data.corpus.compression import check_readable, open_decompressed, read_lines
from megalith.data.corpus.inputs import file_format
from megalith.data.instructions.encode import Encoder, TemplateError
from megalith.data.instructions.records import read_object
from megalith.data.samples.index_cache import Layout, cache_key, load_built, load_or_build

BLOCK_BYTES = 1 << 20  # of a file, read and tokenized at once
BOM = b"\xef\xbb\xbf"
EXAMPLES = 10  # of lines that cannot be used, kept for messages
POLL_INTERVAL = 0.5  # seconds between two looks at a cache that another process builds
LAYOUT: Layout = (
    ("ids", (-1,), np.int32), ("trained", (-1,), np.bool_), ("ends", (-1,), np.int64), ("weights", (-1,), np.float32),
    ("lines", (-1,), np.int64), ("report", (-1,), np.uint8),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reader:
    """How the lines of a file become samples.

    parse: (object of a line, a function for lines on how it is read) -> records to be encoded, usually one; raises
    ValueError for a line that has none. key: all that the tokens depend on but for the file.
    """

    parse: Callable[[dict[str, Any], Callable[[str], object]], Sequence[Any]]
    encoder: Encoder
    key: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What was read of a file. examples: `file:line: reason` of some lines that cannot be used."""

    total: int  # lines that are not empty
    unusable: int  # of these, lines of which something cannot be used
    examples: list[str]
    notes: list[str]  # how data of another form than the usual one were read


class InstructionStore:
    """The samples of one file, in its order.

    Attributes: ids int32 [tokens] and trained bool [tokens], of all samples end to end; ends int64 [samples + 1], where
    each begins and the last ends; weights float32 [samples]; lines int64 [samples], of the file, from 1; report.
    """

    def __init__(self, path: str, arrays: Sequence[np.ndarray]):
        """arrays: as LAYOUT names them."""
        self.path = path
        self.ids, self.trained, self.ends, self.weights, self.lines, report = arrays
        self.report = Report(**json.loads(bytes(report)))

    def __len__(self) -> int:
        """Samples."""
        return len(self.weights)


class Stores:
    """The samples of several files as one, file after file.

    Attributes: files, their paths; lengths int64 and weights float32 [samples]; num_trained int64 [samples], tokens
    that are trained and have one before them; notes, lines on how the files were read.
    """

    def __init__(self, stores: Sequence[InstructionStore], notes: Sequence[str] = ()):
        self.stores, self.notes, self.files = stores, notes, [store.path for store in stores]
        self._ends = np.cumsum([len(store) for store in stores])
        self.lengths = np.concatenate([np.diff(store.ends) for store in stores])
        self.weights = np.concatenate([store.weights for store in stores])
        self.num_trained = np.concatenate([
            np.add.reduceat(store.trained, store.ends[:-1], dtype=np.int64) - store.trained[store.ends[:-1]]
            for store in stores
        ])  # fmt: skip

    def __len__(self) -> int:
        """Samples."""
        return len(self.lengths)

    def sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [n], trained bool [n]) of a sample."""
        store, number = self._locate(number)
        where = slice(store.ends[number], store.ends[number + 1])
        return store.ids[where], store.trained[where]

    def where(self, number: int) -> str:
        """The `file:line` of a sample."""
        store, number = self._locate(number)
        return f"{store.path}:{store.lines[number]}"

    def _locate(self, number: int) -> tuple[InstructionStore, int]:
        file = int(np.searchsorted(self._ends, number, side="right"))
        return self.stores[file], number - int(self._ends[file - 1] if file else 0)


def open_store(path: str, reader: Reader, folders: Sequence[str | os.PathLike]) -> InstructionStore:
    """The samples of a file, tokenized by one process of a machine and read by the others.

    folders: of the index cache, see index_cache.load_or_build. Raises DataError where the file holds no line that can
    be used, or the chat template is at fault.
    """
    if not pathlib.Path(path).is_file():
        rule = "must name a file of JSON lines"
        found = Words(f"the folder {path}") if os.path.isdir(path) else path
        raise DataError(problem("The data", found, rule, "Correct the path"))
    check_readable(path)
    if file_format(path)[0] in ("parquet", "text"):
        cure = "Write its rows as JSON lines (datasets: to_json; pandas: to_json(orient='records', lines=True))"
        raise DataError(problem("The data", path, "must be a file of JSON lines", cure))
    key = cache_key("instructions 3", sha256(path), reader.key)

    def build() -> list[np.ndarray]:
        return tokenize(path, reader)

    first = pathlib.Path(folders[0]) / key if folders else None
    while (arrays := load_built(key, LAYOUT, folders)) is None:
        with contextlib.ExitStack() as held:
            if first is not None:
                try:
                    held.enter_context(locked(first))
                except LockedError:  # of this machine or of one that shares the folder
                    time.sleep(POLL_INTERVAL)
                    continue
                except OSError:  # a folder that cannot be written: the next one is tried, without a lock
                    pass
            arrays = load_or_build(key, LAYOUT, build, folders)
            break
    store = InstructionStore(path, arrays)
    if not len(store):
        report = store.report
        found = Words(f"{report.total} lines, of which none can be used" if report.total else "an empty file")
        lines = "".join(f"{line}\n" for line in report.examples)
        raise DataError(lines + problem(path, found, "must hold JSON lines that can be used", "Correct the file"))
    return store


def tokenize(path: str, reader: Reader) -> list[np.ndarray]:
    """The arrays of LAYOUT, of every line that can be used."""
    ids, trained, lengths, weights, numbers = ([] for _ in range(5))  # type: ignore[var-annotated]
    total, unusable, examples, notes = 0, set[int](), list[str](), dict[str, None]()

    def refuse(number: int, reason: str) -> None:
        unusable.add(number)  # once, also where several of its turns, samples of a T5, cannot be used
        if len(examples) < EXAMPLES:
            examples.append(f"{path}:{number}: {reason}")

    for block in _blocks(path):
        records = []
        for number, line in block:
            total += 1
            try:
                records += [(number, each) for each in reader.parse(read_object(line), notes.setdefault)]
            except ValueError as error:
                refuse(number, str(error))
        try:
            for (number, record), sample in zip(records, reader.encoder.encode([each for _, each in records])):
                if isinstance(sample, str):
                    refuse(number, sample)
                    continue
                ids.append(sample.ids)
                trained.append(sample.trained)
                lengths.append(len(sample.ids))
                weights.append(record.weight)
                numbers.append(number)
        except TemplateError as error:
            raise DataError(f"{path}:{records[error.number][0]}: {error}") from None
    report = json.dumps(dataclasses.asdict(Report(total, len(unusable), examples, list(notes)))).encode()
    return [
        np.concatenate([np.empty(0, np.int32), *ids]), np.concatenate([np.empty(0, bool), *trained]),
        np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))).astype(np.int64), np.array(weights, np.float32),
        np.array(numbers, np.int64), np.frombuffer(report, np.uint8),
    ]  # fmt: skip


def _blocks(path: str) -> Iterator[list[tuple[int, bytes]]]:
    """The lines of a file that are not empty, with their numbers from 1, some at a time."""
    number = 0
    with open_decompressed(path) as stream:
        while block := read_lines(stream, BLOCK_BYTES, path)[0]:
            lines = block.removeprefix(BOM).split(b"\n") if number == 0 else block.split(b"\n")
            if not lines[-1]:
                lines.pop()
            yield [(number + place, line) for place, line in enumerate(lines, 1) if line.strip()]
            number += len(lines)
