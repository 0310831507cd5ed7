"""docs/detoxify.md: its commands run at toy size, its tables name what there is."""

import pathlib
import re
import shlex
import shutil

import pytest

from megalith.cli.main import main
from megalith.workflows.detoxify.options import SCORERS, STEPS
from tests.toy import ROOT

DOCS = (ROOT / "docs" / "detoxify.md").read_text()


def test_its_tables_name_what_there_is() -> None:
    rows = [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in DOCS.splitlines() if line.startswith("| `")]
    names = [row[0] for row in rows]
    assert names[: len(STEPS)] == list(STEPS) and set(SCORERS) <= set(names)


@pytest.mark.slow
def test_its_commands_run(place: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "runs").mkdir()
    shutil.copytree(place / "model", tmp_path / "runs" / "first")
    for name in ("prompts.jsonl", "held_out.jsonl", "bad_words.txt"):
        shutil.copy(place / name, tmp_path)
    (service,) = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    (tmp_path / "my_service.py").write_text(service)
    blocks = re.findall(r"^```sh\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    commands = [line for body in blocks for line in body.replace("\\\n", " ").splitlines()]
    for line in commands:
        assert main([*shlex.split(line)[1:], "--device", "cpu"]) == 0, line
    assert len(commands) == 3 and (tmp_path / "runs/clean/report.html").is_file()
    assert (tmp_path / "runs/half/kept.jsonl").is_file() and (tmp_path / "runs/asked/scored/00000.jsonl").is_file()
