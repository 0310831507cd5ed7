"""Which tokens of a tokenizer have newlines and colons in their texts: the rules that end a text at a line's end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import flag
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.generation.params import GenerationParams

RULES = ("stop_on_eol", "stop_on_double_eol", "prevent_newline_after_colon")


@dataclasses.dataclass(frozen=True)
class NewlineTokens:
    """Tokens whose text has a newline (`any`), an empty line (`double`), or a newline at its start or its end.

    banned_after: for each token whose text ends with a colon the tokens that begin with a newline.
    """

    any: frozenset[int]
    double: frozenset[int]
    starting: frozenset[int]
    ending: frozenset[int]
    banned_after: Mapping[int, Sequence[int]]


@functools.lru_cache(maxsize=4)
def newline_tokens(tokenizer: Tokenizer, vocab_size: int) -> NewlineTokens:
    """The newlines among the first vocab_size tokens; decodes each of them, once for each tokenizer (6 us a token)."""
    texts = [tokenizer.decode([token]) for token in range(min(vocab_size, tokenizer.vocab_size))]
    starting = [token for token, text in enumerate(texts) if text.startswith("\n")]
    return NewlineTokens(
        any=frozenset(token for token, text in enumerate(texts) if "\n" in text),
        double=frozenset(token for token, text in enumerate(texts) if "\n\n" in text),
        starting=frozenset(starting),
        ending=frozenset(token for token, text in enumerate(texts) if text.endswith("\n")),
        banned_after={token: starting for token, text in enumerate(texts) if text.endswith(":")},
    )


def newlines_of(params: GenerationParams, tokenizer: Tokenizer | None, vocab_size: int) -> NewlineTokens | None:
    """The newlines that the options of a prompt need; None where they need none.

    Raises ConfigError where an option needs them and the tokenizer has none.
    """
    if not (given := [name for name in RULES if getattr(params, name)]):
        return None
    found = None if tokenizer is None else newline_tokens(tokenizer, vocab_size)
    if tokenizer is None or not found.any:
        which = "this model has no tokenizer" if tokenizer is None else (
            f"no token of {tokenizer.options.tokenizer_type} has a newline"
        )  # fmt: skip
        raise ConfigError(problem(flag(given[0]), True, f"must be off, because {which}", "Use stop or stop_token_ids"))
    return found
