"""Predictions of a task's examples as a table, and a confusion matrix of them."""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalith.common.files import atomic_path
from megalith.data.tasks.description import TaskDescription


def label_names(task: TaskDescription) -> list[str]:
    """The name of each class: its label, or the letter of a choice."""
    return list(task.labels) or [chr(ord("A") + number) for number in range(task.classes)]


def write_predictions(
    path: pathlib.Path, task: TaskDescription, uids: Sequence[str], labels: np.ndarray | None,
    rows: Sequence[Sequence[float]],
) -> dict[str, Any]:  # fmt: skip
    """Write a .tsv: uid, label (empty without labels), predicted, and the probability of each class.

    rows: [examples, classes] probabilities, or [examples, 1] numbers. Returns what results.json has of it beside the
    metrics: the confusion matrix where there are labels and classes, and `lines` that show it.
    """
    values, number = np.asarray(rows, np.float64), task.kind == "regression"
    names = [] if number else label_names(task)
    predicted = values.argmax(axis=1)
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["uid", "label", "predicted", *(f"probability {name}" for name in names)])
        for at, (uid, row) in enumerate(zip(uids, values)):
            label = "" if labels is None else f"{labels[at]:g}" if number else names[int(labels[at])]
            table.writerow(
                [uid, label, *([f"{row[0]:.6f}"] if number else [names[predicted[at]], *map(_rounded, row)])]
            )
    if labels is None or number:
        return {"predictions": str(path)}
    matrix = np.zeros((len(names), len(names)), np.int64)
    np.add.at(matrix, (labels.astype(np.int64), predicted), 1)
    lines = [f"predictions {path}; rows are labels, columns are predictions", *matrix_lines(names, matrix)]
    confusion = {"labels": names, "rows_are_labels": matrix.tolist()}
    return {"predictions": str(path), "confusion": confusion, "lines": lines}


def _rounded(probability: float) -> str:
    return f"{probability:.6f}"


def matrix_lines(names: Sequence[str], matrix: np.ndarray) -> list[str]:
    """A confusion matrix as text, a line for each label."""
    width = max(map(len, [*names, str(matrix.max(initial=0))])) + 2
    rows = [" " * width + "".join(f"{name:>{width}}" for name in names)]
    return rows + [
        f"{name:>{width}}" + "".join(f"{count:>{width}}" for count in row) for name, row in zip(names, matrix)
    ]
