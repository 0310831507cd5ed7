"""The report of corpus work: JSON for programs, one self-contained HTML page for people."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import megalith
from megalith.common import units
from megalith.common.files import write_text
from megalith.curation.parts import EXAMPLES
from megalith.reports.page import Bars, Folded, Lines, Part, Picture, page
from megalith.reports.table import Table

if TYPE_CHECKING:
    from megalith.curation.run import Run

REPORTS = ("report.json", "report.html")
LIBRARIES = ("ftfy", "rensa", "py3langid", "mwparserfromhell", "tldextract", "trafilatura", "numpy", "orjson")
# Of a step's report, what the page shows in its own way, or not at all.
SHOWN = {"rules", "documents", "bytes", "kept", "kept_bytes", "unusable", "step", "key", "samples", "picture"}


def merged_rules(records: Iterable[dict], locate: Callable[[int, int, int], str]) -> dict[str, dict]:
    """What each rule did over all parts; examples are the first ones, with the `file:line` of their documents."""
    merged: dict[str, dict] = {}
    for record in records:
        for rule, found in record["rules"].items():
            known = merged.setdefault(
                rule, {"documents": 0, "characters": 0, "changed": found["changed"], "examples": []}
            )
            known["documents"] += found["documents"]
            known["characters"] += found["characters"]
            for example in found["examples"][: EXAMPLES - len(known["examples"])]:
                where = locate(record["part"], *example["where"])
                known["examples"].append(example | {"where": where})
    return merged


def step_report(run: Run, facts: dict[str, Any], elapsed: float) -> dict[str, Any]:
    """One step as the report tells it. facts: what the command says itself; a `kept` among them replaces the counts."""
    read = run.reading
    counts = {
        "documents": read.total("documents"),
        "bytes": read.total("bytes"),
        "unusable": read.total("num_problems"),
        "kept": read.total("kept"),
        "kept_bytes": read.total("kept_bytes"),
    }
    return {
        "step": run.command.name,
        "settings": dataclasses.asdict(run.command),
        "input": [str(path) for path in run.options.input],
        "output": run.output,
        "not_read": run.inputs.not_read,
        **counts,
        "problems": getattr(run, "problems", [])[:1000],
        "rules": {},
        **facts,
        "seconds": {name: round(value, 3) for name, value in run.seconds.items()} | {"all": round(elapsed, 3)},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of megalith, Python and the libraries that decide what is kept."""
    found = {"megalith": megalith.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_report(output: str, steps: Sequence[dict]) -> None:
    """Write both reports beside `output`: the page first, because the JSON vouches for the output."""
    write_text(f"{output}.{REPORTS[1]}", report_page(pathlib.Path(output).name, steps))
    write_text(f"{output}.{REPORTS[0]}", json.dumps({"steps": list(steps)}, indent=1, default=str) + "\n")


def report_page(title: str, steps: Sequence[dict]) -> str:
    """The HTML page: a funnel of all steps, then each step."""
    first = [("input", steps[0]["documents"], steps[0]["bytes"])] if steps else []
    counts = first + [(step["step"], step["kept"], step["kept_bytes"]) for step in steps]
    funnel = [(name, documents, f"{documents:,} documents, {units.size(size)}") for name, documents, size in counts]
    return page(title, [Bars("Documents", funnel), *(part for step in steps for part in _parts(step))])


def _parts(step: dict) -> Iterator[Part]:
    """What the page shows of a step."""
    seconds = step["seconds"]["all"]
    rate = f"{step['documents'] / max(seconds, 1e-9):,.0f} documents/s"
    lines = [f"{step['documents']:,} documents in, {step['kept']:,} out, in {units.duration(seconds)} ({rate})"]
    if step["unusable"]:
        lines.append(f"{step['unusable']:,} lines held no document")
    yield Lines(step["step"], lines)
    rules = sorted(step["rules"].items(), key=lambda item: -item[1]["documents"])
    for what, changed in (("dropped", False), ("changed", True)):
        own = [(rule, found) for rule, found in rules if found["changed"] is changed]
        if own:
            rows = [(rule, f"{found['documents']:,}", f"{found['characters']:,}") for rule, found in own]
            yield Table(f"{step['step']}: {what}", ("rule", "documents", "characters"), rows, (1, 2))
        for rule, found in own:
            if found["examples"]:
                yield Folded(f"examples of {rule}", list(_examples(found["examples"])))
    if picture := step.get("picture"):
        yield Picture("lengths of documents", picture)
    for name, value in step.items():
        if name not in SHOWN and value not in ([], {}, None, ""):
            yield Folded(name, [("", json.dumps(value, indent=1, ensure_ascii=False, default=str))])


def _examples(examples: Iterable[dict]) -> Iterator[tuple[str, str]]:
    for example in examples:
        yield f"{example['where']} {example['found']}".strip(), example["text"]
        if "after" in example:
            yield "became", example["after"]
