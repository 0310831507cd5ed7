"""docs/accelerate.md: its script runs with Accelerate, and after the one change in layouts, with the same losses."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.integrations.accelerate.helpers import toy_model

REPOSITORY = pathlib.Path(__file__).parents[3]
DOCS = REPOSITORY / "docs/accelerate.md"
LAYOUTS = {"tp2 pp2": (4, 2, 2), "dp2": (2, 1, 1)}  # processes, tp, pp


def script() -> str:
    """The script of the docs."""
    (found,) = [
        text for text in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.S) if "accelerator.prepare" in text
    ]
    return found


def run(command: list[str], folder: pathlib.Path) -> str:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_five_steps(layout: str, tmp_path: pathlib.Path) -> None:
    processes, tp, pp = LAYOUTS[layout]
    (before := tmp_path / "before").mkdir()
    for folder in (tmp_path, before):
        toy_model("llama").save_pretrained(folder / "model")
    (before / "train.py").write_text(script())
    end = re.compile(r"^loss \d.*, learning rate 0\.0$", re.M)  # so that the schedule is as long as the training
    assert end.search(run([sys.executable, "train.py"], before))
    (tmp_path / "train.py").write_text(script().replace("from accelerate import", "from megalith.accelerate import"))
    megalith = [sys.executable, "-m", "megalith"]
    layout_answers = [str(tp), *["yes"] * (tp > 1), str(pp), *["2"] * (pp > 1)]
    answers = ["0", "2", "", "no", "no", "yes", *layout_answers, "no", "no", "1.0", str(processes), "no"]
    asked = subprocess.run(
        [*megalith, "config", "--accelerate", "--config_file", "layout.yaml"], cwd=tmp_path, text=True,
        input="\n".join(answers) + "\n", capture_output=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stdout + asked.stderr
    out = run([*megalith, "launch", "--config_file", "layout.yaml", "--cpu", "train.py"], tmp_path)
    assert end.search(out), out
    assert (tmp_path / "trained" / "config.json").is_file()
    loaded = run([sys.executable, "-c", LOAD], tmp_path)
    assert "LlamaForCausalLM" in loaded
    inspected = run([*megalith, "checkpoint", "inspect", "state"], tmp_path)
    assert "llama" in inspected or "gpt" in inspected


LOAD = "import transformers; print(type(transformers.AutoModelForCausalLM.from_pretrained('trained')).__name__)"
