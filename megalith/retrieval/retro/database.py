"""Step 1: every document of the training data, cut into chunks of GPT tokens (Borgeaud et al., 2022, section 2.1).

A document without its end-of-document token is cut from its first token on; what remains at its end is a shorter chunk.
A chunk's text is what its GPT tokens decode to. Its length in BERT's tokens is recorded; a chunk without any is not in
the database, but listed beside it as invalid. Blocks of documents are written by any number of processes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.common.files import remove_leftovers_in
from megalith.common.locks import locked
from megalith.config.flags.text import Words
from megalith.config.sections.data import DataConfig
from megalith.data import array_folder
from megalith.data.corpus.preprocess_pool import ENGINES
from megalith.data.indexed.tntidx import open_indexed
from megalith.data.retro import COLUMNS, DATABASE, VERSION, ChunkDatabase, block_ranges, dataset_digest
from megalith.data.samples.splits import normal_split, split_bounds
from megalith.data.source_checks import check_source
from megalith.data.sources import split_sources
from megalith.data.tokenizers.tokenizer import Tokenizer, TokenizerOptions, build_tokenizer
from megalith.retrieval.progress import Progress
from megalith.retrieval.sources import text_ids, words

ARRAYS = ("chunks", "invalid")
BATCH = 4096  # chunks whose texts exist at one time
CURE = "Give the same data, tokenizers and flags, or another --retro-workdir"


def describe(
    data: DataConfig, gpt: Tokenizer, bert: Tokenizer, *, chunk_length: int, doc_block_size: int,
    notice: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """The description of a database: what decides on every block. Raises DataError where the data are of other ids.

    Of data that --split divides, the training part alone makes the database. Weights do not count.
    """
    sources, divided = split_sources(data)
    datasets, seen = list[dict[str, Any]](), dict[str, str]()
    for source in sources["train"]:
        indexed = check_source(open_indexed(source.prefix), gpt, data, whole_documents=True)
        digest = dataset_digest(indexed.prefix)
        if digest in seen:
            notice(f"{source.prefix} is {seen[digest]} again: the database has it once")
            continue
        seen[digest] = source.prefix
        bounds = (0, len(indexed))
        if divided:
            bounds = split_bounds(data.split, len(indexed), data.split_rounding)[0]
        if bounds[1] > 2**32:
            raise DataError(problem(indexed.prefix, len(indexed), "must have at most 2^32 documents", "Split it"))
        datasets.append({"prefix": os.path.abspath(indexed.prefix), "digest": digest, "documents": list(bounds)})
    return {
        "version": VERSION,
        "chunk_length": chunk_length,
        "doc_block_size": doc_block_size,
        "split": normal_split(data.split) if divided else "",
        "split_rounding": data.split_rounding,
        **vocabularies(gpt, bert),
        "datasets": datasets,
    }


def vocabularies(gpt: Tokenizer, bert: Tokenizer) -> dict[str, str]:
    """What distinguishes two vocabularies from others, whatever files they came from."""
    found = {"gpt_vocabulary": [words(gpt), gpt.eod], "bert_vocabulary": words(bert)}
    return {name: hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16] for name, each in found.items()}


def check_vocabularies(database: ChunkDatabase, gpt: Tokenizer, bert: Tokenizer) -> None:
    """Raise DataError where a tokenizer is not the one that a database was built with."""
    for name, digest in vocabularies(gpt, bert).items():
        if digest != database.description[name]:
            what, kind = f"The tokenizer of the {name.split('_')[0].upper()}", Words(f"another one, {digest}")
            rule = f"must have the vocabulary that {database.path} was built with, {database.description[name]}"
            cure = "Give the tokenizer flags of megalith retro db, and the BERT of that vocabulary"
            raise DataError(problem(what, kind, rule, cure))


def build_database(
    folder: str | os.PathLike, description: Mapping[str, Any], gpt: Tokenizer, bert: Tokenizer, *, workers: int = 1,
    notice: Callable[[str], None] = lambda line: None, shown: bool = False,
) -> ChunkDatabase:  # fmt: skip
    """Write the blocks that are missing or damaged; a database that is complete is only checked.

    shown: print progress. Memory: of each worker the rows of a block, and the texts of BATCH chunks. Raises DataError
    where the folder is of another description, or nothing has text.
    """
    folder, blocks = pathlib.Path(folder), len(block_ranges(description))
    with locked(folder, inside=True, notice=notice):
        todo = array_folder.begin(folder / DATABASE, description, blocks, ARRAYS, CURE, notice)
        remove_leftovers_in(folder, notice)
        if len(todo) < blocks:
            notice(f"{folder}: {blocks - len(todo)} of {blocks} blocks are there")
        job = BlockJob(str(folder), dict(description), gpt.options, bert.options)
        engine = ENGINES.find("processes" if min(workers, len(todo)) > 1 else "inline")
        progress = Progress(len(todo), shown, "blocks")
        for _ in engine(job, iter(todo), min(workers, len(todo))):
            progress.add(1)
    found = ChunkDatabase(folder)
    if not len(found):
        rule = "must hold text in the documents of the training part"
        raise DataError(
            problem("The data", Words("no chunk with text"), rule, "Check --data-path, --split, tokenizers")
        )
    return found


@dataclasses.dataclass(frozen=True)
class BlockJob:
    """What a worker needs, see data/corpus/preprocess_pool.py."""

    folder: str
    description: dict[str, Any]
    gpt: TokenizerOptions
    bert: TokenizerOptions

    def worker(self) -> Callable[[int], dict]:
        """What writes a block."""
        texts, bert = ChunkTexts(build_tokenizer(**vars(self.gpt))), build_tokenizer(**vars(self.bert))
        ranges = block_ranges(self.description)
        datasets = [open_indexed(each["prefix"]) for each in self.description["datasets"]]

        def write(block: int) -> dict:
            number, first, last = ranges[block]
            chunks = cut(datasets[number], first, last, self.description["chunk_length"], texts.eod)
            rows = [measured(datasets[number], part, texts, bert) for part in batched(chunks, BATCH)]
            table = np.concatenate([np.empty((0, len(COLUMNS) - 1), np.uint32), *rows])
            table = np.insert(table, 0, number, axis=1)
            valid = table[:, -1] > 0
            arrays = {"chunks": table[valid], "invalid": table[~valid]}
            array_folder.write_part(self.folder, block, arrays, **{name: len(each) for name, each in arrays.items()})
            return {}

        return write


class ChunkTexts:
    """The texts of GPT tokens, without those that end a document."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.eod = tokenizer, tokenizer.eod

    def __call__(self, ids: np.ndarray) -> str:
        """The text of a chunk; ids [n]."""
        return self.tokenizer.decode((ids if self.eod is None else ids[ids != self.eod]).tolist())


def cut(indexed: Any, first: int, last: int, length: int, eod: int | None) -> Iterator[tuple[int, int, int]]:
    """(document, start, end) of the chunks of documents first to last - 1."""
    for document in range(first, last):
        tokens = indexed.get(document)
        size = len(tokens)
        while size and tokens[size - 1] == eod:
            size -= 1
        for start in range(0, size, length):
            yield document, start, min(start + length, size)


def measured(indexed: Any, chunks: Sequence[tuple[int, int, int]], texts: ChunkTexts, bert: Tokenizer) -> np.ndarray:
    """uint32 [n, 4]: document, start, end, and the tokens that BERT's tokenizer makes of the text."""
    found = [texts(indexed.get(document, start, end - start)) for document, start, end in chunks]
    lengths = [len(ids) for ids in text_ids(bert, found)]
    return np.column_stack([np.array(chunks), lengths]).astype(np.uint32)


def batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of so many items, the last one shorter."""
    while part := list(itertools.islice(items, size)):
        yield part
