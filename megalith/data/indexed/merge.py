"""Merging indexed datasets into one, and splitting one into many; in constant memory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.common.files import atomic_path, temporary_path
from megalith.common.locks import locked
from megalith.common.outputs import check
from megalith.config.flags.text import Words
from megalith.data.indexed import IndexedDataset
from megalith.data.indexed.format import DTYPE_CODES, HEADER, MAGIC, dataset_files

BLOCK = 1 << 20  # entries of an index held in memory at once


def merge_datasets(prefixes: Sequence[str], output_prefix: str, ready: Callable[[], None] = lambda: None) -> None:
    """Write the datasets of `prefixes`, in this order, as one dataset `output_prefix`: the bytes of Megatron's merge.

    ready: called before files are put in place; where it raises, none is.
    Raises DataError when their dtypes differ. Both files appear complete or not at all.
    """
    if not prefixes:
        cure = "Name prefixes, or a directory of .bin/.idx pairs"
        raise DataError(problem("A merge", 0, "needs one or more datasets", cure))
    write_spans([(prefix, 0, IndexedDataset(prefix).num_documents) for prefix in prefixes], output_prefix, ready)


def write_spans(
    spans: Sequence[tuple[str, int, int]],
    output_prefix: str,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Write spans of documents in order as the dataset `output_prefix`.

    spans: (prefix, first document, document after the last).
    Every pass opens the datasets one by one: there may be more of them than a process may hold open.
    """
    first = IndexedDataset(spans[0][0])
    itemsize = first.dtype.itemsize
    measured = [_document_span(IndexedDataset(prefix), begin, end, first) for prefix, begin, end in spans]
    sequences = sum(span.sequence_end - span.sequence for span in measured)
    documents = sum(span.end - span.begin for span in measured)
    names = (output_prefix + ".idx", output_prefix + ".bin")
    with atomic_path(names[0], ready) as index_path, atomic_path(names[1], ready) as bin_path:
        with open(index_path, "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, DTYPE_CODES[first.dtype], sequences, documents + 1))
            for span, data in _open_each(measured):
                for begin, end in _blocks(span.sequence, span.sequence_end):
                    index.write(np.ascontiguousarray(data.lengths[begin:end], "<i4").data)
            offset = 0
            for span, data in _open_each(measured):
                for begin, end in _blocks(span.sequence, span.sequence_end):
                    sizes = data.lengths[begin:end].astype("<i8") * itemsize
                    ends = offset + np.cumsum(sizes)
                    index.write((ends - sizes).data)
                    offset = int(ends[-1])
            index.write(np.zeros(1, "<i8").data)
            before = 0
            for span, data in _open_each(measured):
                for begin, end in _blocks(span.begin + 1, span.end + 1):
                    index.write((data.document_indices[begin:end].astype("<i8") + (before - span.sequence)).data)
                before += span.sequence_end - span.sequence
            for span, data in _open_each(measured):
                if data.modes is not None:
                    index.write(np.ascontiguousarray(data.modes[span.sequence : span.sequence_end], np.int8).data)
        with open(bin_path, "wb", buffering=0) as out:
            for span in measured:
                _append_bytes(span.prefix + ".bin", span.byte, span.byte_end - span.byte, out.fileno())
        pathlib.Path(output_prefix + ".idx").unlink(missing_ok=True)  # killed here, it would be the index of other data
    merged = IndexedDataset(output_prefix)  # opening checks the header against both file sizes
    if (len(merged), merged.num_documents) != (sequences, documents):
        written = f"{sequences} sequences were written; the disk lost something"
        raise DataError(f"{output_prefix} holds {len(merged)} sequences where {written}")


class DocumentSpan(NamedTuple):
    """Documents begin to end - 1 of a dataset, and the sequences and bytes that they take."""

    prefix: str
    begin: int
    end: int
    sequence: int
    sequence_end: int
    byte: int
    byte_end: int


def _document_span(data: IndexedDataset, begin: int, end: int, first: IndexedDataset) -> DocumentSpan:
    if data.dtype != first.dtype or data.multimodal != first.multimodal:
        kind, wanted = (f"{each.dtype}{', multimodal' if each.multimodal else ''}" for each in (data, first))
        rule = f"must be of the same kind as {first.prefix} ({wanted}) to be merged with it"
        cure = "Preprocess both with tokenizers of about the same size"
        raise DataError(problem(data.prefix, Words(kind), rule, cure))
    sequences = [int(data.document_indices[document]) for document in (begin, end)]
    return DocumentSpan(data.prefix, begin, end, *sequences, *(_byte_offset(data, sequence) for sequence in sequences))


def _open_each(spans: Sequence[DocumentSpan]) -> Iterator[tuple[DocumentSpan, IndexedDataset]]:
    for span in spans:
        yield span, IndexedDataset(span.prefix)


def _blocks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, BLOCK):
        yield start, min(start + BLOCK, end)


def _append_bytes(path: str, offset: int, count: int, out: int) -> None:
    """Copy bytes of a file to the end of `out`, inside the kernel."""
    with open(path, "rb", buffering=0) as source:
        while count:
            copied = os.sendfile(out, source.fileno(), offset, min(count, 1 << 30))
            if not copied:
                raise DataError(f"{path} ended {count} bytes early; it was truncated while it was read")
            offset, count = offset + copied, count - copied


