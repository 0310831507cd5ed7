"""Names with numbers in them, as tables of names write them: layers.{layer}.mlp.experts.{expert}.up.weight. No
torch.
"""

from __future__ import annotations

import functools
import re


@functools.cache
def compiled(pattern: str) -> re.Pattern[str]:
    """What matches a name of this pattern; its groups are the numbers, `layer` and `expert`, each once in it."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(pattern)))


def numbers(pattern: str, name: str) -> dict[str, int] | None:
    """{"layer": 3, "expert": 7}, as far as the pattern has them; None where the name is of another pattern."""
    match = compiled(pattern).fullmatch(name)
    return None if match is None else {word: int(number) for word, number in match.groupdict().items()}
