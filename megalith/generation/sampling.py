"""From logits to the next token: greedy, temperature, top-k, top-p, with random numbers by row and position.

Row r of seed s at position p of its sequence draws f(s, r, p) and nothing else, so a text does not depend on the other
texts of its batch, on the size of the batch, or on the padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megalith.generation.params import SamplingParams
from megalith.layers import random

__all__ = ["SamplingParams", "SamplingState", "sample"]


def row_keys(seed: int, rows: list[int], device: torch.device) -> Tensor:
    """The key of each row's random numbers, int64 [b]."""
    return torch.tensor([random.key(seed, "sample", row) for row in rows], device=device)


def _sample_one(logits: Tensor, params: SamplingParams, keys: Tensor, positions: Tensor, nth: int = 0) -> Tensor:
    """The next token of each row, int64 [b].

    logits [b, V]; keys int64 [b] from `row_keys`; positions int64 [b], of each row's new token in its sequence; nth:
    how many new tokens came before it. Of equal logits the lower token number wins, on every device.
    """
    if params.greedy:
        return logits.argmax(dim=-1)
    weights, order = filtered_probs(logits, params, nth)
    total = weights.cumsum(dim=-1, dtype=torch.float64)
    drawn = random.uniform(keys, positions)[:, None] * total[:, -1:]
    index = torch.searchsorted(total, drawn, right=True).clamp(max=logits.shape[-1] - 1)
    return (index if order is None else order.gather(-1, index))[:, 0]


def filtered_probs(logits: Tensor, params: SamplingParams, nth: int = 0) -> tuple[Tensor, Tensor | None]:
    """Probabilities, not normalised, float32 [b, any], and their tokens; None where column i is that of token i."""
    scores = logits.float()
    # Subtract before dividing: a small temperature must not overflow.
    scores = (scores - scores.amax(dim=-1, keepdim=True)).div_(params.temperature)
    if 0 < params.top_k < scores.shape[-1]:
        kth = scores.topk(params.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    weights, p = scores.softmax(dim=-1), params.top_p_at(nth)
    if not params.top_p or p == 1.0:  # a p that has decayed to 0 keeps the likeliest token, and is not off
        return weights, None
    # All tokens below this probability together have less than 1 - p, so none of them is kept, and usually only a few
    # are left to be sorted.
    count = int((weights >= 0.5 * (1.0 - p) / weights.shape[-1]).sum(dim=-1).max())
    tokens = None
    if count < weights.shape[-1] // 3:
        tokens = weights.topk(count, dim=-1).indices.sort(dim=-1).values
        weights = weights.gather(-1, tokens)
    weights, order = weights.sort(dim=-1, descending=True, stable=True)  # stable: equal ones by token number
    before = weights.cumsum(dim=-1, dtype=torch.float64) - weights
    return weights.masked_fill(before > p, 0.0), order if tokens is None else tokens.gather(-1, order)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The natural logarithm of the probability of each of `tokens` [b] under logits [b, V], float32 [b]."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]


@dataclasses.dataclass(eq=False, kw_only=True)
class SamplingState:
    params: SamplingParams
    key: int
    prompt_ids: Sequence[int]
    first_position: int
    banned_after: Mapping[int, Sequence[int]]
    new_ids: list[int] = dataclasses.field(default_factory=list)


def sample(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    found = []
    for row, state in zip(logits, states):
        row, params, last = row.clone(), state.params, [*state.prompt_ids, *state.new_ids][-1:]
        for token, bias in params.logit_bias.items():
            row[token] += bias
        row[list(state.banned_after.get(last[0], ()) if last else ())] = float("-inf")
        if len(state.new_ids) < params.min_new_tokens:
            row[list(params.stop_token_ids)] = float("-inf")
        key, position = torch.tensor([[state.key], [state.first_position + len(state.new_ids)]], device=logits.device)
        found.append(_sample_one(row[None], state.params, key, position, len(state.new_ids)))
    return torch.cat(found)


def top_logprobs_of(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.float().log_softmax(dim=-1).topk(count, dim=-1)
    return ids, values
