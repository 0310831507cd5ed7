"""The training loop. It knows nothing of logging, validating or saving: callbacks do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from megalith.data.loader import Loader
from megalith.optim.clip import global_norm
from megalith.training import failures
from megalith.training.callbacks import Callback, RunInfo, StepRecord
from megalith.training.resume.state import FAILED, Progress
from megalith.training.step import StepResult, Trainer, train_step


def train_loop(
    trainer: Trainer, loader: Loader | None, progress: Progress, batch_size: Callable[[int], int], run: RunInfo,
    callbacks: Sequence[Callback], asked_to_stop: Callable[[], str | None],
    again: Callable[[], str] | None = None,
) -> None:  # fmt: skip
    """Step until run.train_iters, or until `progress.stop` says why the run ends early.

    batch_size: global batch size after so many consumed samples. asked_to_stop: why this process asks for an end, if it does.
    again: what the next start does, in words, for errors that end this one.
    """
    with (
        failures.named(progress, again),
        contextlib.ExitStack() as ends,
    ):  # every on_end is called, in reverse, also where another raises
        started, told = list[Callback](), list[BaseException]()

        def tell(kind: object, error: BaseException | None, trace: object) -> None:
            if error is None or told:
                return
            told.append(error)
            progress.stop = FAILED
            for callback in started:
                try:
                    callback.on_error(run, error)
                except Exception as other:  # what went wrong first is what is told
                    error.add_note(f"and {type(callback).__name__}.on_error: {type(other).__name__}: {other}")

        ends.push(tell)  # after every on_end, one of which may raise
        try:
            for callback in callbacks:
                callback.on_start(run)
                ends.callback(callback.on_end, run)
                started.append(callback)
            while progress.iteration < run.train_iters and progress.stop is None:
                record = step_and_record(trainer, loader, progress, batch_size, asked_to_stop(), run, callbacks)
                for callback in callbacks:
                    callback.on_step(run, record)
        except BaseException as error:
            tell(type(error), error, None)
            raise


def step_and_record(
    trainer: Trainer, loader: Loader, progress: Progress, batch_size: Callable[[int], int], stop: str | None,
    run: RunInfo, callbacks: Sequence[Callback],
) -> StepRecord:  # fmt: skip
    """One step, counted in `progress` and told in numbers."""
    started = time.perf_counter()
    samples = batch_size(progress.consumed_train_samples)
    batches = loader.step(progress.consumed_train_samples, samples)

    def before_optimizer_step() -> None:
        for callback in callbacks:
            callback.on_before_optimizer_step(run, trainer)

    result = train_step(trainer, batches, progress, stop, before_optimizer_step)
    advance(progress, result, samples, fp16=trainer.runtime.config.precision.fp16)
    return StepRecord(
        **vars(result), step=progress.iteration, consumed_samples=progress.consumed_train_samples,
        global_batch_size=samples, seconds=time.perf_counter() - started, params_norm=parameters_norm(trainer),
    )  # fmt: skip


def advance(progress: Progress, result: StepResult, samples: int, fp16: bool) -> None:
    """Count a step. Samples that changed no weights are consumed, but the schedule does not move."""
    progress.iteration += 1
    progress.consumed_train_samples += samples
    if not result.skipped:
        progress.scheduled_samples += samples
    elif fp16:
        progress.skipped_iterations += 1
    else:
        progress.nan_iterations += 1
    if result.stop:
        progress.stop = result.stop


def parameters_norm(trainer: Trainer) -> float | None:
    """L2 norm of all parameters, where the config asks for it."""
    if not trainer.runtime.config.logging.log_params_norm:
        return None
    named, copies = trainer.runtime.tensors(lambda parameter: parameter.detach())
    return float(global_norm(named, skip=copies, stages=trainer.runtime.mesh.size("pp")))
