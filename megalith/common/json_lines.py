"""A line of JSON as people's tools write it: at orjson's speed, and by Python's json where orjson refuses."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import orjson

from megalith.common import encodings

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


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError that says why there is none: not UTF-8, not JSON, not an object."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(encodings.reason(error)) from error
    if line.lstrip().startswith(b"["):
        raise ValueError("a JSON list; one object a line is needed (jq -c '.[]' makes lines of a list)")
    try:
        record = parse(line)
    except ValueError as error:
        raise ValueError(f"malformed JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {type(record).__name__}")
    return record
