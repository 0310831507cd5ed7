"""--profile-pipeline draws one step of a run."""

import pytest

from megalith.config.checks.checks import find_problems
from megalith.planner.timeline import Work
from megalith.runtime.timeline import Span, Timeline
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from megalith.training.reporting.profile import draw, summary
from tests.tiny import tiny_config, write_corpus


@pytest.fixture
def two_processes():
    """1F1B of two processes and two micro-batches: the second idles first and last."""
    works = [[("F", 0), ("F", 1), ("B", 0), ("B", 1)], [("F", 0), ("B", 0), ("F", 1), ("B", 1)]]
    starts = [[0.0, 1.0, 4.0, 7.0], [1.0, 2.0, 4.0, 5.0]]
    seconds = {"F": 1.0, "B": 2.0}
    spans = [
        Span(process, Work(kind, process, number), start, start + seconds[kind])
        for process in (0, 1)
        for (kind, number), start in zip(works[process], starts[process], strict=True)
    ]
    return Timeline("1f1b", 2, spans, spans)


def test_the_picture_and_its_words(two_processes, tmp_path):
    assert (
        summary(two_processes)
        == "idle 50.0% of computing time, at best 50.0% with stages of these speeds, 50.0% with equal ones"
    )
    draw(two_processes, tmp_path / "new" / "pipeline.png")
    assert (tmp_path / "new" / "pipeline.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_draws_its_third_step_or_its_last(tmp_path, steps):
    corpus = write_corpus(str(tmp_path / "corpus"))
    config = tiny_config(
        corpus,
        str(tmp_path / "run"),
        pipeline_model_parallel_size=2,
        profile_pipeline=True,
        train_iters=steps,
        lr_warmup_iters=0,
    )
    run_ranks(train, 2, config, timeout=200)
    assert (tmp_path / "run" / "pipeline.png").exists()


def test_without_a_pipeline_there_is_nothing_to_draw():
    texts = [problem.text for problem in find_problems(tiny_config("x", "y", profile_pipeline=True))]
    assert any("--profile-pipeline" in text and "--pipeline-model-parallel-size 2" in text for text in texts)
