"""How toxic texts are: what a scorer is, a list of words, and the check of what any scorer gives.

A remote service, or any other judge, is a class of your own, `--scorer my_module:MyScorer` (docs/detoxify.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.curation.clean.bad_words import word_pattern
from megalith.workflows.detoxify.options import SCORERS, DetoxifyOptions


class Scorer(Protocol):
    """Made once, before the first text is read; called with some texts, none of which is blank."""

    def __init__(self, options: DetoxifyOptions):
        """Raises ConfigError or DataError for a path or a label that cannot work."""

    def __call__(self, texts: Sequence[str]) -> Sequence[float | None]:
        """For each text its toxicity from 0 to 1; None where it could not be scored."""
        ...


class WordList(Scorer):
    """The words of a file, one a line, as whole words and without case: 1 - 2^-n for n of them in a text.

    So one word gives 0.5, which is toxic at the usual threshold, and more words give more.
    """

    def __init__(self, options: DetoxifyOptions):
        self.pattern = word_pattern(required_path(options, "a file of words, one a line"), "--scorer-path")

    def __call__(self, texts: Sequence[str]) -> list[float | None]:
        """Scores of the texts."""
        return [1.0 - 0.5 ** sum(1 for _ in self.pattern.finditer(text)) for text in texts]


def required_path(options: DetoxifyOptions, what: str) -> str:
    """--scorer-path. Raises ConfigError where it is not given; what: that it must name."""
    if options.scorer_path is None:
        rule = f"must name {what}, for --scorer {options.scorer}"
        raise ConfigError(problem("--scorer-path", Words("nothing"), rule, "Add --scorer-path PATH"))
    return options.scorer_path


def build_scorer(options: DetoxifyOptions) -> Scorer:
    """The scorer that --scorer names."""
    return SCORERS.find(options.scorer)(options)


def score(scorer: Scorer, texts: Sequence[str], name: str) -> list[float | None]:
    """Scores of texts, None for blank ones. Raises DataError where the scorer called `name` gives no such numbers."""
    numbers = [number for number, text in enumerate(texts) if text.strip()]
    found = list(scorer([texts[number] for number in numbers])) if numbers else []
    if len(found) != len(numbers):
        rule = f"must give a score for each of {len(numbers)} texts"
        raise DataError(problem(f"--scorer {name}", Words(f"{len(found)} scores"), rule, "Correct the scorer"))
    scores: list[float | None] = [None] * len(texts)
    for number, value in zip(numbers, found):
        if value is not None and not (math.isfinite(value) and 0.0 <= value <= 1.0):
            rule = f"must give numbers from 0 to 1, or None where there is none, also for {texts[number][:40]!r}"
            raise DataError(problem(f"--scorer {name}", value, rule, "Correct the scorer, or its model"))
        scores[number] = None if value is None else float(value)
    return scores
