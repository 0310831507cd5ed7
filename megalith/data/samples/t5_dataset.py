"""T5 samples: spans of words replaced by sentinels, which the decoder spells out; Megatron's for the same seed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.checks.masking import decoder_problem, expected_spans, masked_tokens
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.samples.dataset_factory import DatasetFactory
from megalith.data.samples.masking import Masking, continuation_pieces
from megalith.data.samples.sample_mapping import build_mapping
from megalith.data.samples.sentence_dataset import SentenceDataset, padded


class T5Dataset(SentenceDataset):
    """Samples are dicts over s = seq_length encoder and d = decoder_seq_length decoder tokens:

    input_ids [s] int64, the text with a sentinel for each masked span; decoder_input_ids [d] int64, [BOS] (padding
    where a vocabulary has none) and then each sentinel with its span; labels [d] int64, the same shifted by one, ending
    with [EOS], and -1 for padding; loss_mask [d] float32; padding_mask [s] and decoder_padding_mask [d] int64, 1 for
    tokens.
    """

    def __init__(
        self,
        indexed: Any,
        documents: tuple[int, int] | None = None,
        num_samples: int | None = None,
        *,
        seq_length: int,
        decoder_seq_length: int,
        tokenizer: Any,
        seed: int = 1234,
        mask_prob: float = 0.15,
        short_seq_prob: float = 0.1,
        cache_folders: Sequence[str | os.PathLike] = (),
    ):
        """Whole epochs until there are num_samples (None: one epoch).

        tokenizer: as BertDataset's, with decoder_start, eos and extra_ids too.
        """
        super().__init__(indexed, documents, seed, cache_folders)
        longest = int(indexed.lengths.max())
        if len(indexed) == indexed.num_documents > 1 and longest > seq_length:
            rule = f"must be split into sentences, because what is beyond --seq-length {seq_length} would be lost"
            found = Words(f"{len(indexed)} documents, each one sequence of up to {longest} tokens")
            raise DataError(problem(indexed.prefix, found, rule, "Preprocess with --split-sentences"))
        self.num_samples, self.seq_length = num_samples, seq_length
        self.decoder_seq_length, self.short_seq_prob = decoder_seq_length, short_seq_prob
        self.decoder_start = tokenizer.decoder_start
        self.eos, self.pad = tokenizer.require("eos"), tokenizer.require("pad")
        self.sentinels = list(tokenizer.extra_ids)
        if not self.sentinels:
            rule = "must be above 0, because T5 marks masked spans with sentinels"
            raise ConfigError(problem("--vocab-extra-ids", 0, rule, "Add --vocab-extra-ids 100"))
        masked = masked_tokens("t5", seq_length, mask_prob)
        if text := decoder_problem(seq_length, decoder_seq_length, mask_prob):
            raise ConfigError(text)
        if len(self.sentinels) < expected_spans(masked):
            raise DataError(
                f"the tokenizer has {len(self.sentinels)} sentinels, and a sample of {seq_length} tokens usually has "
                f"{expected_spans(masked)} masked spans, at most {masked}; raise --vocab-extra-ids"
            )
        if len(self.sentinels) < masked and not getattr(getattr(tokenizer, "options", None), "vocab_extra_ids", 0):
            warnings.warn(  # where --vocab-extra-ids is given, config/checks/masking.py notes it
                f"the tokenizer's {len(self.sentinels)} sentinels fit usual samples; one with more spans (at most "
                f"{masked}) is masked less",
                stacklevel=2,
            )
        skipped = tuple(token for token in (tokenizer.cls, tokenizer.sep) if token is not None)
        self.masking = Masking(continuation_pieces(tokenizer), skipped, mask_prob, max_ngram=10, geometric_lengths=True)

    def mapping_recipe(self) -> tuple[tuple, int, Callable[[], np.ndarray]]:
        """The mapping of sentences to samples; Megatron reserves two tokens of the encoder's length."""
        options: dict[str, Any] = {
            "num_samples": self.num_samples,
            "max_length": self.seq_length - 2,
            "short_prob": self.short_seq_prob,
        }
        options |= {"seed": self.seed, "min_sentences": 1}
        return tuple(options.items()), 3, lambda: build_mapping(self.documents, self.indexed.lengths, **options)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        first, last, target = map(int, self.mapping[index])
        random = np.random.RandomState((self.seed + index) % 2**32)
        text = np.concatenate(self.sentences(first, last))[:target].astype(np.int64)
        spans = self._fitting(self.masking.spans(text, target, random))
        tokens = text.tolist()
        encoder: list[int] = []
        decoder: list[int] = []
        start = 0
        for sentinel, span in zip(self.sentinels, spans):
            encoder += [*tokens[start : span[0]], sentinel]
            decoder += [sentinel, *(tokens[position] for position in span)]
            start = span[-1] + 1
        encoder += tokens[start:]
        size = len(decoder) + 1
        loss_mask = np.zeros(self.decoder_seq_length, np.float32)
        loss_mask[:size] = 1.0
        return {
            "input_ids": padded(encoder, self.seq_length, self.pad),
            "decoder_input_ids": padded([self.decoder_start, *decoder], self.decoder_seq_length, self.pad),
            "labels": padded([*decoder, self.eos], self.decoder_seq_length, -1),
            "loss_mask": loss_mask,
            "padding_mask": padded([1] * len(encoder), self.seq_length, 0),
            "decoder_padding_mask": padded([1] * size, self.decoder_seq_length, 0),
        }

    def _fitting(self, spans: list[list[int]]) -> list[list[int]]:
        """The first spans that the decoder has room and sentinels for: all, but in a rare sample.

        Megatron would stop there.
        """
        room = self.decoder_seq_length - 1
        for count, span in enumerate(spans):
            room -= len(span) + 1
            if room < 0 or count == len(self.sentinels):
                return spans[:count]
        return spans


def _options(config: RunConfig, tokenizer: Any) -> dict[str, Any]:
    """Without --decoder-seq-length the decoder is as long as the encoder."""
    data = config.data
    return {
        "decoder_seq_length": data.decoder_seq_length or data.seq_length or 0,
        "tokenizer": tokenizer,
        "mask_prob": data.mask_prob,
        "short_seq_prob": data.short_seq_prob,
    }


from_config = DatasetFactory(T5Dataset, _options, splits_documents=True)
