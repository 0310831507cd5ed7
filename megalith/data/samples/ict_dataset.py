"""Samples of the inverse cloze task: a sentence as the query, the block it was taken from as the evidence."""

from __future__ import annotations

import inspect
import os
import random
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.registry import load
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.indexed import IndexedDataset
from megalith.data.samples.dataset_factory import DatasetFactory
from megalith.data.samples.sample_mapping import build_blocks
from megalith.data.samples.sentence_dataset import SentenceDataset, padded


class IctDataset(SentenceDataset):
    """Samples are dicts over s = seq_length tokens:

    query_ids [s] int64, [CLS] query [SEP]; context_ids [s] int64, [CLS] title [SEP] block [SEP], or [CLS] block [SEP]
    without titles; query_padding_mask and context_padding_mask [s] int64, 1 for tokens; block [4] int64: first
    sentence, last + 1, document, block number; document [] int64: equal for blocks of one document, in whatever corpora
    are blended.

    The blocks and their order are Megatron's. Its choice of sentences comes from one generator that every sample
    advances, so it depends on how many workers read; here sample i draws from random.Random(seed + i).
    """

    def __init__(
        self,
        indexed: Any,
        documents: tuple[int, int] | None = None,
        num_samples: int | None = None,
        *,
        titles: Any = None,
        seq_length: int,
        tokenizer: Any,
        seed: int = 1234,
        query_in_block_prob: float = 0.1,
        one_sentence: bool = False,
        make_blocks: Callable[..., np.ndarray] = build_blocks,
        cache_folders: Sequence[str | os.PathLike] = (),
    ):
        """Whole epochs until there are num_samples (None: one epoch).

        titles: an indexed dataset of as many documents, or None. query_in_block_prob: how often the
        query stays in the block. one_sentence: blocks of a single sentence are allowed. make_blocks: says which
        sentences make a block, with the arguments and the result of sample_mapping.py: build_blocks.
        """
        super().__init__(indexed, documents, seed, cache_folders)
        self.titles = None if titles is None else Titles(titles, indexed)
        room = seq_length - 3  # for [CLS], [SEP], [SEP]
        if self.titles is not None and (longest := int(self.titles.lengths.max(initial=0))) >= room:
            rule = f"must hold titles of at most {room - 1} tokens, because a sample is [CLS] title [SEP] block [SEP]"
            found = Words(f"a title of {longest} tokens, of document {int(self.titles.lengths.argmax())}")
            raise DataError(
                problem(titles.prefix, found, rule, f"Write --seq-length {longest + 4} or more, or shorten the titles")
            )
        if room < 1:
            rule = "must be at least 4 tokens: [CLS] block [SEP] [SEP]"
            raise ConfigError(problem("--seq-length", seq_length, rule, "Write --seq-length 256"))
        # The upper half is the corpus's, the lower one counts its documents.
        self.document_key = np.int64(zlib.crc32(str(indexed.prefix).encode()) << 31) + self.first_document
        self.num_samples, self.seq_length = num_samples, seq_length
        self.query_in_block_prob, self.one_sentence, self.make_blocks = query_in_block_prob, one_sentence, make_blocks
        self.cls, self.sep, self.pad = (tokenizer.require(name) for name in ("cls", "sep", "pad"))

    def mapping_recipe(self) -> tuple[tuple, int, Callable[[], np.ndarray]]:
        """The blocks; three tokens are reserved for [CLS], [SEP], [SEP]."""
        options: dict[str, Any] = {
            "num_samples": self.num_samples,
            "max_length": self.seq_length - 3,
            "seed": self.seed,
            "one_sentence": self.one_sentence,
        }
        count = len(self.documents) - 1
        sizes = np.zeros(count, np.int64)
        if self.titles is not None:
            sizes = np.array(self.titles.lengths[self.first_document : self.first_document + count], np.int64)
        parts = (*options.items(), sizes.tobytes())
        if self.make_blocks is not build_blocks:
            parts += (
                f"{self.make_blocks.__module__}:{self.make_blocks.__qualname__}",
                inspect.getsource(self.make_blocks),
            )
        return parts, 4, lambda: self._blocks(sizes, options)

    def _blocks(self, sizes: np.ndarray, options: dict[str, Any]) -> np.ndarray:
        """The mapping, which may be a user's. Raises DataError where it is none."""
        found = np.asarray(self.make_blocks(self.documents, self.indexed.lengths, sizes, **options))
        count, rule = len(self.documents) - 1, "must be rows (first sentence, last + 1, document, block)"
        if found.ndim != 2 or found.shape[1] != 4 or not len(found) or found.dtype.kind not in "iu":
            what = Words(f"an array {found.dtype} of shape {found.shape}")
            raise DataError(problem("The blocks of --block-samples-mapping", what, rule, "Return such an array"))
        first, last, document = found[:, 0].astype(np.int64), found[:, 1].astype(np.int64), found[:, 2].astype(np.int64)
        inside = (document >= 0) & (document < count)
        inside[inside] &= first[inside] >= self.documents[document[inside]]
        inside[inside] &= last[inside] <= self.documents[document[inside] + 1]
        if len(wrong := np.flatnonzero(~inside | (first >= last))):
            rule += " of sentences that lie in the document, one at least"
            what = Words(f"row {wrong[0]}, {found[wrong[0]].tolist()}")
            raise DataError(problem("The blocks of --block-samples-mapping", what, rule, "Correct the function"))
        return found.astype(np.uint32 if len(self.indexed) <= np.iinfo(np.uint32).max else np.uint64)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        row = self.mapping[index].astype(np.int64)
        draw = random.Random(self.seed + index)
        block = self.sentences(int(row[0]), int(row[1]))
        chosen = draw.randint(0, len(block) - 1)
        query = block[chosen]
        if draw.random() >= self.query_in_block_prob and len(block) > 1:
            del block[chosen]
        return {
            **self._padded("query", [self.cls, *query[: self.seq_length - 2].tolist(), self.sep]),
            **self._padded("context", self.context(int(row[2]), block)),
            "block": row,
            "document": self.document_key + row[2],
        }

    def block(self, number: int) -> dict[str, np.ndarray]:
        """Row `number` of the mapping as an index has it, whole: its context_ids, context_padding_mask and block."""
        row = self.mapping[number].astype(np.int64)
        sentences = self.sentences(int(row[0]), int(row[1]))
        return {**self._padded("context", self.context(int(row[2]), sentences)), "block": row}

    def context(self, document: int, sentences: list[np.ndarray]) -> list[int]:
        """[CLS] title [SEP] sentences [SEP], cut to seq_length tokens. document: counted from the split's first."""
        title = [] if self.titles is None else [*self.titles.get(self.first_document + document).tolist(), self.sep]
        tokens = np.concatenate(sentences)[: self.seq_length - 2 - len(title)].tolist()
        return [self.cls, *title, *tokens, self.sep]

    def _padded(self, name: str, tokens: list[int]) -> dict[str, np.ndarray]:
        mask = padded([1] * len(tokens), self.seq_length, 0)
        return {f"{name}_ids": padded(tokens, self.seq_length, self.pad), f"{name}_padding_mask": mask}


