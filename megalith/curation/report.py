"""The report of corpus work: JSON for programs, one self-contained HTML page for people.

Reports of evaluation results could share `page` and its style; nothing here knows of corpora but `_section`.
"""

from __future__ import annotations

import dataclasses
import html
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import megalith
from megalith.common import units
from megalith.common.files import write_text
from megalith.curation.parts import EXAMPLES

if TYPE_CHECKING:
    from megalith.curation.run import Run

REPORTS = ("report.json", "report.html")
LIBRARIES = ("ftfy", "rensa", "py3langid", "mwparserfromhell", "tldextract", "trafilatura", "numpy", "orjson")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100%; margin: 1rem 0 }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.bar { background: #ddd; height: .9rem } .bar div { background: #47a; height: .9rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: .5rem; margin: .3rem 0 }
details { margin: .2rem 0 } .small { color: #666; font-size: .85rem }
"""


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
    write_text(f"{output}.{REPORTS[1]}", page(pathlib.Path(output).name, steps))
    write_text(f"{output}.{REPORTS[0]}", json.dumps({"steps": list(steps)}, indent=1, default=str) + "\n")


def page(title: str, steps: Sequence[dict]) -> str:
    """The HTML page: a funnel of all steps, then each step. Every text is escaped; nothing is loaded from elsewhere."""
    body = [f"<h1>{html.escape(title)}</h1>", _funnel(steps), *map(_section, steps)]
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _funnel(steps: Sequence[dict]) -> str:
    most = max([1, *(step["documents"] for step in steps)])
    rows = []
    first = [("input", steps[0]["documents"], steps[0]["bytes"])] if steps else []
    for name, documents, size in first + [(s["step"], s["kept"], s["kept_bytes"]) for s in steps]:
        bar = f'<div class=bar><div style="width:{documents / most:.2%}"></div></div>'
        rows.append(_row([name, f"{documents:,}", units.size(size)], bar))
    return f"<table>{_heads(['', 'documents', 'bytes'])}{''.join(rows)}</table>"


def _heads(names: Sequence[str]) -> str:
    cells = (f"<th{' class=n' if i else ''}>{html.escape(name)}</th>" for i, name in enumerate(names))
    return f"<tr>{''.join(cells)}<th></th></tr>"


def _row(cells: Sequence[Any], more: str = "") -> str:
    shown = (f"<td{' class=n' if i else ''}>{html.escape(str(cell))}</td>" for i, cell in enumerate(cells))
    return f"<tr>{''.join(shown)}<td style='width:60%'>{more}</td></tr>"


def _section(step: dict) -> str:
    seconds = step["seconds"]["all"]
    rate = f"{step['documents'] / max(seconds, 1e-9):,.0f} documents/s"
    lines = [f"<h2>{html.escape(step['step'])}</h2>"]
    lines.append(f"<p>{step['documents']:,} documents in, {step['kept']:,} out, in {units.duration(seconds)} ({rate}).")
    if step["unusable"]:
        lines.append(f" {step['unusable']:,} lines held no document.")
    lines.append("</p>")
    rules = sorted(step["rules"].items(), key=lambda item: -item[1]["documents"])
    for title, changed in (("Dropped", False), ("Changed", True)):
        rows = [_rule(rule, found) for rule, found in rules if found["changed"] is changed]
        if rows:
            lines.append(f"<h3>{title}</h3><table>{_heads(['rule', 'documents', 'characters'])}{''.join(rows)}</table>")
    known = {"rules", "documents", "bytes", "kept", "kept_bytes", "unusable", "step", "key", "samples", "picture"}
    if picture := step.get("picture"):
        lines.append(f'<img alt="lengths of documents" src="data:image/png;base64,{html.escape(picture)}">')
    for name, value in step.items():
        if name not in known and value not in ([], {}, None, ""):
            text = html.escape(json.dumps(value, indent=1, ensure_ascii=False, default=str))
            lines.append(f"<details><summary>{html.escape(name)}</summary><pre>{text}</pre></details>")
    return "".join(lines)


def _rule(rule: str, found: dict) -> str:
    shown = []
    for example in found["examples"]:
        head = html.escape(f"{example['where']} {example['found']}".strip())
        texts = [example["text"], *([example["after"]] if "after" in example else [])]
        shown.append(f"<span class=small>{head}</span>" + "".join(f"<pre>{html.escape(t)}</pre>" for t in texts))
    more = f"<details><summary>examples</summary>{''.join(shown)}</details>" if shown else ""
    return _row([rule, f"{found['documents']:,}", f"{found['characters']:,}"], more)
