"""Samples of T5: runs of words replaced by sentinels, which the decoder spells out; equal to Megatron's for the same seed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.checks.masking import decoder_problem, masked_tokens, usual_runs
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.samples.masking import Masking, continuing
from megalith.data.samples.sample_mapping import build_mapping
from megalith.data.samples.sentence_dataset import SentenceDataset, padded


class T5Dataset(SentenceDataset):
    """Samples are dicts over s = seq_length encoder and d = decoder_seq_length decoder tokens:

    input_ids [s] int64, the text with a sentinel for each masked run; decoder_input_ids [d] int64, [BOS] (padding where a vocabulary
    has none) and then each sentinel with its run; labels [d] int64, the same one step on with [EOS], and -1 for padding; loss_mask [d]
    float32; padding_mask [s] and decoder_padding_mask [d] int64, 1 for tokens.
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
        """Whole epochs until there are num_samples (None: one epoch). tokenizer: see BERT's, with decoder_start, eos and extra_ids too."""
        super().__init__(indexed, documents, seed, cache_folders)
        longest = int(indexed.lengths.max())
        if len(indexed) == indexed.num_documents > 1 and longest > seq_length:
            rule = f"each of {indexed.num_documents} documents is one sequence, and what is beyond --seq-length {seq_length} would be lost"
            raise DataError(
                problem(indexed.prefix, Words(f"up to {longest} tokens"), rule, "Preprocess with --split-sentences")
            )
        self.num_samples, self.seq_length, self.decoder_seq_length, self.short_seq_prob = (
            num_samples,
            seq_length,
            decoder_seq_length,
            short_seq_prob,
        )
        self.start, self.eos, self.pad = tokenizer.decoder_start, tokenizer.require("eos"), tokenizer.require("pad")
        self.sentinels = list(tokenizer.extra_ids)
        if not self.sentinels:
            raise ConfigError(
                problem("--vocab-extra-ids", 0, "T5 marks masked runs with sentinels", "Add --vocab-extra-ids 100")
            )
        masked = masked_tokens("t5", seq_length, mask_prob)
        if text := decoder_problem(seq_length, decoder_seq_length, mask_prob):
            raise ConfigError(text)
        if len(self.sentinels) < usual_runs(masked):
            rule = f"a sample of {seq_length} tokens usually has {usual_runs(masked)} masked runs, at most {masked}; raise --vocab-extra-ids"
            raise DataError(f"the tokenizer has {len(self.sentinels)} sentinels, and {rule}")
        if len(self.sentinels) < masked and not getattr(getattr(tokenizer, "options", None), "vocab_extra_ids", 0):
            text = f"the tokenizer's {len(self.sentinels)} sentinels fit usual samples; one with more runs (at most {masked}) is masked less"
            warnings.warn(text, stacklevel=2)  # of --vocab-extra-ids the command line has told
        skipped = tuple(token for token in (tokenizer.cls, tokenizer.sep) if token is not None)
        self.masking = Masking(continuing(tokenizer), skipped, mask_prob, longest=10, geometric=True)

    def build(self) -> tuple[tuple, int, Callable[[], np.ndarray]]:
        """The mapping of sentences to samples; Megatron keeps two tokens of the encoder's length back."""
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
        runs = self._fitting(self.masking.runs(text, target, random))
        tokens = text.tolist()
        encoder: list[int] = []
        spelled: list[int] = []
        start = 0
        for sentinel, run in zip(self.sentinels, runs):
            encoder += [*tokens[start : run[0]], sentinel]
            spelled += [sentinel, *(tokens[place] for place in run)]
            start = run[-1] + 1
        encoder += tokens[start:]
        size = len(spelled) + 1
        loss_mask = np.zeros(self.decoder_seq_length, np.float32)
        loss_mask[:size] = 1.0
        return {
            "input_ids": padded(encoder, self.seq_length, self.pad),
            "decoder_input_ids": padded([self.start, *spelled], self.decoder_seq_length, self.pad),
            "labels": padded([*spelled, self.eos], self.decoder_seq_length, -1),
            "loss_mask": loss_mask,
            "padding_mask": padded([1] * len(encoder), self.seq_length, 0),
            "decoder_padding_mask": padded([1] * size, self.decoder_seq_length, 0),
        }

    def _fitting(self, runs: list[list[int]]) -> list[list[int]]:
        """The first runs that the decoder has room and sentinels for: all, but in a rare sample, at which Megatron would stop."""
        room = self.decoder_seq_length - 1
        for count, run in enumerate(runs):
            room -= len(run) + 1
            if room < 0 or count == len(self.sentinels):
                return runs[:count]
        return runs


def from_config(
    indexed: Any,
    documents: tuple[int, int] | None,
    num_samples: int | None,
    *,
    config: RunConfig,
    tokenizer: Any,
    seed: int,
    cache_folders: Sequence[str | os.PathLike] = (),
) -> T5Dataset:
    """The dataset "t5" of the registry; without --decoder-seq-length the decoder is as long as the encoder."""
    data = config.data
    return T5Dataset(
        indexed,
        documents,
        num_samples,
        seq_length=data.seq_length or 0,
        decoder_seq_length=data.decoder_seq_length or data.seq_length or 0,
        tokenizer=tokenizer,
        seed=seed,
        mask_prob=data.mask_prob,
        short_seq_prob=data.short_seq_prob,
        cache_folders=cache_folders,
    )


from_config.splits_documents = True  # type: ignore[attr-defined]
