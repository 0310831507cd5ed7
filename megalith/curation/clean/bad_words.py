"""Lists of words that a text should not have."""

from __future__ import annotations

import pathlib
import re

from megalith.common.encodings import conversion_advice, reason
from megalith.common.errors import ConfigError, DataError, problem


def word_pattern(path: str, flag: str) -> re.Pattern[str]:
    """A pattern of the words of a file, one a line, as whole words and without case, the longest first.

    Raises DataError for a file that cannot be read, ConfigError for one without words; flag: the one that names it.
    """
    try:
        lines = pathlib.Path(path).read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        why, cure = reason(error), conversion_advice([reason(error)]).rstrip(". ")
        raise DataError(problem(flag, path, f"must be a UTF-8 file; it is {why}", cure)) from None
    except OSError as error:
        rule = f"must be a readable file ({error.strerror or error})"
        raise DataError(problem(flag, path, rule, "Correct the path")) from None
    words = sorted({line.strip() for line in lines if line.strip()}, key=lambda word: (-len(word), word))
    if not words:
        raise ConfigError(problem(flag, path, "must hold words, one a line", "Name another file"))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)
