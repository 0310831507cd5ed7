"""Continuous batching: requests of one model are decoded together, and start and end between steps.

    engine = Engine(model, max_batch_size=8)
    id = engine.add(Request(prompt_ids=[1, 2, 3], params=SamplingParams(seed=1)))
    while engine.busy:
        for event in engine.step():
            ...

Results are batch-invariant: a result depends on its own request, and not on the number or the order of the other
requests. What a row reads, and in what order it is added up, is fixed by its own length (cached_attention.py), prompts
are cut into the same chunks whoever else waits (prefix.py), and matrix products have numbers of rows that give the same
results (runner.py). Measured to hold bit for bit on CPUs in float32 with PyTorch's MKL, where layers are multiples of
32 wide (for other widths a vector's last channels are computed by other instructions, and results agree to rounding).
An engine for one request at a time uses the faster products of one row, whose results agree with the others to
rounding.

A beam search makes a step beside each step of the others, on a cache of its own, one search after the other.

Over several processes each runs the same Engine on the same requests, so that no commands are sent; what is drawn,
where logits are, is broadcast (parallel/runner.py).
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import CheckpointError, ConfigError, DataError, MegalithError, problem
from megalith.config.flags.text import Words
from megalith.generation.beam import BeamSearch, check_options, no_memory
from megalith.generation.logprobs import measure, top_of
from megalith.generation.model import TextModel, TooLong, check_length
from megalith.generation.parallel.runner import bytes_per_row, runner_of
from megalith.generation.penalties import all_banned, check_tokens
from megalith.generation.prefill import Prefill
from megalith.generation.prefix import CHUNK, Prompt
from megalith.generation.request import BeamRequest, Event, PromptLogprobs, Request
from megalith.generation.sampling import SamplingState, not_numbers, sample
from megalith.layers import random
from megalith.runtime.build import Runtime

__all__ = ["Engine", "Event", "Request"]

NOT_NUMBERS, ALL_BANNED = -1, -2  # in place of a token that could not be drawn


@dataclasses.dataclass(eq=False)
class _ActiveRequest:
    """A request that waits or runs. row: of the cache, once it runs. error: why its prompt could not be scored."""

    id: int
    request: Request
    state: SamplingState
    prompt: Prompt
    row: int = -1
    prompt_logprobs: PromptLogprobs = dataclasses.field(default_factory=PromptLogprobs)
    error: MegalithError | None = None


class Engine:
    """Continuous batching of one model's requests on a cache whose memory is allocated at the start.

    Several engines may use one model, which is not changed. An engine is not thread-safe.
    """

    def __init__(
        self, model: TextModel | Runtime | nn.Module, *, max_batch_size: int = 32, max_length: int | None = None,
        max_cache_bytes: int | None = None, prefill_tokens: int = 4 * CHUNK,
        prefix_caching: bool = True, compile: bool = False, batch_invariant: bool = True,
    ):  # fmt: skip
        """Allocate the cache.

        max_batch_size: requests that run at one time; others wait. max_length: most tokens of a request, prompt and
        new ones together (for an encoder-decoder: of each); by default the model's max_position_embeddings.
        max_cache_bytes: most memory for keys and values on a process; fewer requests then run at one time. (Beam search
        takes as much again, at most: a search has no more beams than requests run at one time.)
        prefill_tokens: of prompts read in one step, at least one chunk (of CHUNK tokens, or an encoder's whole text):
        running requests wait so long for their next token. prefix_caching: whether a prompt, or its beginning, that a
        row of the cache holds is copied instead of read again. compile: steps of as many rows run as one compiled
        graph, a CUDA graph on accelerators; compiling takes a minute (`warm_up`). batch_invariant: see above; without
        it one request alone is a third faster. Raises ConfigError where no request fits.
        """
        self.text_model = TextModel.of(model)
        c, length = self.text_model.config, max_length
        if length is None:
            length = c.max_position_embeddings
        if length is None:
            rule = "must be given, because the positions of this model have no limit"
            cure = "Give the most tokens that prompt and text may have together"
            raise ConfigError(problem("max_length", Words("nothing"), rule, cure))
        limits = {"max_batch_size": max_batch_size, "max_length": length, "prefill_tokens": prefill_tokens}
        for name, value in limits.items():
            if value < 1:
                raise ConfigError(problem(name, value, "must be at least 1", "Give 1 or more"))
        self.encoder_decoder, self.max_length = bool(c.decoder_layers), length
        source_length = length if self.encoder_decoder else 0
        if max_cache_bytes is not None:
            least = bytes_per_row(self.text_model, length, source_length)
            if max_cache_bytes < least:
                rule = f"must be at least {least}, the bytes for the cache of one request of {length} tokens"
                raise ConfigError(problem("max_cache_bytes", max_cache_bytes, rule, "Give more, or lower max_length"))
            max_batch_size = min(max_batch_size, max_cache_bytes // least)
        self.max_batch_size = max_batch_size
        # One position more for compiled steps, in which each row that has no request writes after its last position.
        self.runner = runner_of(
            self.text_model, max_batch_size, length + compile, source_length, batch_invariant=batch_invariant,
            compile=compile,
        )  # fmt: skip
        self.cache = self.runner.cache
        self.waiting: collections.deque[_ActiveRequest] = collections.deque()
        prefix_caching = prefix_caching and self.text_model.retriever is None  # a row holds more than keys and values
        self.prefill = Prefill[_ActiveRequest](
            self.runner, prefill_tokens, prefix_caching, lambda: self.text_model.decoder_start
        )
        self.running: list[_ActiveRequest] = []  # in the order of the cache's rows
        self.searches: collections.deque[tuple[int, BeamSearch]] = collections.deque()  # the first runs, others wait
        self.pending_events: list[Event] = []  # events that no step has returned yet, because an error ended it
        self.next_id = 0

    def warm_up(self) -> None:
        """Compile everything that steps need, so that no request waits for it."""
        self.runner.warm_up()

    @property
    def bytes_allocated(self) -> int:
        """Memory of this process for keys and values: the cache's, and that of the search which runs."""
        return self.cache.bytes_allocated + self._bytes_of_search

    @property
    def bytes_in_use(self) -> int:
        """Memory that the requests of this process have reserved; a search reserves all of its cache."""
        return self.cache.bytes_in_use + self._bytes_of_search

    @property
    def _bytes_of_search(self) -> int:
        runners = [search.runner for _, search in list(self.searches)]  # a copy: a server asks from another thread
        return sum(runner.cache.bytes_allocated for runner in runners if runner is not None)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.prefill.reading or self.running or self.searches or self.pending_events)

    def add(self, request: Request | BeamRequest) -> int:
        """Queue a request and return its id. It waits while no row is free, and is refused where it could never fit.

        Raises ConfigError for a request that is too long or has too many beams, DataError for unknown tokens.
        """
        self.check(request)
        self.next_id += 1
        if isinstance(request, BeamRequest):
            self.searches.append((self.next_id - 1, BeamSearch(self.text_model, request)))
            return self.next_id - 1
        ids, params = tuple(request.prompt_ids), request.params
        seed = self.runner.draw_seed() if params.seed is None else params.seed
        state = SamplingState(
            params=params, key=random.key(seed, "sample", request.index), banned_after=request.banned_after,
            prompt_ids=() if self.encoder_decoder else ids, first_position=1 if self.encoder_decoder else len(ids),
        )  # fmt: skip
        self.waiting.append(_ActiveRequest(self.next_id - 1, request, state, Prompt(ids, whole=self.encoder_decoder)))
        return self.next_id - 1

    def check(self, request: Request | BeamRequest) -> None:
        """Raise ConfigError or DataError for a request that `add` would refuse. Callable from any thread."""
        c, prompt = self.text_model.config, len(request.prompt_ids)
        new = (request if isinstance(request, BeamRequest) else request.params).max_new_tokens
        if not prompt:
            rule = "must hold at least one token"
            raise ConfigError(problem("prompt_ids", Words("none"), rule, "Give the end-of-document token"))
        if wrong := [i for i in request.prompt_ids if not 0 <= i < c.vocab_size]:
            rule = f"must be among the {c.vocab_size} tokens of the model's vocabulary, numbered from 0"
            raise DataError(problem("prompt_ids", wrong[0], rule, "Use the tokenizer that it was trained with"))
        check_length(c, prompt, new)
        self.check_length(prompt, new)
        if self.encoder_decoder:
            self.text_model.decoder_start  # noqa: B018 raises where no tokenizer knows it
            if isinstance(request, Request) and request.params.prompt_logprobs:
                rule = "must be off for an encoder-decoder, whose encoder predicts no token of the prompt"
                raise ConfigError(problem("prompt_logprobs", True, rule, "Ask for logprobs"))
        if isinstance(request, Request):
            check_tokens(request.params, request.banned_after, c.vocab_size)
            return
        check_options(request)
        if request.beam_width > self.max_batch_size:
            rule = f"must be at most {self.max_batch_size}, the requests that the engine runs at one time"
            cure = "Ask for fewer beams, or make an engine with a larger max_batch_size"
            raise ConfigError(problem("--beam-width", request.beam_width, rule, cure))

    def check_length(self, prompt: int, new: int) -> None:
        """Raise TooLong for a prompt of so many tokens, with so many new ones, that no row of the cache can hold."""
        need = max(prompt, new + 1) if self.encoder_decoder else prompt + new
        if need > self.max_length:
            what, found = "prompt and new tokens together", f"{need} ({prompt} and {new})"
            if self.encoder_decoder:
                what, found = "the prompt, and the new tokens after a start token,", f"{prompt} and {new + 1}"
            rule = f"must be at most {self.max_length}, the max_length of this engine"
            cure = f"Ask for fewer, or raise max_length (--max-length of a server) to {need}"
            raise TooLong(problem(what, Words(found), rule, cure))

    def cancel(self, id: int) -> bool:
        """Remove a request, waiting or running, and return whether there was one."""
        self.pending_events = [event for event in self.pending_events if event.id != id]
        for search in self.searches:
            if search[0] == id:
                self.searches.remove(search)
                return True
        for active in self.waiting:
            if active.id == id:
                self.waiting.remove(active)
                return True
        for active in (*self.prefill.reading, *self.running):
            if active.id == id:
                self._release(active)
                return True
        return False

    def step(self) -> list[Event]:
        """One more token for every running request, the next chunks of the prompts of those that join them, and one
        step of a beam search.

        A request whose logits are not numbers ends, alone, with an event that has the error, and so does a search for
        which there is too little memory, where one process holds the model. Any other error while prompts are read, or
        in a search, removes their requests; the tokens of the others come with the next step.
        """
        if self.running:
            logits = self.runner.decode(
                [active.row for active in self.running],
                [active.state.new_ids[-1] for active in self.running],
                [active.state.first_position + len(active.state.new_ids) - 1 for active in self.running],
                [len(active.prompt.ids) for active in self.running] if self.encoder_decoder else (),
            )
            self._sample(list(self.running), logits)
        self._admit()
        if self.prefill.reading:
            self._read_prompts()
        if self.searches:
            self._search()
        events, self.pending_events = self.pending_events, []
        return events

    def _admit(self) -> None:
        if self.waiting and self.cache.free:
            self.prefill.forget_if_trained()
        while self.waiting and self.cache.free:
            active = self.waiting.popleft()
            prompt, new = len(active.prompt.ids), active.request.params.max_new_tokens
            self.prefill.admit(active, *((new + 1, prompt) if self.encoder_decoder else (prompt + new, 0)))

    def _read_prompts(self) -> None:
        """Read chunks of prompts, and draw the first tokens of the requests whose prompts are complete."""
        try:
            self.prefill.read()
            for active in [active for active in self.prefill.reading if active.error is not None]:
                self._end_by_error(active, active.error)
            if complete := self.prefill.complete():
                self._start(complete)
        except BaseException:  # the rows hold nothing from which the next step could continue
            for active in list(self.prefill.reading):
                self.prefill.drop(active)
                self._release(active)
            raise

    def _start(self, complete: Sequence[_ActiveRequest]) -> None:
        drawing = [active for active in complete if active.request.params.max_new_tokens]
        if drawing:
            logits = [active.prompt.logits for active in drawing if active.prompt.logits is not None]
            self._sample(drawing, torch.stack(logits) if logits else None)
        for active in complete:
            if not active.request.params.max_new_tokens:
                self._release(active)
                self.pending_events.append(
                    Event(id=active.id, token=None, finish="length", prompt=active.prompt_logprobs)
                )
            elif active in self.prefill.reading:  # not ended with its first token
                self.prefill.reading.remove(active)
                bisect.insort(self.running, active, key=lambda each: each.row)

    def _search(self) -> None:
        """A step of the first beam search."""
        (id, search), ended = self.searches[0], True  # by an error too
        try:
            ended = search.step()
            if ended:
                self.pending_events.append(Event(id=id, token=None, finish=search.best[0].finish, beams=search.best))
        except CheckpointError as error:  # on all processes of the model
            self.pending_events.append(Event(id=id, token=None, finish="error", error=error))
        except torch.OutOfMemoryError:
            # The cache of a search is the memory that is not allocated at the start. Where several processes hold the
            # model, others may have had enough, and would wait for this one.
            runtime = self.text_model.runtime
            if runtime is not None and runtime.mesh.size("tp") * runtime.mesh.size("pp") > 1:
                raise
            self.pending_events.append(Event(id=id, token=None, finish="error", error=no_memory(search.request)))
        finally:
            if ended:
                self.searches.popleft()

    def _end_by_error(self, active: _ActiveRequest, error: MegalithError | None) -> None:
        """End a request whose row holds nothing that another could use."""
        self.prefill.drop(active)
        self._release(active)
        self.pending_events.append(Event(id=active.id, token=None, finish="error", error=error))

    def _release(self, active: _ActiveRequest) -> None:
        self.cache.remove(active.id)
        (self.running if active in self.running else self.prefill.reading).remove(active)

    def _sample(self, rows: Sequence[_ActiveRequest], logits: Tensor | None) -> None:
        """A token for each of `rows` from its logits [n, V]; requests that end with it are removed."""
        states = [active.state for active in rows]
        top = max(state.params.top_logprobs for state in states)
        wanted = top or any(state.params.logprobs for state in states)

        def compute() -> Tensor:
            assert logits is not None
            tokens, numbers = _draw(logits, states), logits
            if wanted and tokens.amin() < 0:  # what is measured there is not used
                numbers = logits.nan_to_num()
            columns = [tokens[:, None].double()]
            return torch.cat(columns + [measure(numbers, tokens.clamp(min=0), top)], dim=1) if wanted else columns[0]

        results = self.runner.broadcast(compute, (len(rows), 2 + 2 * top if wanted else 1)).tolist()
        for active, (number, *numbers) in zip(rows, results):
            params, token, new_ids = active.state.params, int(number), active.state.new_ids
            if token < 0:
                banned = token == ALL_BANNED
                self._end_by_error(active, all_banned(params, active.state.banned_after) if banned else not_numbers())
                continue
            new_ids.append(token)
            last = len(new_ids) == params.max_new_tokens
            finish = "stop" if token in params.stop_token_ids else "length" if last else None
            if finish:
                self._release(active)
            wanted_prompt = params.prompt_logprobs and len(new_ids) == 1
            event = Event(
                id=active.id, token=token, finish=finish,
                logprob=numbers[0] if params.logprobs or params.top_logprobs else None,
                top_logprobs=top_of(numbers, params.top_logprobs) if params.top_logprobs else (),
                prompt=active.prompt_logprobs if wanted_prompt else None,
            )  # fmt: skip
            self.pending_events.append(event)


def _draw(logits: Tensor, states: Sequence[SamplingState]) -> Tensor:
    """As `sample`, with NOT_NUMBERS or ALL_BANNED for a row of which it raises that error."""
    try:
        return sample(logits, states)
    except MegalithError as error:
        if len(states) > 1:  # a row's token does not depend on the others
            return torch.cat([_draw(logits[row : row + 1], [state]) for row, state in enumerate(states)])
        return torch.tensor([ALL_BANNED if isinstance(error, ConfigError) else NOT_NUMBERS], device=logits.device)
