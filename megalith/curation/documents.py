"""Documents as steps see them: a record with all its keys, the text under one of them, the line it came from.

data/corpus/readers.py reads the texts of some keys alone, which is what tokenizing needs; here a record is carried from
file to file, and one that no step changes is written as the bytes that it was read as.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from megalith.common import encodings, units
from megalith.common.json_lines import parse
from megalith.data.corpus.compression import open_decompressed, read_checked
from megalith.data.corpus.inputs import file_format
from megalith.data.corpus.readers import BOM, Part, Slice, line_batches, open_parquet, parse_document

BATCH_CHARACTERS = 1 << 18  # of texts worked on at once: their hashes, 8 bytes each, stay in the cache
MAX_DOCUMENT_BYTES = 16 << 20  # the longest books have a quarter of it; work with one takes some 50 times its size


@dataclasses.dataclass(slots=True)
class Document:
    """A record, and where it was: the index of its slice in the part, its line (or row) in the slice from 1."""

    record: dict[str, Any]
    key: str  # of the text
    where: tuple[int, int]
    raw: bytes | None = None  # the line as it was read; None once anything has changed

    @property
    def text(self) -> str:
        """The text."""
        return self.record[self.key]

    def replaced(self, **keys: Any) -> Document:
        """A copy whose record has other values under some keys."""
        return Document(self.record | keys, self.key, self.where)

    def with_text(self, text: str) -> Document:
        """The document with another text, itself where the text is the same."""
        return self if text == self.text else self.replaced(**{self.key: text})

    def line(self) -> bytes:
        """The JSON line, with its end."""
        return (self.raw if self.raw is not None else dump(self.record)) + b"\n"


def dump(record: Any) -> bytes:
    """A value as one line of JSON in UTF-8."""
    try:
        return orjson.dumps(record, default=str)
    except TypeError:  # integers beyond 64 bits, halves of surrogate pairs
        return json.dumps(record, default=str).encode()


@dataclasses.dataclass
class DocumentBatch:
    """Some documents of one slice, and the problems of lines that hold none."""

    documents: list[Document]
    problems: list[tuple[int, str]]  # line in the slice, reason
    num_lines: int  # lines of the slice consumed so far
    size: int  # raw bytes of this batch


def read_documents(part: Part, key: str, max_bytes: int, lines: bool = False) -> Iterator[tuple[int, DocumentBatch]]:
    """The batches of a part, each with the index of its slice.

    key: of the text. max_bytes: a longer line is a problem, and takes no more memory than that. lines: a line of a text
    file is a document; otherwise such a file is one.
    """
    for index, piece in enumerate(part.slices):
        kind, _ = file_format(piece.path)
        if kind == "parquet":
            batches = _read_parquet(piece, index, key)
        elif kind == "text" and not lines:
            batches = _read_text(piece, index, key, max_bytes)
        else:
            batches = _read_lines(piece, index, key, max_bytes, kind == "text")
        for batch in batches:
            yield index, batch


def _read_lines(piece: Slice, index: int, key: str, max_bytes: int, plain: bool) -> Iterator[DocumentBatch]:
    consumed = 0
    for lines, size in line_batches(piece, max_bytes):
        batch = DocumentBatch([], [], consumed, size)
        for line in lines:
            batch.num_lines += 1
            line = line.removeprefix(BOM).strip()
            if not line:
                continue
            try:
                if len(line) > max_bytes:
                    raise ValueError(f"longer than {units.size(max_bytes)} (--max-document-bytes)")
                record = {key: line.decode()} if plain else _record(line, key)
            except UnicodeDecodeError as error:
                batch.problems.append((batch.num_lines, encodings.reason(error)))
            except ValueError as error:
                batch.problems.append((batch.num_lines, str(error)))
            else:
                batch.documents.append(Document(record, key, (index, batch.num_lines), line))
        consumed = batch.num_lines
        yield batch


def _record(line: bytes, key: str) -> dict[str, Any]:
    """The object of a line. Raises ValueError that says why it is no document."""
    try:
        record = orjson.loads(line)
        if isinstance(record, dict) and type(record.get(key)) is str:
            return record
    except orjson.JSONDecodeError:
        pass
    parse_document(line, [key])
    return parse(line)


def _read_text(piece: Slice, index: int, key: str, max_bytes: int) -> Iterator[DocumentBatch]:
    """A whole file is one document."""
    with open_decompressed(piece.path) as stream:
        content = read_checked(stream, max_bytes + 1, piece.path)
    batch = DocumentBatch([], [], 1, len(content))
    try:
        if len(content) > max_bytes:
            raise ValueError(f"longer than {units.size(max_bytes)} (--max-document-bytes)")
        text = content.removeprefix(BOM).decode("utf-8")
        batch.documents.append(Document({key: text}, key, (index, 1)))
    except UnicodeDecodeError as error:
        batch.problems.append((1, encodings.reason(error)))
    except ValueError as error:
        batch.problems.append((1, str(error)))
    yield batch


def _read_parquet(piece: Slice, index: int, key: str) -> Iterator[DocumentBatch]:
    with open_parquet(piece.path) as file:
        consumed = 0
        for rows in file.iter_batches(256, row_groups=range(piece.start, piece.stop or file.num_row_groups)):
            batch = DocumentBatch([], [], consumed, rows.nbytes)
            for record in rows.to_pylist():
                batch.num_lines += 1
                if isinstance(record.get(key), str):
                    batch.documents.append(Document(record, key, (index, batch.num_lines)))
                else:
                    found = type(record[key]).__name__ if key in record else "missing"
                    batch.problems.append((batch.num_lines, f"column {key!r} is no text but {found}"))
            consumed = batch.num_lines
            yield batch


def groups_of(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about BATCH_CHARACTERS, in their order."""
    group, size = list[Document](), 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group
