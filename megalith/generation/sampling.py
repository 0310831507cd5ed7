"""From logits to the next token: penalties, then temperature, top-k, top-p, min-p, or greedy.

The token of a row is a function of its logits, its request, its key and its position. It does not depend on the other
rows, to the last bit: 128 neighbours are added in float32, and such sums one after the other in float64, because the
order in which torch adds up whole rows depends on how many there are.

Shapes: b rows, V tokens of the vocabulary, m blocks of n weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.common.errors import CheckpointError
from megalith.generation.params import SamplingParams
from megalith.generation.penalties import all_banned, apply_penalties
from megalith.layers import random

BLOCK = 128


@dataclasses.dataclass(eq=False, kw_only=True)
class SamplingState:
    """A request, as sampling sees it.

    key: of its random numbers. prompt_ids: what precedes the new tokens, for the penalties. first_position: position of
    the first new token in its sequence. banned_after: tokens that may not follow a token. new_ids: the new tokens so
    far, to which the caller appends.
    """

    params: SamplingParams
    key: int
    prompt_ids: Sequence[int]
    first_position: int
    banned_after: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    new_ids: list[int] = dataclasses.field(default_factory=list)

    def uniform(self, attempt: int = 0) -> float:
        """The random number in (0, 1) of its next token, and others where that one's draw is rejected."""
        key = random.key(self.key, attempt) if attempt else self.key
        return random.uniform_float(key, self.first_position + len(self.new_ids))


Sampler = Callable[[Tensor, Sequence[SamplingState]], Tensor]


