"""The text of each token by itself, for answers that list tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from megalith.data.tokenizers.tokenizer import Tokenizer


def segments(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The texts of tokens, whose concatenation is the text where no character is divided among tokens.

    The bytes of a divided character are replacement characters, as Megatron shows them. A special token that is no part
    of a text, as Llama's BOS, is its name in the vocabulary.
    """
    return [_segment(tokenizer, before, token) for before, token in zip([None, *ids[:-1]], ids)]


def _segment(tokenizer: Tokenizer, before: int | None, token: int) -> str:
    """The text of a token after another, without which decoders strip its space."""
    text = None
    if before is not None:
        known, both = tokenizer.decode([before]), tokenizer.decode([before, token])
        text = both[len(known) :] if both.startswith(known) else None
    text = tokenizer.decode([token]) if text is None else text
    special = not text and token in (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad)
    return _names(tokenizer)[token] if special else text


@functools.lru_cache(maxsize=4)
def _names(tokenizer: Tokenizer) -> list[str]:
    return tokenizer.tokens()
