"""Which language a text is in, by py3langid, whose model comes with its package (Lui and Baldwin, 2012)."""

from __future__ import annotations

import functools
from typing import Any

from megalith.common.extras import require

SAMPLE = 1000  # characters that are looked at: the beginning, the middle and the end of a longer text


@functools.cache
def _identifier() -> Any:
    langid = require("py3langid.langid", "the language of a text", "py3langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def languages() -> list[str]:
    """ISO 639 codes of the languages that are known."""
    return sorted(_identifier().labels)


def identify(text: str) -> tuple[str, float]:
    """(ISO 639 code, probability) of the most probable language."""
    if len(text) > SAMPLE:
        third, middle = SAMPLE // 3, len(text) // 2
        text = f"{text[:third]}\n{text[middle : middle + third]}\n{text[-third:]}"
    return _identifier().classify(text)
