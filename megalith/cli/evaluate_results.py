"""What `megalith evaluate` has measured so far: tables on standard output, files of --json, --html and --examples."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.cli.flags.load import CONTEXT, LAYOUT
from megalith.common.files import write_text
from megalith.config import environment
from megalith.evaluation.records import Record, read_records, record_of, tables, to_html, to_json
from megalith.evaluation.result import Result
from megalith.reports.table import print_table


class Results:
    """The results of a command. The first process alone shows and writes."""

    def __init__(self, args: argparse.Namespace):
        """Reads the files of --compare. Raises DataError where one is not of --json."""
        self.args, self.writes = args, environment.rank() == 0
        self.records, self.lines = list[Record](), list[str]()
        self.earlier = [record for path in args.compare for record in read_records(path)]

    def keep(
        self, result: Result, model: str, task: str, files: Sequence[str], settings: Mapping[str, Any], started: float
    ) -> None:  # fmt: skip
        """Keep a result, and show its notes. settings: the options of the task. started: by time.monotonic."""
        sizes = {name: getattr(self.args, name) for name in (*LAYOUT, CONTEXT) if getattr(self.args, name)}
        about = {"model": model, "task": task, "files": files}
        record = record_of(
            result, **about, settings={**settings, "dtype": self.args.dtype, **sizes},
            seconds=round(time.monotonic() - started, 3),
        )  # fmt: skip
        self.records.append(record)
        for note in record["notes"] if self.writes else ():
            print(f"megalith: {model}: {note}", file=sys.stderr, flush=True)
        if self.args.examples:
            of = {"model": model, "task": task}
            self.lines += [json.dumps(of | each, ensure_ascii=False, default=str) + "\n" for each in result.examples]

    def write(self) -> None:
        """Write the files. It is called after each model, so that a later one that fails takes nothing with it."""
        texts = {
            self.args.json: lambda: to_json(self.records),
            self.args.html: lambda: to_html([*self.earlier, *self.records]),
            self.args.examples: lambda: "".join(self.lines),
        }
        for path, text in texts.items():
            if path and self.writes:
                write_text(pathlib.Path(path), text())

    def show(self) -> int:
        """Print the tables; the exit status."""
        for table in tables([*self.earlier, *self.records]) if self.writes else ():
            print_table(table)
        return 0
