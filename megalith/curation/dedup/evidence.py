"""What is written of every removal: which document, why, what stays in its place. What each source may lose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.curation.dedup.choose import Verdicts
from megalith.curation.dedup.links import Groups
from megalith.curation.dedup.origins import Names
from megalith.curation.documents import dump

EVIDENCE = "removed.jsonl"  # the end of the name of the file, beside the output
CLUSTERS = 20  # largest ones that the report names
RULES = {1: "exact", 2: "near"}


def write_evidence(
    path: str,
    groups: Groups,
    verdicts: Verdicts,
    indexed: int,
    name: Names,
    source_names: Sequence[str],
    source: np.ndarray,
) -> None:
    """A line for each removal: the document, the rule, its kept twin, their similarity, the link that was verified."""
    with open(path, "wb") as out:
        for number in np.flatnonzero(verdicts.verdict).tolist():
            kept, twin = int(verdicts.kept[number]), int(groups.twin[number])
            rule = RULES[int(verdicts.verdict[number])]
            line = name.described(number, "document") | {"rule": rule} | name.described(kept, "kept")
            line["similarity"] = round(float(verdicts.similarity[number]), 4)
            if rule == "near" and twin != kept and twin >= 0:
                line |= {"linked_to": name(twin), "link_similarity": round(float(groups.similarity[number]), 4)}
            out.write(dump(line | {"source": source_names[source[number - indexed]]}) + b"\n")


def clusters(groups: Groups, verdicts: Verdicts, name: Names) -> list[dict[str, Any]]:
    """The largest groups: many copies of one template are seen here."""
    sizes = np.bincount(groups.label)
    largest = np.argsort(-sizes, kind="stable")[:CLUSTERS]
    found = []
    for label in largest.tolist():
        if sizes[label] > 1:
            member = int(np.flatnonzero(groups.label == label)[0])
            found.append({"documents": int(sizes[label]), "kept": name(int(verdicts.kept[member]))})
    return found


def source_table(names: Sequence[str], total: np.ndarray, lost: np.ndarray, what: str) -> dict[str, dict[str, float]]:
    """{source: what it has ("documents"), what is removed of that, the share}, the largest loss first.

    total, lost: int [sources].
    """
    rows = [
        (name, {what: int(all_), "removed": int(gone), "share": round(gone / all_, 4)})
        for name, all_, gone in zip(names, total, lost)
        if all_
    ]
    return dict(sorted(rows, key=lambda row: (-row[1]["share"], row[0])))


def over_budget(table: Mapping[str, Mapping[str, float]], budget: float, fewest: int, what: str) -> list[str]:
    """Lines on the sources that have at least `fewest` and lose more than `budget` of them."""
    return [
        f"{name}: {row['removed']:.0f} of {row[what]:.0f} {what} would be removed ({row['share']:.1%})"
        for name, row in table.items()
        if row[what] >= fewest and row["share"] > budget
    ]


def stop_over_budget(lines: Sequence[str], budget: float, what: str, evidence: str) -> None:
    """Raise DataError on sources that lose too much."""
    if lines:
        rule = f"allows each source to lose {budget:.0%} of its {what}"
        cure = f"Look at {evidence}, then raise it, give another --threshold, or add --over-budget warn"
        listed = "".join(f"\n  {line}" for line in lines[:20])
        found = Words(f"{len(lines)} sources that lose more")
        raise DataError(problem("--source-budget", found, rule, cure) + listed)
