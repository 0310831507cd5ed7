"""Continuous batching: requests of one model are decoded together, and start and end between steps.

    engine = Engine(model, max_batch_size=8)
    id = engine.add(Request(prompt_ids=[1, 2, 3], params=SamplingParams(seed=1)))
    while engine.busy:
        for event in engine.step():
            ...

Results are batch-invariant: a result depends on its own request, and not on the number or the order of the other
requests. What a row reads, and in what order it is added up, is fixed by its own length (cache.py), and matrix products
have numbers of rows that give the same results (runner.py). Measured to hold bit for bit on CPUs in float32 with
PyTorch's MKL, where layers are multiples of 32 wide (for other widths a vector's last channels are computed by other
instructions, and results agree to rounding). An engine for one request at a time uses the faster products of one row,
whose results agree with the others to rounding.
"""

from __future__ import annotations

import collections
import dataclasses
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.generation.cache import KVCache, PrefillChunk
from megalith.generation.model import TextModel, check_length
from megalith.generation.runner import ModelRunner
from megalith.generation.sampling import SamplingParams, logprobs_of, sample
from megalith.layers import random


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue, or to answer, and how.

    index: which of several results of one call this is; each has its own random numbers.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    index: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """A new token of a request.

    logprob: natural logarithm of the probability that the model gave the token, before temperature and filters, where
    requested. finish: why the request ended with this token, "stop" or "length"; None where it continues.
    """

    id: int
    token: int
    logprob: float | None = None
    finish: str | None = None


@dataclasses.dataclass(eq=False)
class _ActiveRequest:
    """A request that waits or runs. key: of its random numbers. token: its newest one. count: of its new tokens."""

    id: int
    request: Request
    key: int
    token: int = 0
    count: int = 0

    def next_position(self, encoder_decoder: bool) -> int:
        """The position of its next token: after the prompt, or after a decoder's start token."""
        return (1 if encoder_decoder else len(self.request.prompt_ids)) + self.count


