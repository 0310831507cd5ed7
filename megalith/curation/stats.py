"""`megalith data stats`: what a corpus holds: documents, characters, words, tokens, languages, sources, lengths."""

from __future__ import annotations

import base64
import collections
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megalith.common.files import atomic_path, write_text
from megalith.curation.clean.language import identify
from megalith.curation.documents import Document
from megalith.curation.parts import PartOutput, Step
from megalith.curation.run import Command, Run
from megalith.curation.settings import StatsSettings
from megalith.curation.tokens import token_counter, tokenizer_files

MAX_SOURCES = 10_000  # of a part, and of the report; others are counted together
OTHER = "(other)"
BINS = 40  # of lengths: powers of the square root of 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats(StatsSettings, Command):
    """The step `megalith data stats`."""

    name = "stats"
    beside = ("lengths.png",)

    def files(self, output: str) -> Iterable[str]:
        """Those of the tokenizer."""
        return tokenizer_files(self.tokenizer)

    def run(self, run: Run) -> dict[str, Any]:
        """One pass; the output is the table as JSON, and a picture beside it."""
        done = run.step_pass(Count(self), "stats")
        values = done.values()
        table: dict[str, Any] = {name: int(value) for name, value in values.items() if ": " not in name}
        for kind in ("language", "source"):
            own = {name.partition(": ")[2]: int(n) for name, n in values.items() if name.startswith(f"{kind}: ")}
            if own:
                table[f"{kind}s"] = dict(sorted(own.items(), key=lambda item: (-item[1], item[0]))[:MAX_SOURCES])
        lengths = sum(done.arrays("histogram", np.int64), np.zeros(BINS, np.int64))
        table["lengths"] = {str(round(2 ** (i / 2))): int(n) for i, n in enumerate(lengths.tolist()) if n}
        run.begin_finish()
        write_text(run.output, json.dumps(table, indent=1, ensure_ascii=False) + "\n")
        picture = histogram(lengths)
        with atomic_path(run.beside("lengths.png"), run.still_held) as temporary:
            temporary.write_bytes(picture)
        count = max(1, table["documents"])
        lines = [f"{name}: {table[name]:,} ({table[name] / count:,.1f} a document)" for name in table if name in UNITS]
        kept = {"kept": done.total("documents"), "kept_bytes": done.total("bytes")}
        return kept | {"stats": table, "lines": lines, "picture": base64.b64encode(picture).decode()}


UNITS = ("characters", "words", "tokens", "utf8_bytes")


@dataclasses.dataclass
class Count(Step):
    """Counts the documents of a part."""

    settings: Stats
    name = "stats"
    writes = False

    def load(self) -> None:
        """The tokenizer, and no counts."""
        tokenizer = self.settings.tokenizer
        self.count_tokens = token_counter(tokenizer) if tokenizer else None
        self._reset()

    def _reset(self) -> None:
        self.histogram = np.zeros(BINS, np.int64)
        self.groups: dict[str, collections.Counter[str]] = {
            "language": collections.Counter(),
            "source": collections.Counter(),
        }

    def process(self, documents: Sequence[Document], out: PartOutput) -> None:
        """Count a batch."""
        texts = [document.text for document in documents]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        bins = np.minimum(np.floor(2 * np.log2(np.maximum(lengths, 1))).astype(np.int64), BINS - 1)
        self.histogram += np.bincount(bins, minlength=BINS)
        out.count("documents", len(texts))
        out.count("characters", int(lengths.sum()))
        out.count("utf8_bytes", sum(len(text.encode("utf-8", "surrogatepass")) for text in texts))
        out.count("words", sum(len(text.split()) for text in texts))
        if self.count_tokens:
            out.count("tokens", sum(map(self.count_tokens, texts)))
        if self.settings.languages:
            self.groups["language"].update(identify(text)[0] for text in texts)
        if key := self.settings.source_key:
            self.groups["source"].update(str(document.record.get(key, "")) for document in documents)

    def finish(self, out: PartOutput) -> None:
        """Write what the part has."""
        out.add("histogram", self.histogram)
        for kind, counts in self.groups.items():
            for name, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_SOURCES]:
                out.count(f"{kind}: {name}", number)
            if rest := counts.total() - sum(sorted(counts.values(), reverse=True)[:MAX_SOURCES]):
                out.count(f"{kind}: {OTHER}", rest)
        self._reset()


def histogram(lengths: np.ndarray) -> bytes:
    """A PNG of how many documents have how many characters."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.bar(np.arange(len(lengths)) / 2, lengths, width=0.45, align="edge")
    used = np.flatnonzero(lengths)
    low, high = (int(used[0]) // 2, int(used[-1]) // 2 + 2) if len(used) else (0, 2)
    ticks = range(low, high + 1)
    axes.set_xticks(list(ticks), [f"{2**tick:,}" for tick in ticks], rotation=45)
    axes.set_xlim(low, high)
    axes.set_xlabel("characters of a document")
    axes.set_ylabel("documents")
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return buffer.getvalue()
