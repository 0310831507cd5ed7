"""What came of it: report.json and report.html of the folder, and a table on the terminal."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megalith import __version__
from megalith.common.files import write_text
from megalith.evaluation.records import read_records
from megalith.reports.page import Bars, Lines, page
from megalith.reports.table import Table, number_text, print_table
from megalith.workflows.detoxify.options import DetoxifyOptions
from megalith.workflows.detoxify.texts import Record, toxicity_of
from megalith.workflows.detoxify.toxicity import EXPECTED, toxicity

SHOWN = ("perplexity", "adjusted perplexity", "bits per byte")  # of what `evaluate ppl` gives


def write_report(
    folder: pathlib.Path, options: DetoxifyOptions, samples: Sequence[Record],
    continued: Mapping[str, Sequence[Record]], about: Mapping[str, Any],
) -> None:  # fmt: skip
    """samples: the scored texts. continued: {"before": ..., "after": ...}, scored continuations, prompt by prompt.

    The same files give the same bytes: there are no times in it.
    """
    size, found = options.continuations, dict[str, Any]()
    held = read_records(str(folder / "measured" / "perplexity.json"))
    for (name, records), perplexity in zip(continued.items(), held, strict=True):
        scores = list(map(toxicity_of, records))
        groups = [scores[first : first + size] for first in range(0, len(scores), size)]
        metrics = {each: metric._asdict() for each, metric in toxicity(groups, options.threshold).items()}
        found[name] = metrics | {each: perplexity["metrics"][each] for each in SHOWN if each in perplexity["metrics"]}
    texts = samples_summary(samples, options)
    result = {"megalith": __version__, "settings": about, "samples": texts, **found}
    write_text(folder / "report.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    table = comparison(found)
    bars = [
        Bars(each, [(name, found[name][each]["value"], number_text(found[name][each]["value"])) for name in found])
        for each in (EXPECTED, "toxicity probability", "perplexity") if each in found["before"]
    ]  # fmt: skip
    listed = Table("Texts of its own", ["number", "value"], [[name, str(value)] for name, value in texts.items()], [1])
    settings = Lines("Settings", [f"{name}: {value}" for name, value in about.items()])
    write_text(folder / "report.html", page(f"megalith {__version__}: detoxify", [table, *bars, listed, settings]))
    print_table(table)


def samples_summary(samples: Sequence[Record], options: DetoxifyOptions) -> dict[str, Any]:
    """How many texts there were, how toxic, and how toxic those that were kept."""
    scores = sorted(score for record in samples if (score := toxicity_of(record)) is not None)
    kept = scores[: int(len(scores) * options.keep_fraction)]
    return {
        "texts": len(samples), "without a score": len(samples) - len(scores), "kept": len(kept),
        "mean toxicity": statistics.fmean(scores), "mean toxicity of the kept": statistics.fmean(kept),
        "highest toxicity of the kept": kept[-1],
        "toxic": sum(score >= options.threshold for score in scores),
    }  # fmt: skip


def comparison(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """A row for each number."""
    rows = []
    for name, metric in found["before"].items():
        before, after = metric["value"], found["after"][name]["value"]
        change = "" if isinstance(before, int) else f"{after - before:+.4g}"
        rows.append([name, number_text(before), number_text(after), change, metric["definition"]])
    return Table("Before and after", ["number", "before", "after", "change", "definition"], rows, (1, 2, 3))
