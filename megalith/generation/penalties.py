"""What changes logits by the tokens so far: logit bias, repetition, presence and frequency penalty, banned tokens.

In this order, which is that of transformers and of vLLM. A request without any of them keeps its logits to the bit.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words

if TYPE_CHECKING:
    from megalith.generation.params import SamplingParams
    from megalith.generation.sampling import SamplingState


def apply_penalties(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """The logits [b, V] themselves where no request changes them, else a copy in float32 with those rows changed.

    Repetition penalty r (Keskar et al., 2019, section 4.1): logits of tokens in the prompt and the new tokens are
    divided by r where they are positive and multiplied by it where they are negative. Presence and frequency penalty
    (OpenAI's): of each token among the new ones presence + frequency x (how often it occurs) is subtracted.
    """
    changed = [row for row, state in enumerate(states) if _changes_logits(state)]
    if changed:
        logits = logits.to(torch.float32, copy=True)
    for row in changed:
        _apply_penalties(logits[row], states[row])
    return logits


def check_tokens(params: SamplingParams, banned_after: Mapping[int, Sequence[int]], vocab_size: int) -> None:
    """Check a request's tokens against the vocabulary, so that none of its steps can fail.

    Raises DataError for tokens beyond the vocabulary, ConfigError where no token may be drawn. Unknown stop tokens are
    no error: they never come.
    """
    named = {"--logit-bias": params.logit_bias, "banned_after": itertools.chain(*banned_after.values())}
    for name, tokens in named.items():
        if wrong := [token for token in tokens if not 0 <= token < vocab_size]:
            rule = f"must name tokens among the {vocab_size} of the model's vocabulary, numbered from 0"
            raise DataError(problem(name, wrong[0], rule, "Use the tokenizer that it was trained with"))
    always = {token for token, bias in params.logit_bias.items() if bias == -math.inf}
    if params.min_new_tokens:
        always.update(token for token in params.stop_token_ids if 0 <= token < vocab_size)
    if any(len(always.union(tokens)) >= vocab_size for tokens in ((), *banned_after.values())):
        raise all_banned(params, banned_after)


def all_banned(params: SamplingParams, banned_after: Mapping[int, Sequence[int]]) -> ConfigError:
    """The error for a request whose options leave no token to draw."""
    used = {
        "--logit-bias": params.logit_bias, "--min-new-tokens": params.min_new_tokens, "banned_after": banned_after
    }  # fmt: skip
    names = " and ".join(name for name, value in used.items() if value)
    return ConfigError(problem(names, Words("none"), "must leave a token that can be drawn", "Ban fewer tokens"))


def _changes_logits(state: SamplingState) -> bool:
    p = state.params
    penalties = p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty
    return bool(p.logit_bias or penalties or _banned(state))


def _banned(state: SamplingState) -> Sequence[int]:
    """The tokens that may not be drawn next."""
    last = state.new_ids[-1:] or state.prompt_ids[-1:]
    banned = state.banned_after.get(last[0], ()) if last and state.banned_after else ()
    return (*banned, *state.params.stop_token_ids) if len(state.new_ids) < state.params.min_new_tokens else banned


def _apply_penalties(logits: Tensor, state: SamplingState) -> None:
    """Change one row, float32 [V], in place."""
    p, tensor = state.params, functools.partial(_tensor, device=logits.device)
    if p.logit_bias:
        logits[tensor([*p.logit_bias])] += tensor([*p.logit_bias.values()]).float()
    if p.repetition_penalty != 1.0 and (tokens := [*state.prompt_ids, *state.new_ids]):
        seen = tensor(tokens)  # one that occurs twice is written twice, with the same number
        old = logits[seen]
        logits[seen] = torch.where(old > 0.0, old / p.repetition_penalty, old * p.repetition_penalty)
    if (p.presence_penalty or p.frequency_penalty) and state.new_ids:
        counts = collections.Counter(state.new_ids)
        logits[tensor([*counts])] -= tensor([*counts.values()]) * p.frequency_penalty + p.presence_penalty
    if banned := [token for token in _banned(state) if 0 <= token < len(logits)]:
        logits[tensor(banned)] = -math.inf


def _tensor(numbers: list, device: torch.device) -> Tensor:
    """torch.tensor(numbers), in a fifth of its time."""
    return torch.from_numpy(np.array(numbers)).to(device)