class Titles:
    """The titles of documents: all sequences of a document of their dataset, as --split-sentences may cut a title too.

    (Megatron reads sequence d as the title of document d, which a title of two sentences shifts for all that follow.)
    """

    def __init__(self, titles: Any, bodies: Any):
        """Raises DataError where they are not of as many documents."""
        if titles.num_documents != bodies.num_documents:
            raise DataError(
                f"{titles.prefix} has {titles.num_documents} titles for the {bodies.num_documents} documents of "
                f"{bodies.prefix}; preprocess titles and bodies in one run (--json-keys title text) so that they stay "
                f"aligned"
            )
        self.indexed, self.prefix = titles, titles.prefix
        self.firsts = np.asarray(titles.document_indices, np.int64)
        ends = np.concatenate(([0], np.cumsum(titles.lengths, dtype=np.int64)))
        self.lengths = ends[self.firsts[1:]] - ends[self.firsts[:-1]]  # in tokens, by document

    def get(self, document: int) -> np.ndarray:
        """The tokens of a document's title."""
        parts = [self.indexed.get(number) for number in range(self.firsts[document], self.firsts[document + 1])]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _options(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """With titles if --titles-data-path names them."""
    data = config.data
    return {
        "titles": IndexedDataset(data.titles_data_path) if data.titles_data_path else None,
        "tokenizer": tokenizer,
        "query_in_block_prob": data.query_in_block_prob,
        "one_sentence": data.use_one_sent_docs,
        **({"make_blocks": load("block samples mapping", own)} if (own := data.block_samples_mapping) else {}),
    }


from_config = DatasetFactory(IctDataset, _options, splits_documents=True)
