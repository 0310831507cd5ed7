"""The model that a server offers: requests in, texts out, from the event loop's side."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool

from megalith.common.errors import ConfigError, MegalithError, problem
from megalith.generation.engine import Engine
from megalith.generation.generate import AnyEngine, Call
from megalith.generation.parallel.ranks import first_line
from megalith.generation.params import GenerationParams
from megalith.generation.prompts import Completion, Prompts, prompt_list
from megalith.generation.request import BeamRequest
from megalith.serving.access_log import count_tokens
from megalith.serving.engine_thread import EngineThread, Job, Update
from megalith.serving.errors import Busy, TimedOut, Unavailable
from megalith.serving.metrics import Metrics
from megalith.serving.options import ServeOptions

LONGEST_STEP = 10.0  # seconds that the end of a server waits for the engine's current step
MOST_TEXTS = 1024  # of one request, beyond Megatron's 128 prompts with OpenAI's 8 or so samples


class Service:
    """An engine in its thread, the queue before it, and whether both are well.

    All methods are for the event loop that `start` was called in.
    """

    def __init__(self, engine: AnyEngine, name: str, options: ServeOptions, metrics: Metrics):
        """name: of the model, for clients."""
        self.engine, self.model, self.name = engine, engine.text_model, name
        self.options, self.metrics = options, metrics
        self.created, self.active = int(time.time()), set[Submission]()
        self.thread = EngineThread(engine, after_step=self._flush, on_failure=self._failed)
        self.outbox: list[tuple[Submission, Update | MegalithError]] = []  # of the engine's thread, until its step ends
        self.failure: str | None = None  # why the model is lost
        self.draining, self.lost = False, asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start to work."""
        self.loop = asyncio.get_running_loop()
        self.watcher = self.loop.create_task(self._watch())
        self.thread.start()

    async def stop(self) -> bool:
        """End what still runs, and the engine's thread; whether that has ended, too."""
        if self.watcher is not None:
            self.watcher.cancel()
        self.give_up()
        first = self.failure is None and not self.thread.stopping  # the application's end and the server's both call it
        return await asyncio.to_thread(self.thread.stop, LONGEST_STEP if first else 1.0)

    @property
    def trouble(self) -> str | None:
        """Why no request is taken now; None where all is well."""
        return self.failure or ("the server is ending" if self.draining else None)

    async def _watch(self) -> None:
        """Notice an engine that hangs. Looks are counted, not seconds: while all of this process was stopped (Ctrl-Z,
        a paused container) nobody has looked.
        """
        limit, silent, sign = self.options.stall_timeout, 0, self.thread.last_sign
        while silent <= limit:
            await asyncio.sleep(1.0)
            last, sign = sign, self.thread.last_sign
            silent = silent + 1 if sign == last else 0
        self._fail(f"the model has not ended a step in {limit:g} seconds (--stall-timeout)")

    @property
    def unfinished(self) -> int:
        """Texts that run or wait."""
        return sum(submission.unfinished for submission in self.active)

    @property
    def waiting(self) -> int:
        """Texts that wait until others end."""
        return max(0, self.unfinished - self.engine.max_batch_size)

    @property
    def running(self) -> int:
        """Texts that are being read or written."""
        return self.unfinished - self.waiting

    @property
    def local_engine(self) -> Engine:
        """The engine of this process, which has its keys and values."""
        engine = self.engine
        while not isinstance(engine, Engine):
            engine = engine.engine
        return engine

    async def submit(self, prompts: Prompts, params: GenerationParams | Sequence[GenerationParams]) -> Submission:
        """Queue texts; see `complete` for prompts and params. The submission must be entered by `with`.

        Raises Unavailable where the model is lost or the server is ending, Busy where too many texts wait, and the
        errors of `complete` for what the model cannot do.
        """
        self._check_open()
        _check_number(prompts, params)
        self._check_room(1)
        call = await run_in_threadpool(self._prepare, prompts, params)  # a long prompt takes a while to tokenize
        self._check_open()
        submission = Submission(self, call)
        self._check_room(submission.unfinished)
        return submission

    def _prepare(self, prompts: Prompts, params: GenerationParams | Sequence[GenerationParams]) -> Call:
        """A call of which the engine refuses nothing."""
        call = Call(self.engine, prompts, params, {})
        for _, each in call.requests():
            self.engine.check(each if isinstance(each, BeamRequest) else each.request)
        return call

    def _check_open(self) -> None:
        if self.trouble is not None:
            raise Unavailable(f"{self.trouble}; ask another server, or this one later.", retry_after=5)

    def _check_room(self, texts: int) -> None:
        waiting = self.unfinished + texts - self.engine.max_batch_size
        if texts and self.unfinished and waiting > self.options.max_waiting:
            rule = f"at most {self.options.max_waiting} texts may wait (--max-waiting)"
            retry_after = self.metrics.seconds_per_text(self.unfinished)
            raise Busy(f"the server is busy: {rule}; try again later.", retry_after)

    def fail(self, why: str) -> None:
        """The model is lost: end every submission. Callable from any thread."""
        self._call(self._fail, why)

    def _fail(self, why: str) -> None:
        if self.failure is None:
            self.failure = why
            self._end_all(self.unavailable())
            self.lost.set()

    def unavailable(self) -> Unavailable:
        """What texts get that the lost model has not completed."""
        return Unavailable(f"the model is lost: {self.failure}.", retry_after=5)

    def give_up(self) -> None:
        """Take nothing more, and end every submission that is not complete."""
        self.draining = True
        self._end_all(Unavailable("the server has ended before this text was complete; ask again.", retry_after=5))

    def _end_all(self, error: MegalithError) -> None:
        for submission in list(self.active):
            submission.end(error)

    def _failed(self, error: BaseException) -> None:
        self._flush()
        self.fail(f"the engine has failed: {type(error).__name__}: {first_line(error)}")

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop, if that still runs; nobody waits for anything after its end."""
        if self.loop is not None:
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(function, *arguments)

    def deliver(self, submission: Submission, update: Update | MegalithError) -> None:
        """Keep what the engine's thread has for a submission until its step ends."""
        self.outbox.append((submission, update))

    def _flush(self) -> None:
        if self.outbox:
            outbox, self.outbox = self.outbox, []
            self._call(self._hand_out, outbox)

    @staticmethod
    def _hand_out(outbox: list[tuple[Submission, Update | MegalithError]]) -> None:
        for submission, update in outbox:
            submission.put(update)


