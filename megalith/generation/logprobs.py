"""Log-probabilities of tokens, and the likeliest tokens with theirs, as rows of numbers that processes can exchange."""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.generation.request import TopLogprobs
from megalith.generation.sampling import logprobs_of, not_numbers, top_logprobs_of


def measure(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Rows (logprob of the token, `count` likeliest tokens, their logprobs), float64 [n, 1 + 2 count].

    logits [n, V], tokens int64 [n]. Raises CheckpointError where one is NaN.
    """
    columns = [logprobs_of(logits, tokens)[:, None]]
    if columns[0].isnan().any():
        raise not_numbers()
    if count:
        columns += top_logprobs_of(logits, count)
    return torch.cat([column.double() for column in columns], dim=1)


def top_of(row: list[float], count: int) -> TopLogprobs:
    """The first `count` likeliest tokens of a row of `measure`, which may hold more."""
    held = len(row) // 2
    return tuple((int(token), logprob) for token, logprob in zip(row[1 : 1 + count], row[1 + held : 1 + held + count]))
