"""How a corpus is cut into training, validation and test documents: Megatron core's rounding, and that of Megatron before 2023."""

from __future__ import annotations

import itertools
import re

from megalith.common.errors import ConfigError, problem

NAMES = ("train", "valid", "test")


def shares(split: str) -> list[float]:
    """The three shares of a split such as "969, 30, 1", summing to 1; what is not given is 0."""
    try:
        numbers = [float(number) for number in re.findall(r"[.0-9]+", split)]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= len(NAMES) or "-" in split or sum(numbers) <= 0:
        rule = "one to three shares of training, validation and test, none negative, not all zero"
        raise ConfigError(problem("--split", split, rule, 'Give for example --split "969,30,1"'))
    numbers += [0.0] * (len(NAMES) - len(numbers))
    return [number / sum(numbers) for number in numbers]


def split_bounds(split: str, size: int, rounding: str = "core") -> list[tuple[int, int]]:
    """(begin, end) of training, validation and test among `size` documents; begin == end where a split has none.

    rounding: "core" rounds the running sum of shares; "legacy" rounds each share and takes the excess of the last off every bound.
    The two differ by a document here and there, so a corpus keeps the one that it was begun with.
    """
    fractions = shares(split)
    if rounding == "core":
        bounds = [round(bound * float(size)) for bound in itertools.accumulate(fractions, initial=0)]
    else:
        bounds = list(itertools.accumulate((round(fraction * float(size)) for fraction in fractions), initial=0))
        excess = bounds[-1] - size
        bounds[1:] = [bound - excess for bound in bounds[1:]]
    return list(itertools.pairwise(bounds))
