"""lm-evaluation-harness gives our model the scores that its own model of transformers gives the same weights."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import megalith
from megalith.common.errors import ConfigError
from megalith.testing.ranks import run_ranks
from tests.evaluation.tasks import TASKS, write_tasks

pytestmark = pytest.mark.slow  # importing lm-eval and its data sets takes most of a minute
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
Scores = dict[str, tuple[dict[str, float], list[Any]]]


def ours(folder: str, tasks: str, cache: str, layout: dict[str, int]) -> Scores:
    """Metrics and answers of each task."""
    os.environ.update(OFFLINE, HF_HOME=cache)
    from megalith.evaluation.harness import run_tasks

    results = run_tasks(
        megalith.load(folder, device="cpu", **layout), list(TASKS), include_path=tasks, batch_size=3, show=False
    )
    return {
        name: (
            {metric: each.value for metric, each in result.metrics.items()},
            [sample["filtered_resps"] for sample in result.examples],
        )
        for name, result in results.items()
    }


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def test_scores_are_those_of_transformers(gpt2: pathlib.Path, tasks: pathlib.Path, monkeypatch) -> None:
    for name, value in {**OFFLINE, "HF_HOME": str(tasks / "home")}.items():
        monkeypatch.setenv(name, value)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    original = HFLM(pretrained=str(gpt2), device="cpu", batch_size=1, dtype="float32")
    expected = lm_eval.simple_evaluate(original, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)))
    found = ours(str(gpt2), str(tasks), str(tasks / "home"), {})
    for name in TASKS:
        metrics, answers = found[name]
        theirs = {key: each for key, each in expected["results"][name].items() if key in metrics}
        assert theirs and metrics == pytest.approx(theirs, rel=1e-5, nan_ok=True)
        for one, other in zip(answers, (each["filtered_resps"] for each in expected["samples"][name]), strict=True):
            if name == "choices":
                assert [loss for loss, _ in one] == pytest.approx([loss for loss, _ in other], rel=1e-4)
                assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
            elif name == "writing":
                assert one == other
            else:
                assert one == pytest.approx(other, rel=1e-5)
    assert 0 < found["choices"][0]["acc,none"] < 1


@pytest.mark.parametrize(
    "layout", [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"context_parallel_size": 2}]
)
def test_every_layout(layout: dict[str, int], gpt2: pathlib.Path, tasks: pathlib.Path) -> None:
    arguments = str(gpt2), str(tasks), str(tasks / "home")
    expected = ours(*arguments, {})
    first, _ = run_ranks(ours, 2, *arguments, layout, timeout=280)
    assert first.keys() == expected.keys()
    for name, (metrics, answers) in first.items():
        assert metrics == pytest.approx(expected[name][0], rel=1e-5, nan_ok=True)
        if name == "writing":
            assert answers == expected[name][1]


def test_the_harness_and_its_own_command_line(gpt2: pathlib.Path, tasks: pathlib.Path, tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    own = [
        "megalith.evaluation", "run", "--model", "megalith", "--model_args", f"path={gpt2},device=cpu", "--tasks",
        "choices", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--batch_size", "2",
    ]  # fmt: skip
    verb = [
        "megalith", "evaluate", "--harness", "choices", "--include-path", str(tasks), str(gpt2), "--device", "cpu",
        "--json", str(tmp_path / "ours.json"), "--limit", "3",
    ]  # fmt: skip
    for command in (own, verb):
        done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, timeout=800)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
    [file] = (tmp_path / "out").rglob("results_*.json")
    expected = ours(str(gpt2), str(tasks), str(tmp_path / "home"), {})["choices"][0]
    assert json.loads(file.read_text())["results"]["choices"]["acc,none"] == expected["acc,none"]
    [record] = json.loads((tmp_path / "ours.json").read_text())["results"]
    assert record["task"] == "choices" and record["metrics"]["sample_len"]["value"] == 3


def test_tasks_that_there_are_not(gpt2: pathlib.Path) -> None:
    from megalith.evaluation.harness import run_tasks

    with pytest.raises(ConfigError, match=r"--harness must name tasks of lm-evaluation-harness; found 'nothing-such'"):
        run_tasks(megalith.load(gpt2, device="cpu"), ["nothing-such"])


def test_generation_options() -> None:
    from megalith.evaluation.harness import NEW_TOKENS, generation_params

    params = generation_params({"until": ["\n", ""], "max_new_tokens": 5})
    assert (params.temperature, params.stop, params.max_new_tokens) == (0.0, ("\n",), 5)
    params = generation_params({"until": "x", "do_sample": True, "temperature": 0.7, "top_p": 0.9})
    assert (params.temperature, params.top_p, params.max_new_tokens) == (0.7, 0.9, NEW_TOKENS)
    assert generation_params({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    with pytest.raises(ConfigError, match=r"generation_kwargs must be among .*; found num_beams"):
        generation_params({"num_beams": 4})
