"""Whether a source is named by an address or by a path."""

from __future__ import annotations

import os
import re


def is_url(source: str | os.PathLike) -> bool:
    """Whether a source is an http(s) address and not a path."""
    return re.match(r"https?://", os.fspath(source)) is not None
