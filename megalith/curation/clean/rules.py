"""The rules of `megalith data clean` by name, each with its source; a rule is a function of one text.

A correction is text -> text. A test is Text -> what was found, or "" where the document stays. Rules are applied in the
order in which they are listed, and the first test that finds something drops the document: a list of rules does what
its rules do one after another.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from megalith.common.errors import ConfigError
from megalith.common.registry import load
from megalith.config.flags.text import unknown
from megalith.curation.words import Words, split_words

HERE = "megalith.curation.clean"
CORRECTIONS = {  # name -> address of text -> text
    "html": f"{HERE}.corrections:extract_html",
    "ftfy": f"{HERE}.corrections:fix_encoding",
    "unicode": f"{HERE}.corrections:normalize",
    "unicode_nfkc": f"{HERE}.corrections:normalize_compatible",
    "punctuation": f"{HERE}.corrections:standardize_punctuation",
    "newlines": f"{HERE}.corrections:squeeze_newlines",
    "general_cleaning": f"{HERE}.corrections:general_cleaning",
    "emails": f"{HERE}.corrections:mask_emails",
    "ip_addresses": f"{HERE}.corrections:mask_ip_addresses",
    "c4_terminal_punctuation": f"{HERE}.lines:terminal_punctuation",
    "c4_short_lines": f"{HERE}.lines:short_lines",
    "c4_javascript_lines": f"{HERE}.lines:javascript_lines",
    "c4_policy_lines": f"{HERE}.lines:policy_lines",
    "c4_citations": f"{HERE}.lines:citations",
}
TESTS = {  # name -> address of Text -> what was found, or ""
    "c4_sentences": f"{HERE}.c4:sentences",
    "c4_lorem_ipsum": f"{HERE}.c4:lorem_ipsum",
    "c4_curly_bracket": f"{HERE}.c4:curly_bracket",
    "gopher_word_count": f"{HERE}.gopher:word_count",
    "gopher_mean_word_length": f"{HERE}.gopher:mean_word_length",
    "gopher_hashes": f"{HERE}.gopher:hashes",
    "gopher_ellipses": f"{HERE}.gopher:ellipses",
    "gopher_bullet_lines": f"{HERE}.gopher:bullet_lines",
    "gopher_ellipsis_lines": f"{HERE}.gopher:ellipsis_lines",
    "gopher_alphabetic_words": f"{HERE}.gopher:alphabetic_words",
    "gopher_stop_words": f"{HERE}.gopher:stop_words",
    "gopher_duplicate_lines": f"{HERE}.repetition:duplicate_lines",
    "gopher_duplicate_line_characters": f"{HERE}.repetition:duplicate_line_characters",
    "gopher_duplicate_paragraphs": f"{HERE}.repetition:duplicate_paragraphs",
    "gopher_duplicate_paragraph_characters": f"{HERE}.repetition:duplicate_paragraph_characters",
    "gopher_top_ngrams": f"{HERE}.repetition:top_ngrams",
    "gopher_duplicate_ngrams": f"{HERE}.repetition:duplicate_ngrams",
    "fineweb_line_punctuation": f"{HERE}.fineweb:line_punctuation",
    "fineweb_duplicate_lines": f"{HERE}.fineweb:duplicate_lines",
    "fineweb_short_lines": f"{HERE}.fineweb:short_lines",
    "javascript": f"{HERE}.boilerplate:javascript",
    "cookies": f"{HERE}.boilerplate:cookies",
}
# Tests that need a setting; command.py makes them.
WITH_SETTINGS = ("language", "min_characters", "max_characters", "min_tokens", "max_tokens", "bad_words")
GROUPS = {  # name -> rules in the order of their source
    "gopher": [name for name in TESTS if name.startswith("gopher_")],
    "fineweb": [name for name in TESTS if name.startswith("fineweb_")],
    "c4": [name for name in (*CORRECTIONS, *TESTS) if name.startswith("c4_")],
    "openwebtext": ["ftfy", "general_cleaning", "language", "javascript", "min_characters"],
    "pii": ["emails", "ip_addresses"],
}


class Text:
    """A text and what several tests need of it, each computed once.

    count_tokens: the number of tokens of a text, where a tokenizer was given.
    """

    def __init__(self, text: str, count_tokens: Callable[[str], int] | None = None):
        """Nothing is computed yet."""
        self.text, self._count_tokens = text, count_tokens

    @functools.cached_property
    def words(self) -> list[str]:
        """What white space separates."""
        return self.text.split()

    @functools.cached_property
    def lines(self) -> list[str]:
        """Lines that hold something, without white space at their ends."""
        return [line for line in map(str.strip, self.text.split("\n")) if line]

    @functools.cached_property
    def paragraphs(self) -> list[str]:
        """What empty lines separate."""
        return [each for each in map(str.strip, self.text.split("\n\n")) if each]

    @functools.cached_property
    def hashed(self) -> Words:
        """Its words without case and punctuation, as numbers."""
        return split_words([self.text])

    @functools.cached_property
    def word_lengths(self) -> np.ndarray:
        """Characters of each word of `hashed`."""
        return self.hashed.ends - self.hashed.starts

    @functools.cached_property
    def length(self) -> int:
        """Its tokens; without a tokenizer, its words."""
        return self._count_tokens(self.text) if self._count_tokens else len(self.words)

    @property
    def unit(self) -> str:
        """What `length` counts."""
        return "tokens" if self._count_tokens else "words"


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule ready to be applied; exactly one of `correct` and `test` is there."""

    name: str
    correct: Callable[[str], str] | None = None
    test: Callable[[Text], str] | None = None


def expand(names: Sequence[str]) -> list[str]:
    """The names with groups replaced by their rules, each once. Raises ConfigError for an unknown or repeated name."""
    known = [*CORRECTIONS, *TESTS, *WITH_SETTINGS, *GROUPS]
    wrong = [unknown("rule", name, known, f"there are {', '.join(known)}") for name in names if name not in known]
    if wrong:
        raise ConfigError("\n".join(wrong))
    return list(dict.fromkeys(rule for name in names for rule in GROUPS.get(name, [name])))


def build_rule(name: str) -> Rule:
    """A rule without settings, by name."""
    if name in CORRECTIONS:
        return Rule(name, correct=load(f"rule {name!r}", CORRECTIONS[name]))
    return Rule(name, test=load(f"rule {name!r}", TESTS[name]))
