"""Raw corpus files split into parts of similar size, and the documents of a part.

Every format streams: memory holds a block at a time, whatever the size of a file. The split into parts depends on the
files alone, never on the number of workers, and the documents of all parts in order are the documents of all files in
order.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import pathlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import orjson

from megalith.common import encodings
from megalith.common.errors import DataError, problem
from megalith.common.extras import require
from megalith.common.json_lines import LONE_SURROGATE, parse_object
from megalith.config.flags.text import Words
from megalith.data.corpus.compression import open_decompressed, read_checked, read_lines, skip_line
from megalith.data.corpus.inputs import Notice, file_format, resolve_inputs, spooled
from megalith.data.corpus.unusable import require_usable

GUESSED_EXPANSION = 4  # bytes of text in a compressed byte; only balances parts
BOM = b"\xef\xbb\xbf"  # some editors begin a file with it
BATCH_BYTES = 1 << 20  # raw input handled at once; a few MB live at any time
STREAM_BLOCK_BYTES = 16 << 20  # text of a compressed stream in one part: the parent holds one block for each worker
MANY_COMPRESSED = 16  # with so many compressed files, each is decompressed by the worker that encodes it


@dataclasses.dataclass(frozen=True)
class Slice:
    """A run of documents in one file.

    start, stop: the lines that begin in these bytes (JSON lines), these row groups (parquet), or with stop None a
    whole file.
    block: the lines themselves, where the file is one compressed stream that only one process can read.
    """

    path: str
    start: int = 0
    stop: int | None = None
    block: bytes | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A unit of work: some slices. All parts have about equally many bytes."""

    number: int
    slices: tuple[Slice, ...]
    size: int  # bytes of input it stands for, as progress counts them


@dataclasses.dataclass
class Batch:
    """Some documents of one slice: texts by key and line (or row) in the slice; and the problems of others."""

    texts: dict[str, list[str]]
    lines: list[int]
    problems: list[tuple[int, str]]  # line in the slice, reason
    num_lines: int  # lines of the slice consumed so far
    size: int  # raw bytes of this batch


def split_into_parts(
    inputs: Sequence[str],
    part_bytes: int,
    finished: frozenset[int] = frozenset(),
    *,
    max_line: int | None = None,
    whole_texts: bool = True,
) -> Iterator[Part]:
    """The parts of the input in order.

    Parts whose numbers are in `finished` come without blocks: nobody will read them. max_line: as `read_lines` takes
    it. whole_texts: a text file is one document; otherwise its lines are documents.
    """
    compressed = [path for path in inputs if file_format(path)[1]]
    decompress_here = len(compressed) < MANY_COMPRESSED
    waiting: list[Slice] = []
    number = waiting_size = 0
    for path in inputs:
        size = os.path.getsize(path)
        whole = whole_texts and file_format(path)[0] == "text"
        if file_format(path)[1] and decompress_here and not whole:
            if waiting:
                yield Part(number, tuple(waiting), waiting_size)
                number, waiting, waiting_size = number + 1, [], 0
            for block, compressed_bytes in _stream_blocks(path, min(part_bytes, STREAM_BLOCK_BYTES), size, max_line):
                yield Part(number, (Slice(path, block=None if number in finished else block),), compressed_bytes)
                number += 1
            continue
        for piece, piece_size in _slices(path, size, part_bytes, whole_texts):
            if waiting and waiting_size + piece_size > part_bytes:
                yield Part(number, tuple(waiting), waiting_size)
                number, waiting, waiting_size = number + 1, [], 0
            waiting.append(piece)
            waiting_size += piece_size
    if waiting:
        yield Part(number, tuple(waiting), waiting_size)


def _slices(path: str, size: int, part_bytes: int, whole_texts: bool = True) -> Iterator[tuple[Slice, int]]:
    kind, compression = file_format(path)
    if kind == "parquet":
        groups = open_parquet(path).metadata
        for group in range(groups.num_row_groups):
            yield Slice(path, group, group + 1), groups.row_group(group).total_byte_size
    elif (kind == "text" and whole_texts) or compression:
        yield Slice(path), size * (GUESSED_EXPANSION if compression else 1)
    else:
        for start in range(0, size, part_bytes):
            yield Slice(path, start, min(start + part_bytes, size)), min(part_bytes, size - start)


