"""How a corpus is split into training, validation and test documents, with the rounding of Megatron core or of 2022."""

from __future__ import annotations

import itertools
import re

from megalith.config.sections.data import split_fractions

SPLIT_NAMES = ("train", "valid", "test")


def normal_split(split: str) -> str:
    """A split as it is compared: "969, 30, 1" is "969,30,1"."""
    return ",".join(re.split(r"[,/\s]+", split.strip(" ,/")))


def split_bounds(split: str, size: int, rounding: str = "core") -> list[tuple[int, int]]:
    """(begin, end) of training, validation and test among `size` documents; begin == end where a split has none.

    rounding: "core" rounds the running sum of the fractions; "legacy", of Megatron before 2023, rounds each
    fraction and subtracts the excess of the last bound from every bound. The two differ by a document here and there,
    so a corpus keeps the one that it was begun with.
    """
    fractions = split_fractions(split)
    if rounding == "core":
        bounds = [round(bound * float(size)) for bound in itertools.accumulate(fractions, initial=0)]
    else:
        bounds = list(itertools.accumulate((round(fraction * float(size)) for fraction in fractions), initial=0))
        excess = bounds[-1] - size
        bounds[1:] = [bound - excess for bound in bounds[1:]]
    return list(itertools.pairwise(bounds))