def _check_number(prompts: Prompts, params: GenerationParams | Sequence[GenerationParams]) -> None:
    """Raise ConfigError for more texts than a request may ask for, before each takes memory."""
    each_prompt = [params] * len(prompt_list(prompts)) if isinstance(params, GenerationParams) else params
    texts = sum(each.num_samples for each in each_prompt)
    if texts > MOST_TEXTS:
        rule, cure = f"must be at most {MOST_TEXTS} for one request", "Send several requests"
        raise ConfigError(problem("the number of texts (prompts times num_samples)", texts, rule, cure))


class Submission:
    """The texts of one request. As a context manager it is given to the engine, and cancelled if left early.

    `async for updates in submission` gives lists of updates, all since the last; `completions` waits for all texts.
    Texts of which nothing is asked for, neither new tokens nor scores, are complete from the start.
    """

    def __init__(self, service: Service, call: Call):
        self.service, self.call = service, call
        self.running = {number: Job(number, each, self._deliver) for number, each in call.requests()}
        self.tokens = count_tokens()
        self.updates, self.arrived = list[Update](), asyncio.Event()
        self.error: MegalithError | None = None  # what ended it
        self.started, self.seen = time.monotonic(), dict[int, float]()  # number -> when its last token came

    @property
    def unfinished(self) -> int:
        """How many of its texts run or wait."""
        return len(self.running)

    def _deliver(self, update: Update | MegalithError) -> None:
        self.service.deliver(self, update)

    def __enter__(self) -> Submission:
        self.service.active.add(self)
        prompt_tokens = sum(len(prompt.prompt_ids) for prompt in self.call.prompts)
        self.service.metrics.prompt(prompt_tokens)
        self.tokens.prompt += prompt_tokens
        self.timer = asyncio.get_running_loop().call_later(self.service.options.request_timeout, self._time_out)
        if self.service.failure is not None:  # since `submit`
            self.end(self.service.unavailable())
        for job in self.running.values():
            self.service.thread.add(job)
        return self

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        self._cancel()
        self.service.active.discard(self)

    def _cancel(self) -> None:
        self.service.metrics.cancelled(len(self.running))
        for job in self.running.values():
            self.service.thread.cancel(job)
        self.running.clear()

    def _time_out(self) -> None:
        rule = f"took longer than the {self.service.options.request_timeout:g} seconds of --request-timeout"
        self.end(TimedOut(f"the request {rule}; ask for fewer tokens."))

    def end(self, error: MegalithError) -> None:
        """End all of its texts with an error, unless they are complete."""
        if self.running:
            self.error = error
            self._cancel()
            self.arrived.set()

    def put(self, update: Update | MegalithError) -> None:
        """Take what came from the engine; in the event loop."""
        if isinstance(update, MegalithError):
            self.end(update)
            return
        if update.number not in self.running:  # cancelled meanwhile
            return
        now, last = time.monotonic(), self.seen.get(update.number)
        if update.token is not None:
            self.service.metrics.token(now - (last or self.started), first=last is None)
            self.seen[update.number] = now
            self.tokens.new += 1
        if update.beams:
            new_tokens = sum(len(beam.ids) for beam in update.beams)
            self.service.metrics.tokens(new_tokens)
            self.tokens.new += new_tokens
            self.call.take_beams(update.number, update.beams)
        if update.done:
            del self.running[update.number]
            self.service.metrics.finished(now - self.started)
        self.updates.append(update)
        self.arrived.set()

    async def __aiter__(self) -> AsyncIterator[list[Update]]:
        """Lists of updates, until all texts are complete. Raises what ended them."""
        while self.running or self.updates or self.error:
            if not (self.updates or self.error):
                await self.arrived.wait()
            self.arrived.clear()
            if self.updates:
                updates, self.updates = self.updates, []
                yield updates
            elif self.error:
                raise self.error

    async def completions(self) -> list[Completion]:
        """All texts, as `complete` returns them."""
        async for _ in self:
            pass
        return self.call.completions()
