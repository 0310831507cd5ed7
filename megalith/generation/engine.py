"""Requests of one model, worked on together: they join and leave between steps.

    engine = Engine(model, max_batch_size=8)
    number = engine.add(Request(prompt_ids=[1, 2, 3], params=SamplingParams(seed=1)))
    while engine.busy:
        for event in engine.step():
            ...

A result depends on its own request alone: not on who else is there, in what order or number. What a row reads, and in
what order it is added up, is fixed by its own length (cache.py), and matrix products are made of numbers of rows whose
results are the same (runner.py). Seen to hold bit for bit on CPUs in float32 with PyTorch's MKL, where layers are
multiples of 32 wide (elsewhere a vector's last channels are computed by other instructions; results then agree to
rounding). An engine for one request at a time has no others to be alike to and takes the faster products of one row,
equal to those to rounding.
"""

from __future__ import annotations

import collections
import dataclasses
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, DataError, problem
from megalith.generation.cache import KVCache, Piece
from megalith.generation.model import TextModel, check_length
from megalith.generation.runner import Runner
from megalith.generation.sampling import SamplingParams, choose, logprobs_of
from megalith.layers import random


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to continue, or to answer, and how. index: which of several results of one call this is; each draws numbers
    of its own.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    index: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A new token of a request.

    logprob: natural logarithm of the probability that the model gave the token, before temperature and filters, where
    asked for. finish: why the request ended with it, "stop" or "length"; None where it goes on.
    """

    id: int
    token: int
    logprob: float | None = None
    finish: str | None = None


@dataclasses.dataclass(eq=False)
class _Running:
    """A request at work: how many tokens it has, the newest of them, and the key of its random numbers."""

    id: int
    request: Request
    key: int
    token: int = 0
    count: int = 0

    def place(self, source: bool) -> int:
        """Where its next token will stand: after the prompt, or after a decoder's start token."""
        return (1 if source else len(self.request.prompt_ids)) + self.count


