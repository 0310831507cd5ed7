"""What goes into an engine, requests, and what comes out, events."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from megalith.common.errors import MegalithError
from megalith.generation.params import SamplingParams

TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]  # (token, natural logarithm of its probability), likeliest first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue, or to answer, and how.

    index: which of several results of one call this is; each has its own random numbers. banned_after: tokens that may
    not follow a token.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    index: int = 0
    banned_after: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamRequest:
    """A prompt whose likeliest continuations are searched for; see `beam_search` for the options.

    num_samples: how many of them are wanted, at most beam_width.
    """

    prompt_ids: Sequence[int]
    beam_width: int
    num_samples: int
    max_new_tokens: int
    length_penalty: float = 1.0
    stop_token_ids: Sequence[int] = ()


class Hypothesis(NamedTuple):
    """A finished beam: its score, new tokens, their log-probabilities, and why it ended."""

    score: float
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Natural logarithms of the probabilities of a prompt's tokens after the first: one fewer than it has.

    top: the likeliest tokens at each of these positions; empty where none were requested.
    """

    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[TopLogprobs] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A new token of a request.

    token: None where no new token was requested (max_new_tokens 0). logprob: natural logarithm of the probability that
    the model gave the token, before penalties, temperature and filters, where requested; top_logprobs: the likeliest
    tokens with theirs. finish: why the request ended with this event, "stop", "length" or "error"; None where it
    continues. error: why it could not be continued; other requests are not concerned. prompt: with the first event of a
    request that asked for prompt_logprobs. beams: of a BeamRequest, whose only event has all of them, best first.
    """

    id: int
    token: int | None
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    finish: str | None = None
    prompt: PromptLogprobs | None = None
    beams: tuple[Hypothesis, ...] = ()
    error: MegalithError | None = None