def _stream_blocks(path: str, part_bytes: int, size: int, max_line: int | None) -> Iterator[tuple[bytes, int]]:
    """Blocks of whole lines of a compressed file, and how many compressed bytes each stands for."""
    with open(path, "rb") as raw, open_decompressed(path, raw) as stream:
        counted = 0
        while block := read_lines(stream, part_bytes, path, max_line)[0]:
            position = min(raw.tell(), size)
            yield block, position - counted
            counted = position


def read_part(part: Part, keys: Sequence[str]) -> Iterator[tuple[int, Batch]]:
    """The batches of a part, each with the index of its slice in the part."""
    for index, piece in enumerate(part.slices):
        kind, _ = file_format(piece.path)
        batches = {"parquet": _read_parquet, "text": _read_text}.get(kind or "json", _read_json)(piece, keys)
        for batch in batches:
            yield index, batch


def _read_json(piece: Slice, keys: Sequence[str]) -> Iterator[Batch]:
    consumed = 0
    for lines, size in line_batches(piece):
        batch = Batch({key: [] for key in keys}, [], [], consumed, size)
        columns = [(key, batch.texts[key]) for key in keys]
        for line in lines:
            batch.num_lines += 1
            try:
                record = orjson.loads(line.removeprefix(BOM))
                row = [record[key] for key in keys]
            except (orjson.JSONDecodeError, KeyError, TypeError):
                row = None
            if row is None or not all(type(text) is str for text in row):
                if not line.strip():
                    continue
                try:
                    row = parse_document(line.removeprefix(BOM), keys)
                except ValueError as error:
                    batch.problems.append((batch.num_lines, str(error)))
                    continue
            batch.lines.append(batch.num_lines)
            for (_, column), text in zip(columns, row):
                column.append(text)
        consumed = batch.num_lines
        yield batch


