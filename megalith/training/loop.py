"""The training loop. It knows nothing of logging, validating or saving: callbacks do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence

from megalith.config.batch_math import counted_samples
from megalith.data.loader import Loader
from megalith.optim.clip import global_norm
from megalith.training import failures
from megalith.training.callbacks import Callback, RunInfo, StepRecord
from megalith.training.resume.state import FAILED, Progress
from megalith.training.step import StepResult, Trainer, train_step


def train_loop(
    trainer: Trainer, loader: Loader | None, progress: Progress, batch_size: Callable[[int], int], run: RunInfo,
    callbacks: Sequence[Callback], stop_reason: Callable[[], str | None],
    next_start: Callable[[], str] | None = None,
) -> None:  # fmt: skip
    """Step until run.train_iters, or until `progress.stop` says why the run ends early.

    batch_size: global batch size after so many consumed samples. stop_reason: why this process asks that the run end,
        if it does. next_start: what the next start does, as text, for errors that end this one.
    """
    # Every on_end is called, in reverse order, also where another one raises.
    with failures.explain_errors(progress, next_start), contextlib.ExitStack() as ends:
        started, reported = list[Callback](), list[BaseException]()

        def report_error(kind: object, error: BaseException | None, trace: object) -> None:
            if error is None or reported:
                return
            reported.append(error)
            progress.stop = FAILED
            for callback in started:
                try:
                    callback.on_error(run, error)
                except Exception as other:  # the first error is the one that is raised
                    error.add_note(f"and {type(callback).__name__}.on_error: {type(other).__name__}: {other}")

        def end(callback: Callback) -> None:
            try:
                callback.on_end(run)
            except BaseException:  # the ends that follow must not wait for processes on which there was no error
                progress.stop = FAILED
                raise

        ends.push(report_error)  # after every on_end, one of which may raise
        try:
            for callback in callbacks:
                callback.on_start(run)
                ends.callback(end, callback)
                started.append(callback)
            while progress.iteration < run.train_iters and progress.stop is None:
                record = step_and_record(trainer, loader, progress, batch_size, stop_reason(), run, callbacks)
                for callback in callbacks:
                    callback.on_step(run, record)
        except BaseException as error:
            report_error(type(error), error, None)
            raise


def step_and_record(
    trainer: Trainer, loader: Loader, progress: Progress, batch_size: Callable[[int], int], stop: str | None,
    run: RunInfo, callbacks: Sequence[Callback],
) -> StepRecord:  # fmt: skip
    """Do one step, count it in `progress` and return its numbers."""
    started = time.perf_counter()
    samples = batch_size(progress.consumed_train_samples)
    batches = loader.step(progress.consumed_train_samples, samples)

    def before_optimizer_step() -> None:
        for callback in callbacks:
            callback.on_before_optimizer_step(run, trainer)

    result = train_step(trainer, batches, progress, stop, before_optimizer_step)
    counted = counted_samples(run.config, samples, progress.consumed_train_samples)
    advance(progress, result, counted, fp16=trainer.runtime.config.precision.fp16)
    return StepRecord(
        **vars(result), step=progress.iteration, consumed_samples=progress.consumed_train_samples,
        global_batch_size=samples, seconds=time.perf_counter() - started, params_norm=parameters_norm(trainer),
    )  # fmt: skip


def advance(progress: Progress, result: StepResult, samples: int, fp16: bool) -> None:
    """Count a step of so many samples. Those that changed no weights are consumed, but the schedule does not move."""
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
    parameters, not_owned = trainer.runtime.named_tensors(lambda parameter: parameter.detach())
    return float(global_norm(parameters, not_owned=not_owned, stages=trainer.runtime.mesh.size("pp")))