def sample(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """The next token of each row, int64 [b], from logits [b, V]. Of equal logits greedy takes the lower token number.

    Raises CheckpointError where the largest logit of a row is NaN or infinite, ConfigError where all tokens of one are
    banned (penalties.check_tokens finds that earlier).
    """
    logits = apply_penalties(logits, states)
    rows_by_sampler: dict[Sampler, list[int]] = {}
    for row, state in enumerate(states):
        has_top_k = 0 < state.params.top_k < logits.shape[-1]
        sampler: Sampler = _draw_from_top_k if has_top_k else _draw_from_all
        rows_by_sampler.setdefault(_take_largest if state.params.greedy else sampler, []).append(row)
    if len(rows_by_sampler) == 1:
        (sampler,) = rows_by_sampler
        return sampler(logits, states)
    tokens = torch.empty(len(states), dtype=torch.int64, device=logits.device)
    for sampler, rows in rows_by_sampler.items():
        tokens[rows] = sampler(logits[rows], [states[row] for row in rows])
    return tokens


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """The natural logarithm of the probability of each of `tokens` [n] under logits [n, V], float32 [n]."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]


def top_logprobs_of(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` likeliest tokens under logits [n, V] (at most V), int64 [n, count], and the natural logarithms of
    their probabilities, float32 [n, count]; likeliest first, and of equal logits the lower token number.
    """
    count = min(count, logits.shape[-1])
    values, tokens = _top_k(logits, count)
    tokens = tokens.gather(-1, values.sort(dim=-1, descending=True, stable=True).indices[:, :count])
    return tokens, logits.float().log_softmax(dim=-1).gather(-1, tokens)


def _take_largest(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    tokens = logits.argmax(dim=-1)
    _check_largest(logits.gather(-1, tokens[:, None])[:, 0], states)
    return tokens


def _draw_from_all(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A token of each row; no request has top_k."""
    logits, largest = _blocks(logits).flatten(1), logits.amax(dim=-1, keepdim=True).float()
    _check_largest(largest[:, 0], states)
    temperatures = [state.params.temperature for state in states]
    if any(temperature != 1.0 for temperature in temperatures):
        # Subtract before dividing: a small temperature must neither overflow nor magnify what division rounds.
        logits = (logits - largest).div_(torch.tensor(temperatures, device=logits.device)[:, None])
    return _draw(logits.softmax(dim=-1).view(len(logits), -1, BLOCK), states)[:, 0]


def _draw_from_top_k(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """A token of each row; all requests have top_k."""
    top_k, device = [state.params.top_k for state in states], logits.device
    values, tokens = _top_k(logits, max(top_k))
    largest = values.amax(dim=-1, keepdim=True)
    _check_largest(largest[:, 0], states)
    if values.shape[-1] > min(top_k):
        kth = values.topk(max(top_k), dim=-1).values.gather(-1, torch.tensor(top_k, device=device)[:, None] - 1)
        values = values.masked_fill(values < kth, -math.inf)
    temperatures = torch.tensor([state.params.temperature for state in states], device=device)
    # Not softmax, which adds up a row in an order that depends on how many tokens other rows have kept.
    weights = (values - largest).div_(temperatures[:, None]).exp_()
    return tokens.gather(-1, _draw(weights[..., None], states))[:, 0]


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of logits [b, V], all tied with the k-th, and smaller ones where another row has more: float32
    [b, any], and their tokens, ascending.

    As k maxima of blocks are at least as large as the k-th largest maximum, the k-th largest logit is too: it is in a
    block whose maximum is. With k = 50 an eighth of 50,304 logits is left to be searched.
    """
    blocks = _blocks(logits)
    numbers = _top_k_indices(blocks.amax(dim=-1), k)
    rows = torch.arange(len(blocks), device=logits.device)
    indices = _top_k_indices(blocks[rows[:, None], numbers].flatten(1), k)
    tokens = (numbers.gather(-1, indices // BLOCK) * BLOCK + indices % BLOCK).sort(dim=-1).values
    return blocks.flatten(1).gather(-1, tokens), tokens


def _top_k_indices(x: Tensor, k: int) -> Tensor:
    """Where in x [b, n] the k largest of each row and all tied with the k-th are, int64 [b, any], in any order.

    A row with fewer of them than another has indices of smaller ones, too.
    """
    if k >= x.shape[-1]:
        return torch.arange(x.shape[-1], device=x.device).expand_as(x)
    values, indices = x.topk(k + 1, dim=-1)
    if not any(kth == following for kth, following in values[:, k - 1 :].tolist()):
        return indices[:, :k]
    return x.topk(int((x >= values[:, k - 1 : k]).sum(dim=-1).max()), dim=-1).indices


def _blocks(logits: Tensor) -> Tensor:
    """The logits [b, V] in blocks, float32 [b, m, BLOCK]; -inf fills the last."""
    logits, fill = logits.float(), -logits.shape[-1] % BLOCK
    return (F.pad(logits, (0, fill), value=-math.inf) if fill else logits).view(len(logits), -1, BLOCK)


def _draw(weights: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """Draw from weights [b, m, n] after top-p and min-p: indices int64 [b, 1] into the m x n weights of a row."""
    cumulative, min_p = _cumulative(weights), [state.params.min_p for state in states]
    top_p = [state.params.top_p_at(len(state.new_ids)) for state in states]
    limits = [p * total for p, total in zip(top_p, cumulative[:, -1].tolist())]
    if any(min_p):
        least = torch.tensor(min_p, device=weights.device)[:, None, None] * weights.amax(dim=(1, 2), keepdim=True)
        weights = weights.clone().ge_(least).mul_(weights)  # as floats: a mask of bools takes three times as long
        cumulative = _cumulative(weights)
    indices = _inverse_cdf(weights, cumulative, states)
    return indices if min(top_p) == 1.0 else _reject_beyond_top_p(indices, weights, limits, states)


def _cumulative(weights: Tensor) -> Tensor:
    """The mass of the first blocks of weights [b, m, n], float64 [b, m]."""
    return weights.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)


def _inverse_cdf(weights: Tensor, cumulative: Tensor, states: Sequence[SamplingState], attempt: int = 0) -> Tensor:
    """Draw an index of each row of weights [b, m, n] in proportion to them, int64 [b, 1]; never that of a 0.

    The first sum that reaches a target above 0 ends with a weight above 0.
    """
    uniforms = torch.tensor([[state.uniform(attempt)] for state in states], dtype=torch.float64, device=weights.device)
    target = uniforms * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target)
    if weights.shape[-1] == 1:
        return block
    inside = weights.take_along_dim(block[..., None], dim=1)[:, 0].cumsum(dim=-1, dtype=torch.float64)
    # From the end of the block. Its sum in float32 may be larger than that of `inside`.
    target = (inside[:, -1:] - (cumulative.gather(-1, block) - target)).clamp_(min=torch.finfo(torch.float64).tiny)
    return block * weights.shape[-1] + torch.searchsorted(inside, target)


def _reject_beyond_top_p(
    indices: Tensor, weights: Tensor, limits: Sequence[float], states: Sequence[SamplingState], attempt: int = 1
) -> Tensor:
    """The indices [b, 1] drawn from weights [b, m, n], or others where the mass of likelier ones exceeds the limit.

    Sampling without sorting (FlashInfer: Ye et al., 2025): as the tokens no likelier than a rejected one would be
    rejected too, the next is drawn from the likelier ones. A draw halves the mass that is to be rejected, on average.
    """
    pivots = weights.flatten(1).gather(-1, indices)[..., None]
    likelier = weights.clone().gt_(pivots).mul_(weights)
    cumulative = _cumulative(likelier)
    rejected = [row for row, mass in enumerate(cumulative[:, -1].tolist()) if mass > limits[row]]
    if not rejected:
        return indices
    likelier, limits, states = likelier[rejected], [limits[row] for row in rejected], [states[row] for row in rejected]
    drawn = _inverse_cdf(likelier, cumulative[rejected], states, attempt)
    indices[rejected] = _reject_beyond_top_p(drawn, likelier, limits, states, attempt + 1)
    return indices


def _check_largest(largest: Tensor, states: Sequence[SamplingState]) -> None:
    """Check the largest logit of each row, which is NaN where one is; see `sample`."""
    for value, state in zip(largest.tolist(), states):
        p = state.params
        if value == -math.inf and (p.logit_bias or p.min_new_tokens or state.banned_after):
            raise all_banned(p, state.banned_after)
        if not math.isfinite(value):
            raise not_numbers()


def not_numbers() -> CheckpointError:
    """The error where logits are NaN: no token and no log-probability could be computed from them."""
    cause = "its weights are damaged, or its training had diverged"
    return CheckpointError(f"the model's logits are not numbers (NaN or infinite): {cause}.")
