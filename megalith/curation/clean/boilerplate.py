"""Pages that are no text but a message of the site. Lengths are in tokens with --tokenizer-type, in words without."""

from __future__ import annotations

import re

from megalith.curation.clean.rules import Text

MAX_LENGTH = 256
CONSENT = re.compile(r"accept|consent|agree|browser|preferences", re.IGNORECASE)


def javascript(text: Text) -> str:
    """Fewer than 256 tokens, and the word javascript (Megatron-LM's remove_256_javascript)."""
    return _short(text) if "javascript" in text.text.lower() else ""


def cookies(text: Text) -> str:
    """Fewer than 256 tokens on cookies and a consent to them."""
    return _short(text) if "cookie" in text.text.lower() and CONSENT.search(text.text) else ""


def _short(text: Text) -> str:
    return f"{text.length} {text.unit}" if text.length < MAX_LENGTH else ""
