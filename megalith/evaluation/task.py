"""What an evaluation task is; those that there are: TASKS in options.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.evaluation.options import EvaluationOptions
from megalith.evaluation.result import Result
from megalith.evaluation.scoring import Sample


class Prepared(NamedTuple):
    """What a model is to read, and the Result of its scores: float64 [samples, 2], see Scorer."""

    samples: Sequence[Sample]
    conclude: Callable[[np.ndarray], Result]


class EvaluationTask(Protocol):
    """A task reads its files when it is made, before a model is loaded, and is prepared for each model's tokenizer."""

    def __init__(self, files: Sequence[str], options: EvaluationOptions):
        """Raises DataError for what cannot be read, ConfigError for options that cannot work."""

    def prepare(self, tokenizer: Tokenizer, seq_length: int) -> Prepared:
        """seq_length: the most tokens that are read at a time."""
        ...
