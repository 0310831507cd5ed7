"""What an evaluation gives: numbers, each with its definition beside it. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

CAP = 20.0  # exponents of perplexities are at most this, as in Megatron, so that an untrained model has a finite one


class Metric(NamedTuple):
    """A number and what it is: numbers of one name and another definition are not to be compared."""

    value: float
    definition: str


Metrics = dict[str, Metric]


@dataclasses.dataclass(frozen=True)
class Result:
    """The metrics of a model on a task; those of each source, where there are several; what is known of each example.

    notes: lines that the user should know. settings: what was chosen where the options left it open.
    """

    metrics: Metrics
    sources: dict[str, Metrics] = dataclasses.field(default_factory=dict)
    examples: Sequence[dict[str, Any]] = ()
    notes: Sequence[str] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


def perplexities(loss: float, tokens: int, words: int, text_bytes: int, split: str, how: str) -> Metrics:
    """Perplexity by token and by word, and what they are made of.

    loss: the sum of the losses of `tokens` predicted tokens, in nats. words: how many words are predicted; split: what
    separates words. text_bytes: of the text in UTF-8. how: the windows and the detokenizer, on which losses depend.
    """
    average = loss / tokens
    found = {
        "average loss": Metric(average, f"sum of the losses / predicted tokens, in nats; {how}"),
        "perplexity": Metric(bounded_exp(average), f"by token: exp(min({CAP:g}, average loss)); {how}"),
    }
    if words:
        ratio = tokens / words
        found["token ratio"] = Metric(ratio, f"predicted tokens / predicted words ({split})")
        definition = f"by word: exp(min({CAP:g}, average loss x token ratio)); {how}"
        found["adjusted perplexity"] = Metric(bounded_exp(average * ratio), definition)
    bits = loss / math.log(2) / text_bytes
    found["bits per byte"] = Metric(bits, f"sum of the losses / ln 2 / bytes of the text in the file, UTF-8; {how}")
    found["predicted tokens"] = Metric(tokens, "all tokens but those that have none before them")
    return found


def window_text(seq_length: int, stride: int, detokenizer: str | None) -> str:
    """How a text is read, as part of a definition."""
    cleaned = "" if detokenizer in (None, "none") else f", detokenizer {detokenizer}"
    return f"windows of {seq_length} tokens, {stride} apart{cleaned}"


def bounded_exp(exponent: float) -> float:
    """exp, of at most CAP."""
    return math.exp(min(CAP, exponent))
