"""Open-domain question answering, its first half: how often the best k passages for a question hold an answer.

As Megatron's ICT-ZEROSHOT-NQ and RETRIEVER-EVAL count (Karpukhin et al., 2020, arXiv 2004.04906, section 5.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from megalith.common.errors import ConfigError, problem
from megalith.data.questions import Matcher, Question


@dataclasses.dataclass(frozen=True)
class Recall:
    """hits[k - 1]: questions with an answer among their k best passages. first: the place, from 0, of the first passage
    of each question that holds one; -1 where none does.
    """

    questions: int
    hits: tuple[int, ...]
    first: tuple[int, ...]

    def at(self, k: int) -> float:
        """Top-k accuracy: the share of questions."""
        return self.hits[min(k, len(self.hits)) - 1] / self.questions


def measure(
    questions: Sequence[Question], rows: np.ndarray, text_of: Callable[[int], str], match: str = "string"
) -> Recall:  # fmt: skip
    """Top-k accuracies of these results.

    rows: int [questions, k], the best first, -1 where there is none. text_of: from a row of the store to its text.
    """
    if not questions or len(rows) != len(questions):
        rule = "must be as many as there are results, one at least"
        raise ConfigError(problem("Questions", len(questions), rule, "Give those that were searched for"))
    holds, first = Matcher(match), []
    for question, found in zip(questions, rows.tolist()):
        places = (place for place, row in enumerate(found) if row >= 0 and holds(question.answers, text_of(row)))
        first.append(next(places, -1))
    counts = np.bincount([place for place in first if place >= 0], minlength=rows.shape[1])
    return Recall(len(questions), tuple(np.cumsum(counts).tolist()), tuple(first))
