"""FineWeb's own rules (Penedo et al., 2024, section 3.5)."""

from __future__ import annotations

from megalith.curation.clean.lines import TERMINAL
from megalith.curation.clean.repetition import duplicates
from megalith.curation.clean.rules import Text

MIN_PUNCTUATED = 0.12  # of lines; at most that is too few
MAX_DUPLICATE_CHARACTERS = 0.1  # at least that is too many
MAX_SHORT, SHORT = 0.67, 30  # of lines, at least that is too many; characters of a short line


def line_punctuation(text: Text) -> str:
    """At most 12 % of the lines end in a terminal punctuation mark."""
    count = sum(line.endswith(TERMINAL) for line in text.lines)
    return "" if count > MIN_PUNCTUATED * len(text.lines) else f"{count} of {len(text.lines)} lines are punctuated"


def duplicate_lines(text: Text) -> str:
    """At least 10 % of the characters are in lines that occurred before."""
    _, characters = duplicates(text.lines)
    share = characters / max(1, len(text.text))
    return f"{share:.1%} in repeated lines" if share >= MAX_DUPLICATE_CHARACTERS else ""


def short_lines(text: Text) -> str:
    """At least 67 % of the lines have fewer than 30 characters."""
    count = sum(len(line) < SHORT for line in text.lines)
    return f"{count} of {len(text.lines)} lines are short" if count >= MAX_SHORT * len(text.lines) else ""