def directory_prefixes(directory: str, output_prefix: str = "") -> list[str]:
    """Prefixes of the .bin/.idx pairs in `directory`, sorted by name. Raises DataError for a file without its partner.

    output_prefix: what is to be written. A DataError too if an earlier call wrote it into `directory`: its documents
    would be taken twice.
    """
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise DataError(problem("--input", directory, "must be a directory of .bin/.idx pairs", "Correct the path"))
    stems: dict[str, set[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".bin.idx"):
            cure = f"Rename it: mv '{path}' '{str(path)[:-8]}.idx'"
            raise DataError(f"{path} is misnamed; an index is called {path.name[:-8]}.idx. {cure}")
        if path.suffix in (".bin", ".idx") and not path.name.startswith("."):
            stems.setdefault(str(path.with_suffix("")), set()).add(path.suffix)
    for stem, suffixes in stems.items():
        if len(suffixes) == 1:
            present = suffixes.pop()
            missing = ".idx" if present == ".bin" else ".bin"
            raise DataError(f"{stem}{present} has no partner {missing}; a dataset is both files")
    if not stems:
        cure = "Name the directory that preprocess wrote to"
        raise DataError(problem("--input", directory, "holds no .bin/.idx pair", cure))
    written = re.compile(re.escape(os.path.realpath(output_prefix)) + r"(-\d{4,})?")
    earlier = sorted(stem for stem in stems if output_prefix and written.fullmatch(os.path.realpath(stem)))
    if earlier:
        rule = "holds a dataset with the name of what is to be written, whose documents would be taken twice"
        cure = "Remove it (.bin and .idx), or write to another directory"
        raise DataError(problem("--input", earlier[0], rule, cure))
    return sorted(stems)


def split_datasets(
    prefixes: Sequence[str],
    output_prefix: str,
    *,
    tokens: int = 0,
    documents: int = 0,
    size: int = 0,
    overwrite: bool = False,
) -> list[str]:
    """Write the datasets, taken as one, as datasets `output_prefix-NNNN`; returns their prefixes.

    tokens, documents, size: one of them, the most tokens, documents or bytes of a dataset.
    Documents stay whole: one larger than the limit gets its own dataset. All files appear when the last is written.
    overwrite: replace the files of an earlier split, which are an error otherwise.
    """
    limits = [limit for limit in (tokens, documents, size) if limit]
    if len(limits) != 1 or limits[0] < 0:
        given = {"--tokens": tokens, "--documents": documents, "--bytes": size}
        found = Words(" and ".join(f"{flag} {limit}" for flag, limit in given.items() if limit) or "nothing")
        rule = "must be given, above 0, as the size of a dataset"
        raise DataError(problem("Exactly one of --tokens, --documents and --bytes", found, rule, "Give one"))
    earlier = split_files(output_prefix)
    if earlier and not overwrite:
        rule = "has files of an earlier split, some of which would be left among the new ones"
        cure = "Add --overwrite to replace them all, or choose another prefix"
        raise DataError(problem("--output-prefix", earlier[0], rule, cure))
    folder = temporary_path(pathlib.Path(output_prefix))
    try:
        count = _write_pieces(prefixes, str(folder / "piece"), limits[0], documents=bool(documents), size=bool(size))
        outputs = [f"{output_prefix}-{number:04d}" for number in range(count)]
        files = dataset_files(outputs)
        with contextlib.ExitStack() as locks:  # all of them, before the first file is replaced
            lock_checks = [locks.enter_context(locked(prefix)) for prefix in outputs]
            others = sorted(set(files) - set(earlier))  # written since, or not by a split
            check(others, inputs=dataset_files(prefixes), overwrite=overwrite, flag="--output-prefix")
            for still_held in lock_checks:
                still_held()
            for number, prefix in enumerate(outputs):
                pathlib.Path(prefix + ".idx").unlink(missing_ok=True)
                for suffix in (".bin", ".idx"):
                    os.replace(folder / f"piece-{number:04d}{suffix}", prefix + suffix)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for file in sorted(set(earlier) - set(files), reverse=True):
        os.unlink(file)
    return outputs


def split_files(output_prefix: str) -> list[str]:
    """The files that a split to `output_prefix` wrote, sorted.

    They are numbered without a gap, so corpus-2024 is not of a split to corpus.
    """
    files, number = list[str](), 0
    while found := [file for file in dataset_files([f"{output_prefix}-{number:04d}"]) if os.path.lexists(file)]:
        files, number = files + found, number + 1
    return files


def _write_pieces(prefixes: Sequence[str], output_prefix: str, limit: int, *, documents: bool, size: bool) -> int:
    """Write the datasets of a split; returns how many. limit: documents, bytes (size) or tokens in a dataset."""
    written: list[str] = []
    spans: list[tuple[str, int, int]] = []
    left = limit

    def flush() -> None:
        written.append(f"{output_prefix}-{len(written):04d}")
        write_spans(spans, written[-1])
        spans.clear()

    for prefix in prefixes:
        data, begin = IndexedDataset(prefix), 0

        def cost(first: int, last: int, data: IndexedDataset = data) -> int:
            if documents:
                return last - first
            start, stop = (_byte_offset(data, int(data.document_indices[document])) for document in (first, last))
            return stop - start if size else (stop - start) // data.dtype.itemsize

        while begin < data.num_documents:
            # cost(begin, end) grows with end: binary search finds the last end that fits.
            end, high = begin, data.num_documents
            while end < high:
                middle = (end + high + 1) // 2
                end, high = (middle, high) if cost(begin, middle) <= left else (end, middle - 1)
            if end == begin and not spans:
                end = begin + 1
            if end > begin:
                spans.append((prefix, begin, end))
                left -= cost(begin, end)
                begin = end
            if begin < data.num_documents:
                flush()
                left = limit
    if not spans and not written:
        spans.append((prefixes[0], 0, 0))
    if spans:
        flush()
    return len(written)


def _byte_offset(data: IndexedDataset, sequence: int) -> int:
    return int(data.pointers[sequence]) if sequence < len(data) else data.bin_bytes
