"""Patterns of parameter names, with numbers in them: layers.{layer}.mlp.experts.{expert}.up.weight. No torch."""

from __future__ import annotations

import functools
import re


@functools.cache
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; its groups are the numbers, `layer` and `expert`, each at most once."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(pattern)))


def match_numbers(pattern: str, name: str) -> dict[str, int] | None:
    """{"layer": 3, "expert": 7}, as far as the pattern has them; None where the name does not match it."""
    match = compile_pattern(pattern).fullmatch(name)
    return None if match is None else {group: int(number) for group, number in match.groupdict().items()}
