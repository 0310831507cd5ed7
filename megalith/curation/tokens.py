"""How many tokens a text has, by the user's tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from megalith.data.tokenizers.tokenizer import TokenizerOptions, build_tokenizer


def token_counter(options: TokenizerOptions) -> Callable[[str], int]:
    """A function that counts the tokens of a text."""
    tokenizer = build_tokenizer(**dataclasses.asdict(options))
    return lambda text: len(tokenizer.encode(text))


def tokenizer_files(options: TokenizerOptions | None) -> list[str]:
    """The files that a tokenizer is made from."""
    names = (options.vocab_file, options.merge_file, options.tokenizer_model) if options else ()
    return [name for name in names if name and os.path.isfile(name)]
