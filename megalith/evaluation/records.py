"""Results of evaluations as records of JSON, as tables and as a page that compares models. Nothing here imports torch.

A record is one model on one task:

    {"model": "runs/first", "task": "lambada", "files": ["lambada_test.jsonl"], "settings": {...},
     "metrics": {"accuracy": {"value": 0.45, "definition": "..."}}, "sources": {}, "notes": [], "seconds": 12.3}
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from megalith import __version__
from megalith.common.errors import DataError, problem
from megalith.evaluation.result import Metrics, Result
from megalith.reports.page import Bars, Lines, Part, page
from megalith.reports.table import Table, number_text

Record = dict[str, Any]
# Metrics of which the page has a picture
MAIN = ("perplexity", "accuracy", "acc,none", "exact_match,none", "word_perplexity,none", "top-20 accuracy")


def record_of(result: Result, **about: Any) -> Record:
    """about: the other fields of the record; to its settings those of the result are added."""
    about["settings"] = about.get("settings", {}) | result.settings
    sources = {name: _plain(metrics) for name, metrics in result.sources.items()}
    return {**about, "metrics": _plain(result.metrics), "sources": sources, "notes": list(result.notes)}


def to_json(records: Sequence[Record]) -> str:
    """The text of a file of records. A number that is not finite, which JSON has not, is written as text."""
    return json.dumps({"megalith": __version__, "results": _finite(records)}, indent=1, ensure_ascii=False) + "\n"


def read_records(path: str) -> list[Record]:
    """The records of a file that `to_json` made. Raises DataError for another."""
    try:
        records = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))["results"]
        for record in records:
            _ = record["model"], record["task"], record["files"]
            for metrics in (record["metrics"], *record["sources"].values()):
                for metric in metrics.values():
                    metric["value"] = float(metric["value"]) if isinstance(metric["value"], str) else metric["value"]
                    _ = metric["definition"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        rule = f"must be a file of `megalith evaluate --json` ({type(error).__name__}: {error})"
        raise DataError(problem("--compare", path, rule, "Correct the path")) from None
    return records


def tables(records: Sequence[Record]) -> list[Table]:
    """For each task and its files a table of metrics, a column for each model; and one of sources, where there are."""
    found = []
    for (task, files), group in _groups(records).items():
        columns = ["metric", *(record["model"] for record in group), "definition"]
        numeric = range(1, 1 + len(group))
        # By name and definition: what is defined otherwise is another row
        names = dict.fromkeys((name, each["definition"]) for r in group for name, each in r["metrics"].items())
        rows = [[name, *(_value(r["metrics"], name, text) for r in group), text] for name, text in names]
        title = f"{task}: {', '.join(files)}" if files else task
        found.append(Table(title, columns, rows, numeric))
        sources = dict.fromkeys(source for record in group for source in record["sources"])
        for name in ("perplexity", "adjusted perplexity", "predicted tokens") if sources else ():
            rows = [[source, *(_value(r["sources"].get(source, {}), name) for r in group)] for source in sources]
            found.append(Table(f"{task} by source: {name}", ["source", *columns[1:-1]], rows, numeric))
    return found


def to_html(records: Sequence[Record]) -> str:
    """A page that compares the models."""
    parts: list[Part] = []
    for (task, _), group in _groups(records).items():
        for name in MAIN:
            values = [(r["model"], r["metrics"][name]["value"]) for r in group if name in r["metrics"]]
            finite = [(model, value, number_text(value)) for model, value in values if math.isfinite(value)]
            if finite:
                parts.append(Bars(f"{task}: {name}", finite))
    parts += tables(records)
    for record in records:
        settings = [f"{name}: {value}" for name, value in record.get("settings", {}).items()]
        lines = [*record.get("notes", []), *settings, f"seconds: {record.get('seconds', '?')}"]
        parts.append(Lines(f"{record['task']}, {record['model']}", lines))
    return page(f"megalith {__version__}: evaluation", parts)


def _groups(records: Sequence[Record]) -> dict[tuple[str, tuple[str, ...]], list[Record]]:
    groups: dict[tuple[str, tuple[str, ...]], list[Record]] = {}
    for record in records:
        groups.setdefault((record["task"], tuple(record["files"])), []).append(record)
    return groups


def _value(metrics: dict[str, dict], name: str, definition: str | None = None) -> str:
    metric = metrics.get(name)
    if metric is None or (definition is not None and metric["definition"] != definition):
        return "-"
    return number_text(metric["value"])


def _plain(metrics: Metrics) -> dict[str, dict[str, Any]]:
    return {name: {"value": metric.value, "definition": metric.definition} for name, metric in metrics.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "Infinity" if value > 0 else "-Infinity" if value < 0 else "NaN"
    return value
