"""The labels of a classifier, which say what the classes of its head stand for: those of the task that trained it."""

from __future__ import annotations

from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.data.tasks.description import read_description
from megalith.training.resume.source import Source

LABELS = "labels"  # entry of train_state, of a run that has some


def labels_of(config: RunConfig) -> list[str]:
    """The labels of a run's task, class 0 first; [] where it has none (numbers, choices, other data)."""
    task = config.finetuning.task
    return list(read_description(task).labels) if task and config.data.dataset == "classification" else []


def compare_labels(source: Source, config: RunConfig, new_run: bool) -> list[str]:
    """Lines on a head that a run takes from another task.

    Raises CheckpointError where its classes stand for other labels and it is not trained anew for these: where a run is
    resumed, or only measured. new_run: whether the run begins with the weights alone.
    """
    now, then = labels_of(config), source.train_state.get(LABELS)
    old, task, lines = source.config.finetuning.task, config.finetuning.task, list[str]()
    if new_run and None not in (old, task) and old != task:  # of a run that is resumed every change is told
        lines = [f"the task is {task}, and was {old} when the head was trained"]
    if not now or not then or now == then:
        return lines
    if new_run and not config.validation.skip_train:
        return [*lines, f"the classes of the head were {', '.join(then)}, and are {', '.join(now)} now"]
    rule = f"must be those that the head of {source.path} has learned, in this order: {', '.join(then)}"
    cure = "Correct the task, or train a new run: --pretrained-checkpoint MODEL --epochs 3 --save NEW"
    raise CheckpointError(problem(f"The labels of the task {task}", Words(", ".join(now)), rule, cure))
