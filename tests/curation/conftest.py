"""Small corpora, and the shortest way to run a step on them."""

import json
import pathlib

import pytest

from megalith.curation.pipeline import build_command
from megalith.curation.run import RunOptions, execute


@pytest.fixture
def write(tmp_path):
    """`write(name, records)`: JSON lines in the test's folder; returns the path."""

    def write(name, records):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def step(tmp_path):
    """`step(verb, inputs, settings, **options)`: (records of the output, report), in this process by default."""

    def step(verb, inputs, settings=None, output="out.jsonl", **options):
        inputs = [inputs] if isinstance(inputs, str) else inputs
        path = str(tmp_path / output)
        options = {"engine": "inline"} | options
        report = execute(build_command(verb, settings or {}), RunOptions(input=inputs, output=path, **options))
        return read(path), report

    return step


def read(path):
    """The records of JSON lines."""
    return [json.loads(line) for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines()]
