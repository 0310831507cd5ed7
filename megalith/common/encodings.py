"""What is told of text that is not UTF-8: how it becomes it."""

from __future__ import annotations

import re
from collections.abc import Iterable

REASON = "not UTF-8 (byte {at} is 0x{byte:02x})"
FOUND = re.compile(r"not UTF-8 \(byte (\d+) is 0x(\w\w)\)")


def reason(error: UnicodeDecodeError) -> str:
    """Why these bytes are no text, for a list of what cannot be used."""
    return REASON.format(at=error.start, byte=error.object[error.start])


def conversion(reasons: Iterable[str]) -> str:
    """The cure where one of these lines holds such a reason, a sentence and a blank; '' where none does."""
    found = next(filter(None, map(FOUND.search, reasons)), None)
    if found is None:
        return ""
    if found[1] == "0" and found[2] in ("ff", "fe"):  # the mark that UTF-16 begins with
        return "It looks like UTF-16: `iconv -f UTF-16 -t UTF-8 FILE > NEW` converts it. "
    return (
        "Convert it, as with `iconv -f LATIN1 -t UTF-8 FILE > NEW` where it is Latin-1 (CP1252 for that of Windows). "
    )
