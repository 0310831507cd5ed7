"""How many documents a job may leave out before it is an error: a wrong key or a damaged file must not end in success."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.common.encodings import conversion
from megalith.common.errors import ConfigError, DataError, problem

# Crawls and dumps of 10^6 documents lose some in a thousand; a wrong key, a foreign file or a damaged one loses a file's worth.
MAX_UNUSABLE = 0.1
RULE = "a count (25) or a share (0.02 or 2%; 1.0 for all)"


def limit_of(text: str) -> float:
    """The value of --max-unusable: an int counts documents, a float is a share of them. ConfigError for anything else."""
    try:
        value: float = (
            int(text) if text.isdecimal() else float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        )
    except ValueError:
        value = -1.0
    return check_limit(value, text)


def check_limit(value: float, found: object = None) -> float:
    """`value` where it is a count or a share, else ConfigError."""
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not count and not (isinstance(value, float) and 0 <= value <= 1):
        raise ConfigError(problem("--max-unusable", value if found is None else found, f"it is {RULE}", "Correct it"))
    return value


def require_usable(unusable: int, total: int, limit: float, listed: Sequence[str]) -> None:
    """Raise DataError where more than `limit` (int: a count; float: a share) of `total` documents are unusable.

    listed: `file:line: reason` of some of them.
    """
    if unusable <= (limit if isinstance(limit, int) else limit * total):
        return
    allowed = f"{limit} documents" if isinstance(limit, int) else f"{limit:.4g} of all"
    found = f"{unusable} unusable documents of {total} ({unusable / total:.2%})"
    cure = f"{conversion(listed)}Correct the input or --json-keys, or allow them: --max-unusable {unusable}"
    lines = "".join(f"{line}\n" for line in ["documents that cannot be used:", *listed[:5]])
    raise DataError(lines + problem("--input", found, f"--max-unusable is {allowed}", cure))
