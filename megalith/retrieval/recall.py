"""Open-domain question answering, its first half: how often the best k passages for a question hold an answer.

As Megatron's ICT-ZEROSHOT-NQ and RETRIEVER-EVAL count (Karpukhin et al., 2020, arXiv 2004.04906, section 5.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from megalith.common.errors import ConfigError, problem
from megalith.data.questions import Matcher, Question

REPORTED = (1, 5, 20, 100)


class Index(Protocol):
    """An ExactIndex or a FaissIndex."""

    def search(self, queries: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]: ...


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

    def lines(self) -> list[str]:
        """A line for each k that is usual."""
        ks = sorted({k for k in REPORTED if k < len(self.hits)} | {len(self.hits)})
        return [f"top-{k}: {100 * self.at(k):.2f} % ({self.hits[k - 1]} of {self.questions})" for k in ks]


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


def retrieve(
    embedder: Any, index: Index, questions: Sequence[Question], k: int = 100
) -> tuple[np.ndarray, np.ndarray] | None:  # fmt: skip
    """(scores, rows) of the k best for each question; None on processes without the end of the model."""
    vectors = embedder.queries([question.text for question in questions])
    return None if vectors is None else index.search(vectors, k)
