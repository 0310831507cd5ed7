"""Messages on text that is not UTF-8, and how to convert it."""

from __future__ import annotations

import re
from collections.abc import Iterable

REASON = "not UTF-8 (byte {at} is 0x{byte:02x})"
FOUND = re.compile(r"not UTF-8 \(byte (\d+) is 0x(\w\w)\)")


def reason(error: UnicodeDecodeError) -> str:
    """Why these bytes are not text, for a list of documents that cannot be used."""
    return REASON.format(at=error.start, byte=error.object[error.start])


def conversion_advice(reasons: Iterable[str]) -> str:
    """How to convert the text where one of these lines has such a reason, with a space after it; '' where none has."""
    found = next(filter(None, map(FOUND.search, reasons)), None)
    if found is None:
        return ""
    if found[1] == "0" and found[2] in ("ff", "fe"):  # the mark that UTF-16 begins with
        return "It looks like UTF-16: `iconv -f UTF-16 -t UTF-8 FILE > NEW` converts it. "
    return (
        "Convert it, as with `iconv -f LATIN1 -t UTF-8 FILE > NEW` where it is Latin-1 (CP1252 for that of Windows). "
    )
