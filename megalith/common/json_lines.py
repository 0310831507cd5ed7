"""A line of JSON as people's tools write it: at orjson's speed, and by Python's json where orjson refuses."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import orjson

LONE_SURROGATE = re.compile("[\\ud800-\\udfff]")  # half a character: json reads \\ud800, no encoding can write it
DEPTH = 10_000  # levels; the 8 MiB stack of a thread holds several times as many


def parse(line: bytes | str) -> Any:
    """The value of a line. Raises ValueError that says why there is none.

    Python's json, with which most corpora are written, also has NaN, Infinity, numbers beyond a double, halves of
    surrogate pairs and more than 1024 levels. It costs time on such lines alone.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        pass
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, DEPTH))
    try:
        return json.loads(line if isinstance(line, str) else line.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"nested deeper than {DEPTH} levels") from None
    finally:
        sys.setrecursionlimit(limit)
