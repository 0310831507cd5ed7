"""A model, a task and its files in; numbers out.

    result = evaluate(megalith.load("runs/first"), "lambada", ["lambada_test.jsonl"], strict_lambada=True)
    result.metrics["accuracy"].value

Where several processes hold the model (megalith.load with a layout), all of them call it, and all get the result.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.evaluation.options import TASKS, EvaluationOptions
from megalith.evaluation.result import Result
from megalith.evaluation.scoring import Advance, Scorer
from megalith.evaluation.task import EvaluationTask
from megalith.generation.model import TextModel


def evaluate(model: TextModel, task: str | EvaluationTask, files: Sequence[str] = (), **options: Any) -> Result:
    """The Result of a model on a task.

    task: a name of TASKS, module:name of your own, or a task that is made already. files: what it reads. options: the
    fields of EvaluationOptions. Raises DataError for files that cannot be read, ConfigError for a model, a task or
    options that cannot work, CheckpointError where the model's logits are not numbers.
    """
    chosen = EvaluationOptions(**options)
    made = TASKS.find(task)(files, chosen) if isinstance(task, str) else task
    return measure(model, made, chosen)


def measure(
    model: TextModel, task: EvaluationTask, options: EvaluationOptions, name: str = "", show: bool = False
) -> Result:
    """As `evaluate`, of a task that is made. name, show: a progress bar of that name on a terminal."""
    if model.tokenizer is None:
        raise ConfigError(problem("The model", Words("no tokenizer"), "must have one", "Set model.tokenizer"))
    scorer = Scorer(model, options.micro_batch_size)
    prepared = task.prepare(model.tokenizer, sequence_length(options.seq_length, scorer.limit))
    with progress(name, len(prepared.samples), show) as advance:
        return prepared.conclude(scorer(prepared.samples, advance))


def sequence_length(given: int | None, limit: int | None) -> int:
    """The most tokens that are read at a time: what is given, or all that the model can read."""
    if given is None and limit is None:
        rule = "must be given, because the positions of this model have no limit"
        raise ConfigError(problem("--seq-length", Words("nothing"), rule, "Give the length that it was trained with"))
    if given is not None and limit is not None and given > limit:
        rule = f"must be at most {limit}, the model's max_position_embeddings"
        raise ConfigError(problem("--seq-length", given, rule, f"Give {limit} or less"))
    return limit if given is None else given


@contextlib.contextmanager
def progress(name: str, total: int, show: bool) -> Iterator[Advance]:
    """A bar on standard error, where that is a terminal."""
    if not show or not sys.stderr.isatty():
        yield lambda number: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(name, total=total)
        yield lambda number: bar.advance(task, number)
