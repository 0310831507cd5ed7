"""C4's rules on pages (Raffel et al., 2020, section 2.2)."""

from __future__ import annotations

import re

from megalith.curation.clean.rules import Text

MIN_SENTENCES = 3
SENTENCE_END = re.compile(r"[.!?]['\"”’)]*(?=\s|$)|[。！？]")


def sentences(text: Text) -> str:
    """Fewer than 3 sentences."""
    count = 0
    for count, _ in enumerate(SENTENCE_END.finditer(text.text), 1):
        if count == MIN_SENTENCES:
            return ""
    return f"{count} sentences"


def lorem_ipsum(text: Text) -> str:
    """A page that holds the text of the printers."""
    return "lorem ipsum" if "lorem ipsum" in text.text.lower() else ""


def curly_bracket(text: Text) -> str:
    """A page with a curly bracket, which is code more often than prose."""
    return "{" if "{" in text.text else ""
