"""BERT samples: two segments in right or swapped order, some words masked; Megatron's for the same seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.samples.dataset_factory import DatasetFactory
from megalith.data.samples.masking import Masking, continuation_pieces
from megalith.data.samples.sample_mapping import build_mapping
from megalith.data.samples.sentence_dataset import SentenceDataset, padded


class BertDataset(SentenceDataset):
    """Samples are dicts over s = seq_length tokens:

    input_ids [s] int64, [CLS] A [SEP] B [SEP] with masks, padded; token_types [s] int64, 0 for A and padding, 1 for B;
    padding_mask [s] int64, 1 for tokens; labels [s] int64, the original token where masked and -1 elsewhere; loss_mask
    [s] float32, 1 where masked; and with binary_head sentence_order, int64, 1 where A and B are swapped (Megatron calls
    it is_random; no sentence comes from elsewhere).
    """

    def __init__(
        self,
        indexed: Any,
        documents: tuple[int, int] | None = None,
        num_samples: int | None = None,
        *,
        seq_length: int,
        tokenizer: Any,
        seed: int = 1234,
        mask_prob: float = 0.15,
        short_seq_prob: float = 0.1,
        binary_head: bool = True,
        cache_folders: Sequence[str | os.PathLike] = (),
    ):
        """Whole epochs until there are num_samples (None: one epoch).

        tokenizer: with tokens(), vocab_size, cls, sep, mask, pad.
        """
        super().__init__(indexed, documents, seed, cache_folders)
        if binary_head and len(indexed) <= indexed.num_documents:
            rule = "must be split into sentences, because a sample needs two sentences of one document"
            found = Words(f"{len(indexed)} sequences in {indexed.num_documents} documents, one sequence each")
            cure = "Preprocess with --split-sentences, or train without the order of sentences: --bert-no-binary-head"
            raise DataError(problem(indexed.prefix, found, rule, cure))
        self.num_samples, self.seq_length = num_samples, seq_length
        self.short_seq_prob, self.binary_head = short_seq_prob, binary_head
        self.cls, self.sep, self.mask, self.pad = (tokenizer.require(name) for name in ("cls", "sep", "mask", "pad"))
        self.vocab_size = tokenizer.vocab_size
        self.masking = Masking(continuation_pieces(tokenizer), (self.cls, self.sep), mask_prob)

    def mapping_recipe(self) -> tuple[tuple, int, Callable[[], np.ndarray]]:
        """The mapping of sentences to samples; three tokens are reserved for [CLS], [SEP], [SEP]."""
        options: dict[str, Any] = {
            "num_samples": self.num_samples,
            "max_length": self.seq_length - 3,
            "short_prob": self.short_seq_prob,
        }
        options |= {"seed": self.seed, "min_sentences": 2 if self.binary_head else 1}
        return tuple(options.items()), 3, lambda: build_mapping(self.documents, self.indexed.lengths, **options)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        first, last, target = map(int, self.mapping[index])
        random = np.random.RandomState((self.seed + index) % 2**32)
        a, b, swapped = self._segments(self.sentences(first, last), random)
        a, b = _truncate_pair(a, b, target, random)
        text = np.concatenate(([self.cls], a, [self.sep], b, [self.sep] if b.size else [])).astype(np.int64)
        masked = text.copy()

        def mask(position: int) -> None:
            """80 % become [MASK], 10 % stay, 10 % become any token."""
            if random.random_sample() < 0.8:
                masked[position] = self.mask
            elif random.random_sample() >= 0.5:
                masked[position] = random.randint(0, self.vocab_size)

        positions = [position for span in self.masking.spans(text, target, random, mask) for position in span]
        labels, loss_mask = np.full(self.seq_length, -1, np.int64), np.zeros(self.seq_length, np.float32)
        labels[positions], loss_mask[positions] = text[positions], 1.0
        types = np.zeros(self.seq_length, np.int64)
        types[len(a) + 2 : len(text)] = 1
        sample = {
            "input_ids": padded(masked, self.seq_length, self.pad),
            "token_types": types,
            "labels": labels,
            "loss_mask": loss_mask,
        }
        sample["padding_mask"] = padded(np.ones(len(text), np.int64), self.seq_length, 0)
        return {**sample, "sentence_order": np.array(swapped, np.int64)} if self.binary_head else sample

    def _segments(
        self, sentences: list[np.ndarray], random: np.random.RandomState
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Segments A and B, swapped in half of the samples, and whether they are."""
        if not self.binary_head:
            return np.concatenate(sentences), np.zeros(0, np.int64), False
        pivot = random.randint(1, len(sentences)) if len(sentences) >= 3 else 1
        a, b = np.concatenate(sentences[:pivot]), np.concatenate(sentences[pivot:])
        return (b, a, True) if random.random_sample() < 0.5 else (a, b, False)


def _truncate_pair(
    a: np.ndarray, b: np.ndarray, max_tokens: int, random: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Both, cut to max_tokens together: one token at a time off the longer (B if equal), at its front or its end."""
    bounds = [[0, len(a)], [0, len(b)]]
    for draw in random.random_sample(max(0, len(a) + len(b) - max_tokens)):
        longer = bounds[0] if bounds[0][1] - bounds[0][0] > bounds[1][1] - bounds[1][0] else bounds[1]
        if draw < 0.5:
            longer[0] += 1
        else:
            longer[1] -= 1
    return a[slice(*bounds[0])], b[slice(*bounds[1])]


def _options(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer,
        "mask_prob": config.data.mask_prob,
        "short_seq_prob": config.data.short_seq_prob,
        "binary_head": not config.model.bert_no_binary_head,
    }


from_config = DatasetFactory(BertDataset, _options, splits_documents=True)
