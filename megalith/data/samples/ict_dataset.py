"""Samples of the inverse cloze task: a sentence as the query, the block it was taken from as the evidence."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
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
    sentence, last + 1, document, block number.

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
        cache_folders: Sequence[str | os.PathLike] = (),
    ):
        """Whole epochs until there are num_samples (None: one epoch).

        titles: an indexed dataset with one sequence for each document, or None. query_in_block_prob: how often the
        query stays in the block. one_sentence: blocks of a single sentence are allowed.
        """
        super().__init__(indexed, documents, seed, cache_folders)
        if titles is not None and len(titles) != indexed.num_documents:
            raise DataError(
                f"{titles.prefix} has {len(titles)} titles for the {indexed.num_documents} documents of "
                f"{indexed.prefix}; preprocess titles and bodies in one run (--json-keys title text) so that they stay "
                f"aligned"
            )
        room = seq_length - 3  # for [CLS], [SEP], [SEP]
        if titles is not None and (longest := int(titles.lengths.max(initial=0))) >= room:
            rule = f"must hold titles of at most {room - 1} tokens, because a sample is [CLS] title [SEP] block [SEP]"
            found = Words(f"a title of {longest} tokens, of document {int(titles.lengths.argmax())}")
            raise DataError(
                problem(titles.prefix, found, rule, f"Write --seq-length {longest + 4} or more, or shorten the titles")
            )
        if room < 1:
            rule = "must be at least 4 tokens: [CLS] block [SEP] [SEP]"
            raise ConfigError(problem("--seq-length", seq_length, rule, "Write --seq-length 256"))
        self.titles, self.num_samples, self.seq_length = titles, num_samples, seq_length
        self.query_in_block_prob, self.one_sentence = query_in_block_prob, one_sentence
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
        return (
            (*options.items(), sizes.tobytes()),
            4,
            lambda: build_blocks(self.documents, self.indexed.lengths, sizes, **options),
        )

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        row = self.mapping[index].astype(np.int64)
        draw = random.Random(self.seed + index)
        block = self.sentences(int(row[0]), int(row[1]))
        chosen = draw.randint(0, len(block) - 1)
        query = block[chosen]
        if draw.random() >= self.query_in_block_prob and len(block) > 1:
            del block[chosen]
        title = [] if self.titles is None else [*self.titles.get(self.first_document + int(row[2])).tolist(), self.sep]
        context = np.concatenate(block)[: self.seq_length - 2 - len(title)].tolist()
        return {
            **self._padded("query", [self.cls, *query[: self.seq_length - 2].tolist(), self.sep]),
            **self._padded("context", [self.cls, *title, *context, self.sep]),
            "block": row,
        }

    def _padded(self, name: str, tokens: list[int]) -> dict[str, np.ndarray]:
        mask = padded([1] * len(tokens), self.seq_length, 0)
        return {f"{name}_ids": padded(tokens, self.seq_length, self.pad), f"{name}_padding_mask": mask}


def _options(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """With titles if --titles-data-path names them."""
    data = config.data
    return {
        "titles": IndexedDataset(data.titles_data_path) if data.titles_data_path else None,
        "tokenizer": tokenizer,
        "query_in_block_prob": data.query_in_block_prob,
        "one_sentence": data.use_one_sent_docs,
    }


from_config = DatasetFactory(IctDataset, _options, splits_documents=True)
