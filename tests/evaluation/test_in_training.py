"""Evaluation tasks as a validation duty of training: their numbers, what they leave alone, what fails and goes on."""

import json
import pathlib
import sys

import numpy as np
import pytest

import megalith
from megalith.common.errors import ConfigError, DataError
from megalith.config.run import RunConfig
from megalith.data.indexed import IndexedWriter
from megalith.data.tokenizers.tokenizer import load_tokenizer
from megalith.evaluation.evaluate import evaluate
from megalith.evaluation.in_training import Wanted, names_of, parse
from megalith.testing.ranks import run_ranks
from megalith.training.pretrain import train
from tests.evaluation.conftest import LAMBADA


@pytest.fixture(scope="module")
def data(gpt2: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of the passages."""
    prefix, tokenizer = str(tmp_path_factory.mktemp("data") / "passages"), load_tokenizer(gpt2)
    with IndexedWriter(prefix, np.uint16) as writer:
        for text in LAMBADA * 8:
            writer.add_sequence(np.array([*tokenizer.encode(text), tokenizer.require("eod")]))
            writer.end_document()
    return prefix


def config_of(gpt2: pathlib.Path, data: str, folder: pathlib.Path, **changes: object) -> RunConfig:
    values = dict(
        num_layers=2, hidden_size=32, num_attention_heads=4, seq_length=32, max_position_embeddings=32,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(gpt2 / "tokenizer.json"), data_path=[data],
        split="90,10,0", micro_batch_size=2, global_batch_size=4, train_iters=4, lr=5e-3, eval_interval=2, eval_iters=1,
        log_interval=2, run_dir=str(folder), progress="none", device="cpu",
    )  # fmt: skip
    return RunConfig().replace(**(values | changes))


def lines_of(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def metrics_of(folder: pathlib.Path, name: str) -> dict[int, dict[str, float]]:
    key = f"evaluation/{name}_metrics"
    return {line["step"]: line[key] for line in lines_of(folder) if key in line}


def test_a_run_measures_tasks_where_it_validates(
    gpt2: pathlib.Path, texts: pathlib.Path, data: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end the numbers of `evaluate` on the checkpoint; and training is the same to the bit."""
    passages = texts / "lambada.jsonl"
    tasks = [f"ppl={texts / 'mixed.jsonl'},overlapping_eval=8", f"lambada={passages},strict_lambada=true"]
    train(config_of(gpt2, data, tmp_path / "with", eval_tasks=tasks))
    shown = capsys.readouterr().out
    assert "metrics at iteration 2 for evaluation/ppl data | average loss value:" in shown
    assert "metrics at the end of training" not in shown  # step 4 is measured as one of the interval
    for name, file, options in (
        ("ppl", texts / "mixed.jsonl", {"overlapping_eval": 8}), ("lambada", passages, {"strict_lambada": True})
    ):  # fmt: skip
        found = metrics_of(tmp_path / "with", name)
        assert list(found) == [0, 2, 4]
        expected = evaluate(megalith.load(tmp_path / "with", device="cpu"), name, [str(file)], **options)
        values = {each: metric.value for each, metric in expected.metrics.items()}
        assert found[4] == pytest.approx(values, rel=1e-6) and found[0] != found[4]
    train(config_of(gpt2, data, tmp_path / "without"))
    steps = [
        [
            (line["step"], line.get("loss"), line.get("validation_loss"), line.get("grad_norm"))
            for line in lines_of(tmp_path / name) if "loss" in line or "validation_loss" in line
        ]
        for name in ("with", "without")
    ]  # fmt: skip
    assert steps[0] == steps[1] and len(steps[0]) == 7


FAILING = """
from megalith.evaluation.scoring import Sample
from megalith.evaluation.task import Prepared
from megalith.evaluation.result import Result

class Failing:
    def __init__(self, files, options): pass
    def prepare(self, tokenizer, seq_length):
        def conclude(scores):
            raise RuntimeError("no such luck")
        return Prepared([Sample([1, 2, 3], 2)], conclude)
"""


def test_a_task_that_fails_does_not_stop_the_run(
    gpt2: pathlib.Path, texts: pathlib.Path, data: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "failing_task.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    tasks = ["failing_task:Failing=none", f"ppl={texts / 'a.txt'}"]
    progress = train(config_of(gpt2, data, tmp_path / "run", split="100,0,0", eval_interval=3, eval_tasks=tasks))
    sys.modules.pop("failing_task")
    assert progress.iteration == 4 and list(metrics_of(tmp_path / "run", "ppl")) == [0, 3, 4]
    told = capsys.readouterr().err
    assert told.count("was not measured") == 3 and "RuntimeError: no such luck" in told


CASES = {
    "wikitext103": "--eval-tasks must be TASK=FILE",
    "wikitext=a.txt": "did you mean wikitext103?",
    "ppl=a.txt,strict=true": "did you mean strict_lambada?",
    "ppl=a.txt,overlapping_eval=few": "must be a whole number; found 'few'",
    "lambada=a.txt,strict_lambada=yes": "must be true or false; found 'yes'",
}


@pytest.mark.parametrize("text", CASES)
def test_what_is_no_task_is_told(text: str) -> None:
    with pytest.raises(ConfigError, match=CASES[text].replace("?", r"\?")):
        parse([text])


def test_what_a_task_cannot_read_is_told_before_the_first_step(
    gpt2: pathlib.Path, data: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(DataError, match=r"--eval-tasks ppl=nowhere.txt: .* must be a readable file"):
        train(config_of(gpt2, data, tmp_path / "run", eval_tasks=["ppl=nowhere.txt"]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_names() -> None:
    wanted = [Wanted("ppl", "a/law.txt", {}), Wanted("ppl", "b/news.txt", {}), Wanted("lambada", "c", {})]
    assert names_of(wanted) == ["ppl/law", "ppl/news", "lambada"]
    with pytest.raises(ConfigError, match="must name each task and file once"):
        names_of([*wanted, Wanted("ppl", "c/law.txt", {})])


LAYOUTS = {
    "tensor, sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "context": {"context_parallel_size": 2},
    "sharded data": {"use_distributed_optimizer": True, "bf16": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_any_layout(gpt2: pathlib.Path, texts: pathlib.Path, data: str, tmp_path: pathlib.Path, layout: str) -> None:
    options = LAYOUTS[layout]
    tasks = [f"ppl={texts / 'mixed.jsonl'}"]
    one = config_of(gpt2, data, tmp_path / "one", eval_tasks=tasks, bf16=options.get("bf16", False))
    train(one)
    run_ranks(in_layout, 2, one.replace(run_dir=str(tmp_path / "two"), **options))
    expected, found = metrics_of(tmp_path / "one", "ppl"), metrics_of(tmp_path / "two", "ppl")
    assert list(found) == [0, 2, 4]
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=2e-2 if "bf16" in options else 1e-4)


def in_layout(config: RunConfig) -> None:
    train(config)