def parse_document(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts of a line, one for each key.

    Raises ValueError that says why the line is no document: not UTF-8, not JSON, not an object, no text under a key.
    """
    record = parse_object(line)
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"missing key {missing[0]!r} (it has {', '.join(map(repr, list(record)[:8]))})")
    texts = [record[key] for key in keys]
    for key, text in zip(keys, texts):
        if not isinstance(text, str):
            raise ValueError(f"key {key!r} is no text but {type(text).__name__}")
        if half := LONE_SURROGATE.search(text):
            raise ValueError(f"malformed JSON (key {key!r} has {half[0]!a}, which is half of a character)")
    return texts


def explain_line(line: bytes, keys: Sequence[str]) -> str:
    """Why a line is not a document, "" where it is one."""
    try:
        parse_document(line, keys)
    except ValueError as error:
        return str(error)
    return ""


def line_batches(piece: Slice, max_line: int | None = None) -> Iterator[tuple[list[bytes], int]]:
    """Lines of the slice in batches of about BATCH_BYTES, with the bytes they took.

    max_line: as `read_lines` takes it.
    """
    if piece.block is not None:
        stream: Any = io.BytesIO(piece.block)
    else:
        stream = open_decompressed(piece.path)
    with stream:
        left: float = float("inf") if piece.stop is None else piece.stop - piece.start
        if piece.start:
            # The line that holds byte start - 1 belongs to the part before, even when it ends exactly there.
            # It may go on behind this part: to look for its end there would read a long line once for each part in it.
            stream.seek(piece.start - 1)
            if (skipped := skip_line(stream, left, piece.path)) is None:
                return
            left -= skipped - 1
        while left > 0:
            block, size = read_lines(stream, int(min(BATCH_BYTES, left)), piece.path, max_line)
            if not block:
                break
            left -= size
            lines = block.split(b"\n")
            if not lines[-1]:
                lines.pop()
            yield lines, size


def _read_text(piece: Slice, keys: Sequence[str]) -> Iterator[Batch]:
    """A whole file is one document."""
    with open_decompressed(piece.path) as stream:
        content = read_checked(stream, -1, piece.path)
    batch = Batch({key: [] for key in keys}, [], [], 1, len(content))
    try:
        batch.texts[keys[0]].append(content.removeprefix(BOM).decode("utf-8"))
        batch.lines.append(1)
    except UnicodeDecodeError as error:
        batch.problems.append((1, encodings.reason(error)))
    yield batch


def open_parquet(path: str) -> Any:
    """The file, opened. Raises DataError where it is no parquet, MissingPackage without pyarrow."""
    parquet = require("pyarrow.parquet", path)
    try:
        return parquet.ParquetFile(path)
    except Exception as error:
        cure = "Fetch it again; it is damaged or not parquet"
        raise DataError(problem(path, Words(f"the error {str(error)!r}"), "must be a parquet file", cure)) from error


def _read_parquet(piece: Slice, keys: Sequence[str]) -> Iterator[Batch]:
    with open_parquet(piece.path) as file:
        missing = [key for key in keys if key not in file.schema_arrow.names]
        if missing:
            rule = f"must be among the columns {', '.join(file.schema_arrow.names)} of {piece.path}"
            raise DataError(problem("--json-keys", missing[0], rule, "Name columns of the file"))
        consumed = 0
        groups = range(piece.start, piece.stop or file.num_row_groups)
        for rows in file.iter_batches(1024, row_groups=groups, columns=list(keys)):
            table = rows.to_pydict()
            batch = Batch({key: [] for key in keys}, [], [], consumed, rows.nbytes)
            for row in zip(*(table[key] for key in keys)):
                batch.num_lines += 1
                wrong = next((key for key, text in zip(keys, row) if not isinstance(text, str)), None)
                if wrong is not None:
                    kind = type(row[keys.index(wrong)]).__name__
                    batch.problems.append((batch.num_lines, f"column {wrong!r} is no text but {kind}"))
                    continue
                batch.lines.append(batch.num_lines)
                for key, text in zip(keys, row):
                    batch.texts[key].append(text)
            consumed = batch.num_lines
            yield batch


def sample_texts(inputs: Sequence[str], keys: Sequence[str], positions: int = 64, characters: int = 4096) -> list[str]:
    """The beginnings of some documents at evenly spaced positions of the input, to try an encoder on."""
    num_files = min(positions, len(inputs))
    chosen = [inputs[i * len(inputs) // num_files] for i in range(num_files)]
    texts: list[str] = []
    for path in chosen:
        kind, compression = file_format(path)
        size, per_file = os.path.getsize(path), max(1, positions // num_files)
        if kind in ("json", None) and not compression:
            starts = [size * i // per_file for i in range(per_file)]
            slices = [Slice(path, start, start + characters) for start in starts]
        else:
            slices = [piece for piece, _ in itertools.islice(_slices(path, max(size, 1), BATCH_BYTES), 1)]
        limit = max(2, 2 * positions // max(1, len(slices)) // num_files)  # texts of each slice
        for piece in slices:
            for _, batch in itertools.islice(read_part(Part(0, (piece,), 0), keys), 1):
                texts += [text[:characters] for key in keys for text in batch.texts[key][:limit]]
    return texts


def corpus_texts(
    patterns: Sequence[str],
    keys: Sequence[str] = ("text",),
    notice: Notice = lambda line: None,
    max_unusable: float = 1.0,
) -> Iterator[str]:
    """Every text of the input, in order; unusable documents are left out, and reported to `notice` at the end.

    Streams are copied into the system's temporary folder first. max_unusable: as `require_usable` takes it.
    """
    inputs = resolve_inputs(patterns)
    inputs.report_not_read(notice)
    total, unusable, problems = 0, 0, list[str]()
    lines_before: dict[str, int] = {}

    def spool_folder() -> pathlib.Path:
        return pathlib.Path(tempfile.gettempdir(), f"megalith-{os.getpid()}-{os.urandom(4).hex()}")

    with spooled(inputs, spool_folder, notice) as ready:
        for part in split_into_parts(ready.files, BATCH_BYTES):
            lines = [0] * len(part.slices)
            for index, batch in read_part(part, keys):
                path = part.slices[index].path
                for number, reason in batch.problems[: 10 - len(problems)]:
                    problems.append(f"{ready.location(path, lines_before.get(path, 0) + number)}: {reason}")
                lines[index], unusable = batch.num_lines, unusable + len(batch.problems)
                total += len(batch.lines) + len(batch.problems)
                for key in keys:
                    yield from batch.texts[key]
            for piece, count in zip(part.slices, lines):
                lines_before[piece.path] = lines_before.get(piece.path, 0) + count
    require_usable(unusable, total, max_unusable, problems)  # its error lists some of them
    for line in problems:
        notice(f"skipped {line}")
    if unusable:
        notice(
            f"skipped {unusable} unusable documents of {total}. {encodings.conversion_advice(problems)}".rstrip(". ")
        )
