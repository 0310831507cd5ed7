"""Gopher's rules on quality (Rae et al., 2021, appendix A.1.1), words being what white space separates."""

from __future__ import annotations

from megalith.curation.clean.rules import Text

MIN_WORDS, MAX_WORDS = 50, 100_000
MIN_MEAN_LENGTH, MAX_MEAN_LENGTH = 3, 10
MAX_SYMBOLS = 0.1  # of words
MAX_BULLETS, MAX_ELLIPSES = 0.9, 0.3  # of lines
MIN_ALPHABETIC = 0.8  # of words
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
MIN_STOP_WORDS = 2
BULLETS = ("•", "-", "*", "‣", "◦", "▪", "·", "●")
ELLIPSES = ("...", "…")


def word_count(text: Text) -> str:
    """Fewer than 50 words, or more than 100,000."""
    count = len(text.words)
    return "" if MIN_WORDS <= count <= MAX_WORDS else f"{count} words"


def mean_word_length(text: Text) -> str:
    """Words of fewer than 3 or more than 10 characters in the mean."""
    if not text.words:
        return "no words"
    mean = sum(map(len, text.words)) / len(text.words)
    return "" if MIN_MEAN_LENGTH <= mean <= MAX_MEAN_LENGTH else f"{mean:.3g} characters a word"


def hashes(text: Text) -> str:
    """More than one hash sign in ten words."""
    return _symbols(text, ("#",), "hash signs")


def ellipses(text: Text) -> str:
    """More than one ellipsis in ten words."""
    return _symbols(text, ELLIPSES, "ellipses")


def _symbols(text: Text, symbols: tuple[str, ...], name: str) -> str:
    count = sum(map(text.text.count, symbols))
    return f"{count} {name} in {len(text.words)} words" if count > MAX_SYMBOLS * len(text.words) else ""


def bullet_lines(text: Text) -> str:
    """More than 90 % of the lines start with a bullet point."""
    return _share(sum(line.startswith(BULLETS) for line in text.lines), len(text.lines), MAX_BULLETS)


def ellipsis_lines(text: Text) -> str:
    """More than 30 % of the lines end with an ellipsis."""
    return _share(sum(line.endswith(ELLIPSES) for line in text.lines), len(text.lines), MAX_ELLIPSES)


def _share(count: int, total: int, most: float) -> str:
    return f"{count} of {total} lines" if count > most * total else ""


def alphabetic_words(text: Text) -> str:
    """Fewer than 80 % of the words have a letter."""
    count = sum(word.isalpha() or any(map(str.isalpha, word)) for word in text.words)
    return "" if count >= MIN_ALPHABETIC * len(text.words) else f"{count} of {len(text.words)} words have letters"


def stop_words(text: Text) -> str:
    """Fewer than two different ones of: the, be, to, of, and, that, have, with. (It is a rule for English.)"""
    found = STOP_WORDS.intersection(map(str.lower, text.words))
    return "" if len(found) >= MIN_STOP_WORDS else f"{len(found)} of the stop words"
