"""Which tokens of a sample are masked: spans of whole words (BERT, T5), with every draw in Megatron's order."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable

import numpy as np

Random = np.random.RandomState


@dataclasses.dataclass(frozen=True)
class Masking:
    """How tokens are chosen.

    is_continuation [vocabulary] bool: whether a token continues the word before it ("##ing"). skipped: ids that are
    never masked ([CLS], [SEP]). mask_prob: largest fraction of the target length that is masked. max_ngram: most words
    of a span. geometric_lengths: the length of a span is geometric with p = 0.2 (T5, SpanBERT); without it the
    probability of n words is proportional to 1/n (BERT).
    """

    is_continuation: np.ndarray
    skipped: tuple[int, ...]
    mask_prob: float = 0.15
    max_ngram: int = 3
    geometric_lengths: bool = False

    def spans(
        self, tokens: np.ndarray, target_length: int, random: Random, mask: Callable[[int], None] | None = None
    ) -> list[list[int]]:
        """Positions of each masked span, in order. `mask` is called for each as it is chosen (BERT draws there)."""
        words = self._words(tokens)
        max_masked = min(self.mask_prob * target_length, max(1, round(len(tokens) * self.mask_prob)))
        order = np.arange(len(words))
        random.shuffle(order)
        probs = 1.0 / np.arange(1, self.max_ngram + 1)
        cumulative = np.cumsum(probs / probs.sum() / (probs / probs.sum()).sum())
        thresholds = (cumulative / cumulative[-1]).tolist()
        chosen: list[list[int]] = []
        covered: set[int] = set()
        for first in order.tolist():
            if len(covered) >= max_masked:
                break
            length = (
                min(random.geometric(0.2), self.max_ngram)
                if self.geometric_lengths
                else bisect.bisect_right(thresholds, random.random_sample()) + 1
            )
            for number in range(length, 0, -1):
                span = [position for word in words[first : first + number] for position in word]
                if len(covered) + len(span) <= max_masked:
                    break
            else:
                continue
            if not covered.isdisjoint(span):
                continue
            for position in span:
                if mask is not None:
                    mask(position)
            covered.update(span)
            chosen.append(span)
        return sorted(chosen)

    def _words(self, tokens: np.ndarray) -> list[list[int]]:
        """Positions of each whole word that may be masked; a piece without a word before it counts as one."""
        usable = np.flatnonzero(~np.isin(tokens, self.skipped))
        begins = ~self.is_continuation[tokens[usable]]
        begins[:1] = True
        return [word.tolist() for word in np.split(usable, np.flatnonzero(begins)[1:])] if usable.size else []


def continuation_pieces(tokenizer) -> np.ndarray:
    """Bool [vocabulary]: the pieces that continue a word, by WordPiece's prefix "##"."""
    return np.array([token.startswith("##") for token in tokenizer.tokens()])
