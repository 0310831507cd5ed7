"""Which tokens of a sample are masked: whole words, in runs of some words (BERT, T5), with every draw in Megatron's order."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

import numpy as np

Random = np.random.RandomState


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are chosen.

    continues [vocabulary] bool: whether a token goes on the word before it ("##ing"). skipped: ids that are never masked ([CLS], [SEP]).
    share: of the target length, at most. longest: words of a run at most. geometric: length of a run drawn with p = 0.2 (T5, SpanBERT),
    else with p proportional to 1/n (BERT).
    """

    continues: np.ndarray
    skipped: tuple[int, ...]
    share: float = 0.15
    longest: int = 3
    geometric: bool = False

    def runs(
        self, tokens: np.ndarray, target_length: int, random: Random, mask: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Positions of each masked run, in order. `mask` is called for every position as it is chosen (BERT draws there)."""
        words = self._words(tokens)
        most = min(self.share * target_length, max(1, round(len(tokens) * self.share)))
        order = np.arange(len(words))
        random.shuffle(order)
        chances = 1.0 / np.arange(1, self.longest + 1)
        chances = np.cumsum(chances / chances.sum() / (chances / chances.sum()).sum())
        steps = (chances / chances[-1]).tolist()
        chosen: list[list[int]] = []
        covered: set[int] = set()
        for first in order.tolist():
            if len(covered) >= most:
                break
            length = (
                min(random.geometric(0.2), self.longest)
                if self.geometric
                else bisect.bisect_right(steps, random.random_sample()) + 1
            )
            for number in range(length, 0, -1):
                run = [place for word in words[first : first + number] for place in word]
                if len(covered) + len(run) <= most:
                    break
            else:
                continue
            if not covered.isdisjoint(run):
                continue
            for place in run:
                if mask is not None:
                    mask(place)
            covered.update(run)
            chosen.append(run)
        return sorted(chosen)

    def _words(self, tokens: np.ndarray) -> list[list[int]]:
        """Positions of each whole word that may be masked; a piece without a word before it is one."""
        usable = np.flatnonzero(~np.isin(tokens, self.skipped))
        begins = ~self.continues[tokens[usable]]
        begins[:1] = True
        return [part.tolist() for part in np.split(usable, np.flatnonzero(begins)[1:])] if usable.size else []


def continuing(tokenizer) -> np.ndarray:
    """Bool [vocabulary]: the pieces that go on a word, by WordPiece's sign "##"."""
    return np.array([token.startswith("##") for token in tokenizer.tokens()])
