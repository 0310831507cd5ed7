"""C4's rules on lines (Raffel et al., 2020, section 2.2): a text without the lines that are no prose.

A document of which no line stays is dropped by the rule that took the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable

TERMINAL = (".", "!", "?", '"', "”", "。", "！", "？", "…")
MIN_WORDS = 5
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
CITATION = re.compile(r"\[(?:\d{1,3}|edit|citation needed)\]")


def _lines_that(keep: Callable[[str], bool], text: str) -> str:
    return "\n".join(line for line in text.split("\n") if not line.strip() or keep(line.strip())).strip("\n")


def terminal_punctuation(text: str) -> str:
    """Only lines that end in a terminal punctuation mark."""
    return _lines_that(lambda line: line.endswith(TERMINAL), text)


def short_lines(text: str) -> str:
    """Only lines of at least 5 words."""
    return _lines_that(lambda line: len(line.split(None, MIN_WORDS - 1)) == MIN_WORDS, text)


def javascript_lines(text: str) -> str:
    """No line that has the word Javascript: "Javascript must be enabled"."""
    return _lines_that(lambda line: "javascript" not in line.lower(), text)


def policy_lines(text: str) -> str:
    """No line on terms of use, privacy or cookies."""
    return _lines_that(lambda line: not any(words in line.lower() for words in POLICIES), text)


def citations(text: str) -> str:
    """No marks of Wikipedia: [1], [edit], [citation needed]."""
    return CITATION.sub("", text) if "[" in text else text
