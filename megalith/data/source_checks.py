"""Checks of a corpus before the first step: ids beyond the vocabulary, sentences as documents, no end-of-document."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.config.sections.data import DataConfig
from megalith.data.sources import Source

PROBE_TOKENS = 4096  # the last tokens of a sequence, which are read


def check_not_empty(sources: Sequence[Source], opened: Sequence[Any]) -> None:
    """Raise DataError for an empty dataset whose weight others would get, or where all are empty; else warn of it."""
    empty = [(source, indexed) for source, indexed in zip(sources, opened) if not indexed.num_tokens]
    named = [f"{source.prefix} ({indexed.num_documents} documents)" for source, indexed in empty]
    weighed = [f"{source.prefix} (weight {source.weight:g})" for source, _ in empty if source.weight is not None]
    cure = "Make it again from text, or leave it out"
    if weighed:
        rule = "must hold tokens, because the weight of an empty one would go to the others"
        raise DataError(problem("The datasets of a blend", Words(f"no tokens in {', '.join(weighed)}"), rule, cure))
    if empty and len(empty) == len(sources):
        found = Words(f"none in {', '.join(named)}")
        raise DataError(problem("The datasets", found, "must hold tokens", cure))
    if empty:
        warnings.warn(f"no tokens in {', '.join(named)}, so no samples come from there", stacklevel=2)


def check_source(indexed: Any, tokenizer: Any, data: DataConfig, whole_documents: bool, probes: int = 64) -> Any:
    """Return `indexed` after reading `probes` of its sequences; DataError where it does not fit this tokenizer.

    whole_documents: the dataset takes each sequence for a document, as GPT does.
    """
    if indexed.dtype.kind not in "iu":
        raise DataError(f"{indexed.prefix} holds {indexed.dtype}, which are no token ids")
    if whole_documents and len(indexed) > 1.05 * indexed.num_documents:
        warnings.warn(
            f"{indexed.prefix} has {len(indexed)} sequences in {indexed.num_documents} documents: it looks split into "
            f"sentences, and a GPT dataset would shuffle them; preprocess without --split-sentences",
            stacklevel=2,
        )
    if tokenizer is None or not len(indexed):
        return indexed
    eod, seen = getattr(tokenizer, "eod", None), False
    for number in np.unique(np.linspace(0, len(indexed) - 1, probes).astype(np.int64)).tolist():
        sequence = indexed.get(number)[-PROBE_TOKENS:]
        if not sequence.size:
            continue
        seen = seen or int(sequence[-1]) == eod
        if sequence.max() >= tokenizer.vocab_size or sequence.min() < 0:
            wrong = sequence.min() if sequence.min() < 0 else sequence.max()
            name = getattr(getattr(tokenizer, "options", None), "tokenizer_type", type(tokenizer).__name__)
            raise DataError(
                f"{indexed.prefix}, sequence {number} holds token {wrong}, but {name} has ids 0 to "
                f"{tokenizer.vocab_size - 1}; the data was made with another tokenizer. Name that one, or preprocess "
                f"anew"
            )
    if not seen and eod is not None and (data.reset_position_ids or data.reset_attention_mask or data.eod_mask_loss):
        warnings.warn(
            f"{indexed.prefix} does not end its documents with token {eod}, so --reset-position-ids, "
            f"--reset-attention-mask and --eod-mask-loss do nothing on it; preprocess with --append-eod",
            stacklevel=2,
        )
    return indexed