class Engine:
    """Continuous batching of one model's requests on a cache whose memory is bounded from the start.

    Several engines may work on one model, which is not touched. Not for several threads at once.
    """

    def __init__(
        self, model: TextModel | nn.Module, *, max_batch_size: int = 32, max_length: int | None = None,
        max_cache_bytes: int | None = None, compile: bool = False, batch_invariant: bool = True,
    ):  # fmt: skip
        """Reserve the cache.

        max_batch_size: requests worked on at one time; others wait. max_length: most tokens of a request, prompt and
        new ones (of an encoder-decoder: of either); by default the model's max_position_embeddings. max_cache_bytes:
        most memory for keys and values; fewer requests are then worked on at one time. compile: steps run as one
        compiled graph of fixed shapes, a CUDA graph on accelerators; compiling takes a minute, once. batch_invariant:
        see above; without it one request alone is a third faster. Raises ConfigError where no request fits.
        """
        self.text = TextModel.of(model)
        c, length = self.text.config, max_length
        if length is None:
            length = c.max_position_embeddings
        if length is None:
            rule = "positions of this model have no end, so the length of the cache must be said"
            cure = "Give the most tokens that prompt and text may have together"
            raise ConfigError(problem("max_length", max_length, rule, cure))
        for name, value in (("max_batch_size", max_batch_size), ("max_length", length)):
            if value < 1:
                raise ConfigError(problem(name, value, "it must be at least 1", "Give 1 or more"))
        self.pair, self.max_length = bool(c.decoder_layers), length
        one = KVCache(self.text.model, 0, length, length if self.pair else 0).bytes_per_row
        if max_cache_bytes is not None:
            if max_cache_bytes < one:
                rule = f"the cache of one request of {length} tokens takes {one} bytes"
                raise ConfigError(problem("max_cache_bytes", max_cache_bytes, rule, "Give more, or lower max_length"))
            max_batch_size = min(max_batch_size, max_cache_bytes // one)
        self.max_batch_size = max_batch_size
        self.cache = KVCache(self.text.model, max_batch_size, length, length if self.pair else 0)
        self.runner = Runner(self.text.model, self.cache, exact=batch_invariant, compile=compile)
        self.waiting: collections.deque[_Running] = collections.deque()
        self.running: list[_Running] = []  # in the order of the cache's rows
        self.events: list[Event] = []  # that no step has given back yet, because an error ended it
        self.added = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self.events)

    def add(self, request: Request) -> int:
        """Queue a request; its id. It waits while no row is free, and is refused where it could never fit.

        Raises ConfigError for a request too long, DataError for unknown tokens.
        """
        prompt, new, c = len(request.prompt_ids), request.params.max_new_tokens, self.text.config
        if not prompt:
            rule = "a text starts from at least one token"
            raise ConfigError(problem("prompt_ids", "none", rule, "Give the end-of-document token"))
        if wrong := [i for i in request.prompt_ids if not 0 <= i < c.vocab_size]:
            rule = f"the model's vocabulary has {c.vocab_size} tokens, numbered from 0"
            raise DataError(problem("prompt_ids", wrong[0], rule, "Use the tokenizer that it was trained with"))
        check_length(c, prompt, new)
        need = max(prompt, new + 1) if self.pair else prompt + new
        if need > self.max_length:
            told = f"prompt and new tokens together: found {need} ({prompt} and {new})"
            if self.pair:
                told = f"prompt, and new tokens after a start token: found {prompt} and {new + 1}"
            cure = f"Ask for fewer, or make an engine with max_length={need}"
            raise ConfigError(f"{told}; this engine was made for {self.max_length}. {cure}.")
        if self.pair:
            self.text.decoder_start  # noqa: B018 raises where nobody knows it
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        self.added += 1
        self.waiting.append(_Running(self.added - 1, request, random.key(seed, "sample", request.index)))
        return self.added - 1

    def cancel(self, id: int) -> bool:
        """Forget a request, whether it waits or is at work; whether there was one."""
        self.events = [event for event in self.events if event.id != id]
        for each in self.waiting:
            if each.id == id:
                self.waiting.remove(each)
                return True
        for each in self.running:
            if each.id == id:
                self._leave(each)
                return True
        return False

    def step(self) -> list[Event]:
        """One more token for every request at work, and the first one for those of the waiting for whom there is room,
        in turn.

        An error while these are read dismisses them; the tokens of the others come with the next step.
        """
        if self.running:
            logits = self.runner.step(
                [each.token for each in self.running],
                [each.place(self.pair) - 1 for each in self.running],
                [len(each.request.prompt_ids) for each in self.running] if self.pair else (),
            )
            self.events += self._sample(self.running, logits)
        if joining := self._admit():
            try:
                logits = self.runner.read([self._piece(each) for each in joining])
            except BaseException:  # their rows hold nothing that a next step could go on from
                for each in joining:
                    self._leave(each)
                raise
            self.events += self._sample(joining, logits)
        events, self.events = self.events, []
        return events

    def _admit(self) -> list[_Running]:
        joining = []
        while self.waiting and len(self.running) < self.max_batch_size:
            each = self.waiting.popleft()
            prompt, new = len(each.request.prompt_ids), each.request.params.max_new_tokens
            own, source = (new + 1, prompt) if self.pair else (prompt + new, 0)
            if self.runner.whole:  # steps of fixed shapes look at whole rows
                own, source = self.cache.length, self.cache.source_length
            self.cache.add(each.id, own, source)
            self.running.append(each)
            joining.append(each)
        return joining

    def _piece(self, each: _Running) -> Piece:
        row, ids = self.cache.requests.index(each.id), each.request.prompt_ids
        return Piece(row, [self.text.decoder_start], source=ids) if self.pair else Piece(row, ids)

    def _leave(self, each: _Running) -> None:
        row, last = self.cache.remove(each.id), self.running.pop()
        if last is not each:
            self.running[row] = last

    def _sample(self, rows: Sequence[_Running], logits: Tensor) -> list[Event]:
        """A token for each of `rows` from its logits [n, V]; those that it ends leave."""
        events, rows = [], list(rows)
        tokens = self._choose(rows, logits)
        wanted = any(each.request.params.logprobs for each in rows)
        logprobs = logprobs_of(logits, tokens).tolist() if wanted else [None] * len(rows)
        for each, token, logprob in zip(rows, tokens.tolist(), logprobs):
            params, each.token = each.request.params, token
            each.count += 1
            last = each.count == params.max_new_tokens
            finish = "stop" if token in params.stop_token_ids else "length" if last else None
            if finish:
                self._leave(each)
            events.append(Event(id=each.id, token=token, logprob=logprob if params.logprobs else None, finish=finish))
        return events

    def _choose(self, rows: Sequence[_Running], logits: Tensor) -> Tensor:
        """Rows that choose in the same way do so together."""
        ways: dict[tuple, list[int]] = {}
        for at, each in enumerate(rows):
            ways.setdefault(each.request.params.way(each.count), []).append(at)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for here in ways.values():
            some = [rows[at] for at in here]
            drawn = [[each.key for each in some], [each.place(self.pair) for each in some]]
            keys, places = torch.tensor(drawn, device=logits.device)
            params, nth = some[0].request.params, some[0].count
            if len(ways) == 1:
                return choose(logits, params, keys, places, nth)
            chosen = torch.tensor(here, device=logits.device)
            tokens[chosen] = choose(logits[chosen], params, keys, places, nth)
        return tokens
