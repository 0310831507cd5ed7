"""How many documents may be left out before it is an error: a wrong key or a damaged file must not end in success."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.common.encodings import conversion_advice
from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words

# Crawls and dumps of 10^6 documents lose some in a thousand; a wrong key, a damaged file or one of another kind loses a
# whole file.
MAX_UNUSABLE = 0.1
LIMIT_FORMS = "a count (25) or a fraction (0.02 or 2%; 1.0 for all)"


def parse_limit(text: str) -> float:
    """The value of --max-unusable: an int counts documents, a float is a fraction of them.

    Raises ConfigError for anything else.
    """
    divisor = 100 if text.endswith("%") else 1
    try:
        value: float = int(text) if text.isdecimal() else float(text.removesuffix("%")) / divisor
    except ValueError:
        value = -1.0
    return check_limit(value, text)


def check_limit(value: float, found: object = None) -> float:
    """Return `value` where it is a count or a fraction, else raise ConfigError.

    found: what the message shows in place of `value`.
    """
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not count and not (isinstance(value, float) and 0 <= value <= 1):
        shown = value if found is None else found
        raise ConfigError(problem("--max-unusable", shown, f"must be {LIMIT_FORMS}", "Correct it"))
    return value


def require_usable(
    unusable: int, total: int, limit: float, examples: Sequence[str], what: str = "--input",
    cure: str = "Correct the input or --json-keys",
) -> None:  # fmt: skip
    """Raise DataError where more than `limit` (int: a count; float: a fraction) of `total` documents are unusable.

    examples: `file:line: reason` of some of them. what, cure: of the message.
    """
    if unusable <= (limit if isinstance(limit, int) else limit * total):
        return
    allowed = f"{limit} unusable documents" if isinstance(limit, int) else f"{limit:.4g} of its documents unusable"
    found = Words(f"{unusable} unusable documents of {total} ({unusable / total:.2%})")
    cure = f"{conversion_advice(examples)}{cure}, or allow them: --max-unusable {unusable}"
    lines = "".join(f"{line}\n" for line in ["documents that cannot be used:", *examples[:5]])
    raise DataError(lines + problem(what, found, f"may have at most {allowed} (--max-unusable)", cure))