class Engine:
    """Continuous batching of one model's requests on a cache whose memory is allocated at the start.

    Several engines may use one model, which is not changed. An engine is not thread-safe.
    """

    def __init__(
        self, model: TextModel | nn.Module, *, max_batch_size: int = 32, max_length: int | None = None,
        max_cache_bytes: int | None = None, compile: bool = False, batch_invariant: bool = True,
    ):  # fmt: skip
        """Allocate the cache.

        max_batch_size: requests that run at one time; others wait. max_length: most tokens of a request, prompt and
        new ones together (for an encoder-decoder: of each); by default the model's max_position_embeddings.
        max_cache_bytes: most memory for keys and values; fewer requests then run at one time. compile: steps run as
        one compiled graph of fixed shapes, a CUDA graph on accelerators; compiling takes a minute, once.
        batch_invariant: see above; without it one request alone is a third faster. Raises ConfigError where no request
        fits.
        """
        self.text_model = TextModel.of(model)
        c, length = self.text_model.config, max_length
        if length is None:
            length = c.max_position_embeddings
        if length is None:
            rule = "must be given, because the positions of this model have no limit"
            cure = "Give the most tokens that prompt and text may have together"
            raise ConfigError(problem("max_length", Words("nothing"), rule, cure))
        for name, value in (("max_batch_size", max_batch_size), ("max_length", length)):
            if value < 1:
                raise ConfigError(problem(name, value, "must be at least 1", "Give 1 or more"))
        self.encoder_decoder, self.max_length = bool(c.decoder_layers), length
        source_length = length if self.encoder_decoder else 0
        bytes_per_row = KVCache(self.text_model.model, 0, length, source_length).bytes_per_row
        if max_cache_bytes is not None:
            if max_cache_bytes < bytes_per_row:
                rule = f"must be at least {bytes_per_row}, the bytes for the cache of one request of {length} tokens"
                raise ConfigError(problem("max_cache_bytes", max_cache_bytes, rule, "Give more, or lower max_length"))
            max_batch_size = min(max_batch_size, max_cache_bytes // bytes_per_row)
        self.max_batch_size = max_batch_size
        self.cache = KVCache(self.text_model.model, max_batch_size, length, source_length)
        self.runner = ModelRunner(self.text_model.model, self.cache, batch_invariant=batch_invariant, compile=compile)
        self.waiting: collections.deque[_ActiveRequest] = collections.deque()
        self.running: list[_ActiveRequest] = []  # in the order of the cache's rows
        self.pending_events: list[Event] = []  # events that no step has returned yet, because an error ended it
        self.next_id = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self.pending_events)

    def add(self, request: Request) -> int:
        """Queue a request and return its id. It waits while no row is free, and is refused where it could never fit.

        Raises ConfigError for a request that is too long, DataError for unknown tokens.
        """
        prompt, new, c = len(request.prompt_ids), request.params.max_new_tokens, self.text_model.config
        if not prompt:
            rule = "must hold at least one token"
            raise ConfigError(problem("prompt_ids", Words("none"), rule, "Give the end-of-document token"))
        if wrong := [i for i in request.prompt_ids if not 0 <= i < c.vocab_size]:
            rule = f"must be among the {c.vocab_size} tokens of the model's vocabulary, numbered from 0"
            raise DataError(problem("prompt_ids", wrong[0], rule, "Use the tokenizer that it was trained with"))
        check_length(c, prompt, new)
        need = max(prompt, new + 1) if self.encoder_decoder else prompt + new
        if need > self.max_length:
            what, found = "prompt and new tokens together", f"{need} ({prompt} and {new})"
            if self.encoder_decoder:
                what, found = "the prompt, and the new tokens after a start token,", f"{prompt} and {new + 1}"
            rule = f"must be at most {self.max_length}, the max_length of this engine"
            cure = f"Ask for fewer, or make an engine with max_length={need}"
            raise ConfigError(problem(what, Words(found), rule, cure))
        if self.encoder_decoder:
            self.text_model.decoder_start  # noqa: B018 raises where no tokenizer knows it
        seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        self.next_id += 1
        self.waiting.append(_ActiveRequest(self.next_id - 1, request, random.key(seed, "sample", request.index)))
        return self.next_id - 1

    def cancel(self, id: int) -> bool:
        """Remove a request, waiting or running, and return whether there was one."""
        self.pending_events = [event for event in self.pending_events if event.id != id]
        for active in self.waiting:
            if active.id == id:
                self.waiting.remove(active)
                return True
        for active in self.running:
            if active.id == id:
                self._release(active)
                return True
        return False

    def step(self) -> list[Event]:
        """One more token for every running request, and the first one for the waiting requests that now fit, in order.

        An error while the prompts of the latter are read removes them; the tokens of the others come with the next
        step.
        """
        if self.running:
            logits = self.runner.decode(
                [active.token for active in self.running],
                [active.next_position(self.encoder_decoder) - 1 for active in self.running],
                [len(active.request.prompt_ids) for active in self.running] if self.encoder_decoder else (),
            )
            self.pending_events += self._sample(self.running, logits)
        if admitted := self._admit():
            try:
                logits = self.runner.prefill([self._prefill_chunk(active) for active in admitted])
            except BaseException:  # their rows hold nothing from which the next step could continue
                for active in admitted:
                    self._release(active)
                raise
            self.pending_events += self._sample(admitted, logits)
        events, self.pending_events = self.pending_events, []
        return events

    def _admit(self) -> list[_ActiveRequest]:
        admitted = []
        while self.waiting and len(self.running) < self.max_batch_size:
            active = self.waiting.popleft()
            prompt, new = len(active.request.prompt_ids), active.request.params.max_new_tokens
            length, source_length = (new + 1, prompt) if self.encoder_decoder else (prompt + new, 0)
            if self.runner.fixed_shapes:  # steps of fixed shapes attend to whole rows
                length, source_length = self.cache.length, self.cache.source_length
            self.cache.add(active.id, length, source_length)
            self.running.append(active)
            admitted.append(active)
        return admitted

    def _prefill_chunk(self, active: _ActiveRequest) -> PrefillChunk:
        row, ids = self.cache.requests.index(active.id), active.request.prompt_ids
        if self.encoder_decoder:
            return PrefillChunk(row, [self.text_model.decoder_start], source=ids)
        return PrefillChunk(row, ids)

    def _release(self, active: _ActiveRequest) -> None:
        row, last = self.cache.remove(active.id), self.running.pop()
        if last is not active:
            self.running[row] = last

    def _sample(self, rows: Sequence[_ActiveRequest], logits: Tensor) -> list[Event]:
        """A token for each of `rows` from its logits [n, V]; requests that end with it are removed."""
        events, rows = [], list(rows)
        tokens = self._sample_tokens(rows, logits)
        wanted = any(active.request.params.logprobs for active in rows)
        logprobs = logprobs_of(logits, tokens).tolist() if wanted else [None] * len(rows)
        for active, token, logprob in zip(rows, tokens.tolist(), logprobs):
            params, active.token = active.request.params, token
            active.count += 1
            last = active.count == params.max_new_tokens
            finish = "stop" if token in params.stop_token_ids else "length" if last else None
            if finish:
                self._release(active)
            events.append(Event(id=active.id, token=token, logprob=logprob if params.logprobs else None, finish=finish))
        return events

    def _sample_tokens(self, rows: Sequence[_ActiveRequest], logits: Tensor) -> Tensor:
        """Rows with equal sampling settings are sampled in one call."""
        groups: dict[tuple, list[int]] = {}
        for index, active in enumerate(rows):
            groups.setdefault(active.request.params.settings_at(active.count), []).append(index)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for indices in groups.values():
            group = [rows[index] for index in indices]
            positions_of_group = [active.next_position(self.encoder_decoder) for active in group]
            keys, positions = torch.tensor([[active.key for active in group], positions_of_group], device=logits.device)
            params, nth = group[0].request.params, group[0].count
            if len(groups) == 1:
                return sample(logits, params, keys, positions, nth)
            index_of_group = torch.tensor(indices, device=logits.device)
            tokens[index_of_group] = sample(logits[index_of_group], params, keys, positions, nth)
        return tokens
