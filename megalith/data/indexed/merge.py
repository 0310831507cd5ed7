"""Many indexed datasets into one, one into many; in constant memory."""

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
from megalith.common.files import aside, atomic_path
from megalith.common.locks import locked
from megalith.common.outputs import check
from megalith.data.indexed import IndexedDataset
from megalith.data.indexed.format import CODES, HEADER, MAGIC, dataset_files

BLOCK = 1 << 20  # entries of an index held in memory at once


def merge_datasets(prefixes: Sequence[str], output_prefix: str, ready: Callable[[], None] = lambda: None) -> None:
    """Write the datasets of `prefixes`, in this order, as one dataset `output_prefix`; byte for byte what Megatron's merge writes.

    ready: called before files are put in place; where it raises, none is.
    Raises DataError when their dtypes differ. Both files appear complete or not at all.
    """
    if not prefixes:
        raise DataError(
            problem(
                "datasets to merge", 0, "a merge needs one or more", "Name prefixes, or a directory of .bin/.idx pairs"
            )
        )
    write_spans([(prefix, 0, IndexedDataset(prefix).num_documents) for prefix in prefixes], output_prefix, ready)


def write_spans(
    spans: Sequence[tuple[str, int, int]],
    output_prefix: str,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Write runs of documents (prefix, first document, document after the last) one after another as the dataset `output_prefix`.

    Every pass opens the datasets one by one: a run may join more parts than a process may hold open.
    """
    first = IndexedDataset(spans[0][0])
    itemsize = first.dtype.itemsize
    runs = [_measure(IndexedDataset(prefix), a, b, first) for prefix, a, b in spans]
    sequences, documents = (
        sum(run.sequence_end - run.sequence for run in runs),
        sum(run.end - run.begin for run in runs),
    )
    names = (output_prefix + ".idx", output_prefix + ".bin")
    with atomic_path(names[0], ready) as index_path, atomic_path(names[1], ready) as bin_path:
        with open(index_path, "wb") as index:
            index.write(HEADER.pack(MAGIC, 1, CODES[first.dtype], sequences, documents + 1))
            for run, data in _opened(runs):
                for begin, end in _blocks(run.sequence, run.sequence_end):
                    index.write(np.ascontiguousarray(data.lengths[begin:end], "<i4").data)
            offset = 0
            for run, data in _opened(runs):
                for begin, end in _blocks(run.sequence, run.sequence_end):
                    ends = offset + np.cumsum(data.lengths[begin:end].astype("<i8") * itemsize)
                    index.write((ends - data.lengths[begin:end].astype("<i8") * itemsize).data)
                    offset = int(ends[-1])
            index.write(np.zeros(1, "<i8").data)
            before = 0
            for run, data in _opened(runs):
                for begin, end in _blocks(run.begin + 1, run.end + 1):
                    index.write((data.document_indices[begin:end].astype("<i8") + (before - run.sequence)).data)
                before += run.sequence_end - run.sequence
            for run, data in _opened(runs):
                if data.modes is not None:
                    index.write(np.ascontiguousarray(data.modes[run.sequence : run.sequence_end], np.int8).data)
        with open(bin_path, "wb", buffering=0) as out:
            for run in runs:
                _append(run.prefix + ".bin", run.byte, run.byte_end - run.byte, out.fileno())
        pathlib.Path(output_prefix + ".idx").unlink(missing_ok=True)  # killed here, it would be the index of other data
    made = IndexedDataset(output_prefix)  # opening checks the header against both file sizes
    if (len(made), made.num_documents) != (sequences, documents):
        raise DataError(
            f"{output_prefix}: holds {len(made)} sequences where {sequences} were written; the disk lost something"
        )


class Run(NamedTuple):
    """Documents begin to end - 1 of a dataset, and the sequences and bytes they are."""

    prefix: str
    begin: int
    end: int
    sequence: int
    sequence_end: int
    byte: int
    byte_end: int


def _measure(data: IndexedDataset, begin: int, end: int, first: IndexedDataset) -> Run:
    if data.dtype != first.dtype or data.multimodal != first.multimodal:
        kinds = [f"{one.dtype}{', multimodal' if one.multimodal else ''}" for one in (data, first)]
        rule = f"{first.prefix} is {kinds[1]} and only equal kinds merge"
        raise DataError(problem(data.prefix, kinds[0], rule, "Preprocess both with tokenizers of about the same size"))
    sequences = [int(data.document_indices[at]) for at in (begin, end)]
    return Run(data.prefix, begin, end, *sequences, *(_byte_at(data, at) for at in sequences))


def _opened(runs: Sequence[Run]) -> Iterator[tuple[Run, IndexedDataset]]:
    for run in runs:
        yield run, IndexedDataset(run.prefix)


def _blocks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for at in range(begin, end, BLOCK):
        yield at, min(at + BLOCK, end)


def _append(path: str, offset: int, count: int, out: int) -> None:
    """Copy bytes of a file to the end of `out`, inside the kernel."""
    with open(path, "rb", buffering=0) as source:
        while count:
            copied = os.sendfile(out, source.fileno(), offset, min(count, 1 << 30))
            if not copied:
                raise DataError(f"{path}: ended {count} bytes early; it was cut while it was read")
            offset, count = offset + copied, count - copied


def directory_prefixes(directory: str, output_prefix: str = "") -> list[str]:
    """Prefixes of the .bin/.idx pairs in `directory`, sorted by name. Raises DataError for a file without its partner.

    output_prefix: what is to be written; if an earlier call wrote it into `directory`, its documents would be taken twice: a DataError.
    """
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise DataError(problem("--input", directory, "it must be a directory of .bin/.idx pairs", "Correct the path"))
    stems: dict[str, set[str]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(".bin.idx"):
            raise DataError(
                f"{path} is misnamed; an index is called {path.name[:-8]}.idx. Rename it: mv '{path}' '{str(path)[:-8]}.idx'"
            )
        if path.suffix in (".bin", ".idx") and not path.name.startswith("."):
            stems.setdefault(str(path.with_suffix("")), set()).add(path.suffix)
    for stem, suffixes in stems.items():
        if len(suffixes) == 1:
            have = suffixes.pop()
            raise DataError(
                f"{stem}{have} has no partner {'.idx' if have == '.bin' else '.bin'}; a dataset is both files"
            )
    if not stems:
        raise DataError(
            problem("--input", directory, "it holds no .bin/.idx pair", "Name the directory that preprocess wrote to")
        )
    written = re.compile(re.escape(os.path.realpath(output_prefix)) + r"(-\d{4,})?")
    earlier = sorted(stem for stem in stems if output_prefix and written.fullmatch(os.path.realpath(stem)))
    if earlier:
        rule = "it has the name of what is to be written, and its documents would be taken twice"
        raise DataError(
            problem("--input", earlier[0], rule, "Remove it (.bin and .idx), or write to another directory")
        )
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
    """Write the datasets, taken as one, as files `output_prefix-NNNN` of at most so many tokens, documents or bytes; returns the prefixes.

    Documents stay whole: one larger than the limit gets a file of its own. All files appear when the last is written.
    overwrite: put them in the place of those of an earlier split, which else are an error.
    """
    limits = [limit for limit in (tokens, documents, size) if limit]
    if len(limits) != 1 or limits[0] < 0:
        raise DataError(
            problem(
                "--tokens, --documents, --bytes",
                limits,
                "exactly one of them, above 0, says how large a file gets",
                "Give one",
            )
        )
    earlier = pieces(output_prefix)
    if earlier and not overwrite:
        rule = "it is of an earlier split, of which files would be left among the new ones"
        raise DataError(
            problem(
                "--output-prefix", earlier[0], rule, "Add --overwrite to replace them all, or choose another prefix"
            )
        )
    folder = aside(pathlib.Path(output_prefix))
    try:
        count = _write_pieces(prefixes, str(folder / "piece"), limits[0], documents=bool(documents), size=bool(size))
        made = [f"{output_prefix}-{number:04d}" for number in range(count)]
        files = dataset_files(made)
        with contextlib.ExitStack() as locks:  # all, before the first of them is replaced
            held = [locks.enter_context(locked(prefix)) for prefix in made]
            others = sorted(set(files) - set(earlier))  # made since, or no part of a split
            check(others, inputs=dataset_files(prefixes), overwrite=overwrite, flag="--output-prefix")
            for still_held in held:
                still_held()
            for number, prefix in enumerate(made):
                pathlib.Path(prefix + ".idx").unlink(missing_ok=True)
                for suffix in (".bin", ".idx"):
                    os.replace(folder / f"piece-{number:04d}{suffix}", prefix + suffix)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for file in sorted(set(earlier) - set(files), reverse=True):
        os.unlink(file)
    return made


def pieces(output_prefix: str) -> list[str]:
    """The files that a split to `output_prefix` made, sorted: numbered without a gap, so that a corpus-2024 is none of corpus."""
    made, number = list[str](), 0
    while found := [file for file in dataset_files([f"{output_prefix}-{number:04d}"]) if os.path.lexists(file)]:
        made, number = made + found, number + 1
    return made


def _write_pieces(prefixes: Sequence[str], output_prefix: str, limit: int, *, documents: bool, size: bool) -> int:
    """Write the files of a split; returns how many. limit: documents, bytes (size) or tokens in a file."""
    made: list[str] = []
    spans: list[tuple[str, int, int]] = []
    left = limit

    def flush() -> None:
        made.append(f"{output_prefix}-{len(made):04d}")
        write_spans(spans, made[-1])
        spans.clear()

    for prefix in prefixes:
        data, begin = IndexedDataset(prefix), 0

        def cost(first: int, last: int, data: IndexedDataset = data) -> int:
            if documents:
                return last - first
            taken = _byte_at(data, int(data.document_indices[last])) - _byte_at(data, int(data.document_indices[first]))
            return taken if size else taken // data.dtype.itemsize

        while begin < data.num_documents:
            # cost(begin, end) grows with end: the last end that fits is found by halving.
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
    if not spans and not made:
        spans.append((prefixes[0], 0, 0))
    if spans:
        flush()
    return len(made)


def _byte_at(data: IndexedDataset, sequence: int) -> int:
    return int(data.pointers[sequence]) if sequence < len(data) else data.bin_bytes
