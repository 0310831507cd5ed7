"""Evaluation tasks as a validation duty of training: `--eval-tasks wikitext103=wiki.valid.tokens lambada=test.jsonl`.

training/ may not import this file; training/build.py finds it by its address.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, MegalithError, problem
from megalith.config.flags.text import Words, choose
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.evaluation.evaluate import sequence_length
from megalith.evaluation.options import TASKS, EvaluationOptions
from megalith.evaluation.scoring import Scorer
from megalith.evaluation.task import Prepared
from megalith.generation.model import TextModel
from megalith.training.callbacks import Callback, RunInfo, StepRecord, ValidationRecord
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer

FLAG = "--eval-tasks"
FORM = "must be TASK=FILE, or TASK=FILE,OPTION=VALUE"
CURE = f"Write {FLAG} wikitext103=wiki.valid.tokens lambada=lambada_test.jsonl,strict_lambada=true"
Due = Callable[[RunInfo, int, int, int], bool]  # run, step, consumed samples, global batch size


class Wanted(NamedTuple):
    """A task, the file that it reads, and what is given of EvaluationOptions."""

    task: str
    file: str
    options: dict[str, Any]


class EvaluateTasks(Callback):
    """Measures the tasks where a validation is due, before the first step and after the last.

    What fails is told, and the run continues. It comes after SaveCheckpoints, so that what is killed here loses no
    step; the numbers of such a step are missing.
    """

    def __init__(
        self, trainer: Trainer, tokenizer: Tokenizer, progress: Progress, listeners: Sequence[Callback], due: Due
    ):
        """listeners: are told of each task, as of a validation that has metrics and no loss. due: see Validate.

        Raises ConfigError or DataError for tasks and files that cannot work; every process does.
        """
        config = trainer.runtime.config
        self.progress, self.listeners, self.due = progress, listeners, due
        self.scorer = Scorer(TextModel.of(trainer.runtime), config.batch.micro_batch_size)
        length = sequence_length(config.data.seq_length, self.scorer.limit)
        wanted = parse(config.validation.eval_tasks)
        self.tasks, failed = dict[str, Prepared](), list[MegalithError]()
        for name, each in zip(names_of(wanted), wanted):
            try:
                self.tasks[name] = prepare(each, tokenizer, length)
            except MegalithError as error:  # of this process alone, where the others have the file
                failed.append(type(error)(f"{FLAG} {each.task}={each.file}: {error}"))
        if first := Ranks().collect(lambda: failed, lambda found: next(filter(None, found), None)):
            raise first[0]
        self.measured: int | None = None

    def on_start(self, run: RunInfo) -> None:
        """Measure before the first step, so that the curve has a beginning."""
        if self.progress.iteration == 0:
            self.measure(run)

    def on_step(self, run: RunInfo, record: StepRecord) -> None:
        """Measure where a validation is due."""
        due = self.due(run, record.step, record.consumed_samples, record.global_batch_size)
        if due and self.progress.stop is None:
            self.measure(run)

    def on_end(self, run: RunInfo) -> None:
        """Measure after the last step."""
        if self.progress.stop is None:
            self.measure(run, at_end=True)

    def measure(self, run: RunInfo, at_end: bool = False) -> None:
        """Measure every task at the present step, unless that is done, and tell the listeners."""
        if self.measured == self.progress.iteration:
            return
        self.measured = self.progress.iteration
        for name, prepared in self.tasks.items():
            started, exchanged = time.perf_counter(), False
            try:
                scores = self.scorer(prepared.samples)
                exchanged = True
                result = prepared.conclude(scores)
            except Exception as error:
                if run.world_size > 1 and not exchanged and not isinstance(error, MegalithError):
                    raise  # of this process alone, perhaps: the others wait in the middle of a batch
                if run.writes:
                    text = error if isinstance(error, MegalithError) else traceback.format_exc()
                    line = f"megalith: {name} at step {self.measured} was not measured: {text}"
                    print(line, file=sys.stderr, flush=True)
                continue
            record = ValidationRecord(
                step=self.measured, consumed_samples=self.progress.consumed_train_samples, losses={},
                metrics={each: float(metric.value) for each, metric in result.metrics.items()},
                split=f"evaluation/{name}", at_end=at_end, seconds=time.perf_counter() - started,
            )  # fmt: skip
            for listener in self.listeners:
                listener.on_validation(run, record)


def parse(texts: Sequence[str]) -> list[Wanted]:
    """The tasks that --eval-tasks names. Raises ConfigError for what names none."""
    known, found = {each.name: each for each in dataclasses.fields(EvaluationOptions)}, []
    for text in texts:
        given, *pairs = text.split(",")
        task, equals, file = given.partition("=")
        if not equals or not file:
            raise ConfigError(problem(FLAG, text, FORM, CURE))
        options = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            name = choose("option", name.replace("-", "_"), known)
            options[name] = convert(str(known[name].type).removesuffix(" | None"), name, value)
        task = task if ":" in task else choose("task", task.lower(), TASKS)
        found.append(Wanted(task, file, options))
    return found


def convert(kind: str, name: str, value: str) -> Any:
    """The value of an option from its text."""
    if kind == "bool" and value in ("true", "false"):
        return value == "true"
    if kind == "int" and value.isdecimal():
        return int(value)
    if kind == "str" and value:
        return value
    rule = {"bool": "must be true or false", "int": "must be a whole number"}.get(kind, "must have a value")
    raise ConfigError(problem(f"{FLAG}: {name}", value or Words("nothing"), rule, CURE))


def prepare(wanted: Wanted, tokenizer: Tokenizer, seq_length: int) -> Prepared:
    """What the model is to read for a task."""
    options = EvaluationOptions(**wanted.options)
    task = TASKS.find(wanted.task)([wanted.file], options)
    return task.prepare(tokenizer, sequence_length(options.seq_length, seq_length))


def names_of(wanted: Sequence[Wanted]) -> list[str]:
    """A name for each: that of its task, with the file where the task comes several times."""
    tasks = [each.task for each in wanted]
    names = [
        each.task if tasks.count(each.task) == 1 else f"{each.task}/{pathlib.Path(each.file).stem}" for each in wanted
    ]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(problem(FLAG, sorted(twice), "must name each task and file once", "Leave out the second"))
    return names
