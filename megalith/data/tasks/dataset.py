"""Examples as samples: token ids packed as BERT reads them, by Megatron's rules (tasks/data_utils.py)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, problem
from megalith.config.run import RunConfig
from megalith.data.samples.dataset_factory import FilesFactory
from megalith.data.tasks.description import TaskDescription, read_description
from megalith.data.tasks.examples import SHOWN, Examples, read_examples
from megalith.data.tasks.files import files_of
from megalith.data.tasks.tables import label_names, write_predictions

SHORTEST = 4  # tokens of a sample


class TaskDataset:
    """Samples are dicts over s = seq_length tokens, with c choices in front of s where the task has choices:

    input_ids [s] int64, [CLS] A [SEP] B [SEP], or [CLS] A [SEP]; token_types [s] int64, 1 for B and its [SEP];
    padding_mask [s] int64, 1 for tokens; labels int64, the class, or float32, the number; loss_mask float32, 1.
    """

    def __init__(
        self, found: Examples, task: TaskDescription, tokenizer: Any, *, seq_length: int, files: Sequence[pathlib.Path]
    ):
        """All texts are tokenized here, each once however many examples have it. files: what samples depend on."""
        self.task, self.seq_length, self.files = task, seq_length, [str(file) for file in files]
        self.labelled, self.bad = found.labelled, found.bad
        self.cls, self.sep, self.pad = (tokenizer.require(name) for name in ("cls", "sep", "pad"))
        numbers: dict[str, int] = {"": 0}
        pairs = [
            [[numbers.setdefault(text, len(numbers)) for text in pair] for pair in example.pairs]
            for example in found.examples
        ]
        ids, lengths = tokenizer.encode_flat(list(numbers))
        self.ids = np.asarray(ids, np.int32)
        self.ends = np.concatenate(([0], np.cumsum(lengths)))
        self.pairs = np.array(pairs, np.int64)  # [examples, choices, 2], numbers of texts
        self.labels = np.array([example.label for example in found.examples])
        self.uids = [example.uid for example in found.examples]
        first, second = (lengths[self.pairs[..., which]] for which in (0, 1))
        if task.kind == "multiple_choice":
            first = np.minimum(first, task.max_question_tokens)
        self.truncated = int((first + second + 2 + (self.pairs[..., 1] > 0) > seq_length).any(-1).sum())

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index`, as the class describes."""
        rows = [self.pack(first, second) for first, second in self.pairs[index].tolist()]
        columns = [np.stack(column) for column in zip(*rows)]
        if self.task.kind != "multiple_choice":
            columns = [column[0] for column in columns]
        kind = np.float32 if self.task.kind == "regression" else np.int64
        sample = dict(zip(("input_ids", "token_types", "padding_mask"), columns))
        return {**sample, "labels": np.array(self.labels[index], kind), "loss_mask": np.array(1.0, np.float32)}

    def pack(self, first: int, second: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids, types and padding mask of two texts by number. What is too long loses its end, and ends with [SEP]."""
        longest = self.task.max_question_tokens if self.task.kind == "multiple_choice" else None
        a, b = self.text(first)[:longest], self.text(second)
        tokens = [self.cls, *a, self.sep, *b, *[self.sep] * (second > 0)]
        types = [0] * (len(a) + 2) + [1] * (len(tokens) - len(a) - 2)
        s = self.seq_length
        if len(tokens) > s:
            tokens[s - 1 :] = [self.sep]
            types[s - 1 :] = [int(second > 0)]
        empty = s - len(tokens)
        return (
            np.array(tokens + [self.pad] * empty, np.int64),
            np.array(types + [0] * empty, np.int64),
            np.array([1] * len(tokens) + [0] * empty, np.int64),
        )

    def text(self, number: int) -> list[int]:
        """The ids of a text."""
        return self.ids[self.ends[number] : self.ends[number + 1]].tolist()

    def describe(self, name: str) -> list[str]:
        """Lines for the user: how many examples, of which labels, what was left out."""
        lines = [f"{name}: {len(self)} examples, {self._label_counts()}"]
        if self.truncated:
            lines[0] += f"; longer than --seq-length {self.seq_length}, and cut at their end: {self.truncated}"
        lines += [f"  left out: {row.file}, line {row.line}: {row.why}" for row in self.bad[:SHOWN]]
        if len(self.bad) > SHOWN:
            lines.append(f"  and {len(self.bad) - SHOWN} more rows left out, {len(self.bad)} in all")
        return lines

    def write_predictions(self, path: pathlib.Path, rows: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Write uid, label, prediction and probabilities of each example; see tables.py."""
        return write_predictions(path, self.task, self.uids, self.labels if self.labelled else None, rows)

    def _label_counts(self) -> str:
        if not self.labelled:
            return "without labels: they are predicted and not scored"
        if self.task.kind == "regression":
            return f"labels from {self.labels.min():g} to {self.labels.max():g}"
        counts = np.bincount(self.labels.astype(np.int64), minlength=self.task.classes)
        return ", ".join(f"{count} {name}" for name, count in zip(label_names(self.task), counts))


def open_files(config: RunConfig, tokenizer: Any) -> tuple[TaskDataset | None, dict[str, TaskDataset]]:
    """The dataset of --train-data, and one for each path of --valid-data by name."""
    f, task = config.finetuning, read_description(config.finetuning.task or "")
    classes = config.model.num_classes
    if task.kind != "multiple_choice" and classes != task.classes:
        rule = f"must be {task.classes}, as the task {task.name} has so many classes"
        raise ConfigError(
            problem("--num-classes", classes, rule, f"Write --num-classes {task.classes}, or leave it out")
        )

    if (config.data.seq_length or 0) < SHORTEST:
        rule = f"must be at least {SHORTEST}, for [CLS], [SEP], [SEP] and a token"
        raise ConfigError(problem("--seq-length", config.data.seq_length, rule, "Write --seq-length 128"))

    own = [pathlib.Path(f.task)] if f.task and f.task.endswith((".yaml", ".yml")) else []

    def dataset(files: Sequence[pathlib.Path], training: bool) -> TaskDataset:
        found = read_examples(files, task, training=training)
        length = config.data.seq_length or 0
        return TaskDataset(found, task, tokenizer, seq_length=length, files=[*files, *own])

    train = None
    if not config.validation.skip_train:
        train = dataset([file for files in files_of(f.train_data, task, "--train-data") for file in files], True)
    named = zip(names_of(f.valid_data), files_of(f.valid_data, task, "--valid-data"))
    return train, {name: dataset(files, False) for name, files in named}


def names_of(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last part without an extension; of several that are equal, with folders before it."""
    parts = [(*pathlib.Path(path).resolve().parts[1:-1], pathlib.Path(path).name.partition(".")[0]) for path in paths]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    names = ["-".join(each[-depth:]) for each in parts]
    if twice := {name for name in names if names.count(name) > 1}:
        rule = "must name each path once"
        raise ConfigError(problem("--valid-data", sorted(twice), rule, "Leave out the second, or rename one"))
    return names


from_files = FilesFactory(open_files)
