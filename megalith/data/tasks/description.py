"""A task as a YAML file describes it: which columns or fields hold texts and labels, the labels, the metrics. No torch.

    labels: [contradiction, entailment, neutral]     # class 0, 1, 2
    columns: {uid: index, text_a: sentence1, text_b: sentence2, label: gold_label}
    metrics: [accuracy]

docs/finetune_tasks.md explains every key.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words, choose, fail
from megalith.config.flags.yaml_text import load_yaml

FOLDER = pathlib.Path(__file__).parent
METRICS = ("accuracy", "f1", "matthews", "pearson")
KINDS = {  # kind -> the model that learns it
    "classification": "bert_classification",
    "regression": "bert_classification",
    "multiple_choice": "bert_multiple_choice",
}
COLUMNS = {  # kind -> columns of a task, those that it must have first
    "classification": ("text_a", "label", "text_b", "uid"),
    "regression": ("text_a", "label", "text_b", "uid"),
    "multiple_choice": ("question", "options", "label", "context", "uid"),
}
NEEDED = {"classification": 2, "regression": 2, "multiple_choice": 3}
Columns = Mapping[str, str | int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskDescription:
    """A task.

    name: in the text of errors and of the log.
    columns: {text_a, text_b, label, uid, or question, options, context: name of a column or field, or its number from
        0 on, from the end where it is negative}.
    unlabelled: columns of files without labels, which are known by these names in their first line; {}: those above.
    labels: the texts of the classes, class 0 first; [] of multiple choices, whose labels are letters or numbers.
    choices: options of each question. max_question_tokens: a question with an option is cut to so many tokens.
    header: whether the first line of a file has the names of its columns. files: names of a folder's files.
    metrics: of METRICS, the first of which says which checkpoint is the best. For f1 and matthews of two classes the
        second one, class 1, is the positive one.
    """

    name: str
    kind: str = "classification"
    columns: Columns = dataclasses.field(default_factory=dict)
    unlabelled: Columns = dataclasses.field(default_factory=dict)
    labels: tuple[str, ...] = ()
    choices: int = 4
    max_question_tokens: int = 128
    header: bool = True
    files: str = "*.tsv"
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def classes(self) -> int:
        """Classes, or choices; 1 for a number."""
        return {"regression": 1, "multiple_choice": self.choices}.get(self.kind, len(self.labels))


def names() -> list[str]:
    """The tasks that ship."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@functools.cache
def read_description(task: str) -> TaskDescription:
    """The description of a task that ships, by its name in any case, or of a YAML file. Raises ConfigError."""
    shipped = not task.endswith((".yaml", ".yml"))
    path = FOLDER / f"{choose('task', task.lower(), names())}.yaml" if shipped else pathlib.Path(task)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"must name a readable YAML file ({getattr(error, 'strerror', None) or error})"
        raise ConfigError(problem("--task", task, rule, "Correct the path")) from error
    return parse_description(text, str(path), path.stem)


def parse_description(text: str, source: str, name: str) -> TaskDescription:
    """A description from YAML text. Raises ConfigError with all that is wrong in it; source: what to call it."""
    raw = load_yaml(text, source)
    if not isinstance(raw, Mapping):
        rule, cure = "must map names to values, as in 'metrics: [accuracy]'", "docs/finetune_tasks.md has an example"
        raise ConfigError(problem(source, raw, rule, cure))
    known: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(TaskDescription) if field.name != "name"
    }
    types: dict[str, Any] = {"columns": Mapping, "unlabelled": Mapping, "labels": list, "metrics": list}
    problems, values = list[str](), dict[str, Any](name=name)
    value: Any
    for key, value in raw.items():
        if key == "about":
            continue
        wanted = types.get(key) or type(known.get(key))
        if key not in known:
            rule = f"must be one of {', '.join(known)}"
            problems.append(problem(f"A key of {source}", key, rule, "Correct it, or leave it out"))
        elif not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            kind: dict[Any, str] = {
                Mapping: "names below it",
                list: "a list",
                bool: "true or false",
                int: "a whole number",
            }
            rule = f"must be {kind.get(wanted, 'text')}"
            problems.append(problem(f"{source}: {key}", value, rule, "docs/finetune_tasks.md has an example"))
        else:
            values[key] = tuple(map(_label, value)) if wanted is list else value
    fail(problems)
    description = TaskDescription(**values)
    fail(_problems(description, source))
    return description


def _label(value: Any) -> str:
    """A label as text: 0 is written as a number, and YAML takes yes and no for true and false."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def _problems(d: TaskDescription, source: str) -> list[str]:
    """What is wrong with the values of a description."""
    if d.kind not in KINDS:
        rule = f"must be one of {', '.join(KINDS)}"
        return [problem(f"{source}: kind", d.kind, rule, "Write kind: classification, or leave it out")]
    found, columns = [], COLUMNS[d.kind]
    for key, needed in (("columns", columns[: NEEDED[d.kind]]), ("unlabelled", ())):
        given = getattr(d, key)
        if missing := [name for name in needed if name not in given]:
            rule = f"must say where the {' and the '.join(missing)} is"
            cure = f"Write {key}: {{{missing[0]}: NAME}}, the name of the column or field, or its number from 0 on"
            found.append(problem(f"{source}: {key}", dict(given) or Words("nothing"), rule, cure))
        for name, place in given.items():
            if name not in columns or isinstance(place, bool) or not isinstance(place, (str, int)):
                rule = f"must name {', '.join(columns)} by a column's name or number"
                found.append(problem(f"{source}: {key}", {name: place}, rule, "Correct it, or leave it out"))
    if d.kind == "classification" and (len(d.labels) < 2 or len(set(d.labels)) < len(d.labels)):
        rule, cure = (
            "must be at least two different labels",
            "Write for example labels: [no, yes], quoted: ['no', 'yes']",
        )
        found.append(problem(f"{source}: labels", list(d.labels), rule, cure))
    if d.kind == "multiple_choice" and d.choices < 2:
        found.append(problem(f"{source}: choices", d.choices, "must be at least 2", "Write choices: 4"))
    fitting = ("pearson",) if d.kind == "regression" else METRICS[:3] if d.kind == "classification" else METRICS[:1]
    if not d.metrics or any(name not in fitting for name in d.metrics):
        rule = f"must be of {', '.join(fitting)} for a task of the kind {d.kind}"
        found.append(problem(f"{source}: metrics", list(d.metrics), rule, f"Write metrics: [{fitting[0]}]"))
    elif "f1" in d.metrics and len(d.labels) != 2:
        rule = f"must not have f1, which is of two classes, with {len(d.labels)} labels"
        found.append(problem(f"{source}: metrics", list(d.metrics), rule, "Write metrics: [accuracy, matthews]"))
    return found


def defaults(task: str) -> dict[str, Any]:
    """The fields of RunConfig that follow from a task; see config/finetuning.py."""
    d = read_description(task)
    classes = {} if d.kind == "multiple_choice" else {"num_classes": d.classes}
    loss = "regression" if d.kind == "regression" else "classification"
    return {"model_type": KINDS[d.kind], "dataset": "classification", "loss": loss, "name": d.name, **classes}
