"""Promise 1: one loss curve, whatever the layout, with the default dropout of 0.1 on hidden states and attention."""

import pathlib

import pytest

from megalith.training.pretrain import train
from tests.tiny import records, tiny_bert, tiny_config, tiny_t5

# name -> (processes, steps, the layout)
CASES: dict[str, tuple[int, int, dict]] = {
    "tp2 pp2": (4, 20, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 2}),
    "tp2 pp2 dp2": (
        8,
        100,
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 2},
    ),
}
SLOW = ("tp2 pp2 dp2",)
BERT: dict[str, tuple[int, dict]] = {
    "tp2 sp pp2": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "micro_batch_size": 2,
        },
    ),
    "cp2 dp2": (4, {"context_parallel_size": 2}),
}


def run(config) -> None:
    """On each rank of a pool."""
    train(config)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_one_curve(ranks, layout, corpus, tmp_path):
    processes, steps, changes = CASES[layout]
    assert_one_curve(
        ranks, tiny_config(corpus, str(tmp_path / "one"), train_iters=steps, eval_interval=steps), processes, changes
    )


@pytest.mark.parametrize("layout", BERT)
def test_one_curve_of_bert(ranks, layout, sentences, tmp_path):
    """Both of its losses have their own normaliser, whose counts are spread over processes in their own ways."""
    processes, changes = BERT[layout]
    assert_one_curve(
        ranks, tiny_bert(sentences, str(tmp_path / "one"), train_iters=20, eval_interval=20), processes, changes
    )
    for lines in (records(str(tmp_path / name)) for name in ("one", "many")):
        assert all(line["loss"] == pytest.approx(sum(line["losses"].values())) for line in lines if "losses" in line)


@pytest.mark.slow
@pytest.mark.parametrize("layout", BERT)
def test_one_curve_of_t5(ranks, layout, sentences, tmp_path):
    """Three copies of the embedding, a table of biases per stage, two padded sequences of different lengths."""
    one = tiny_t5(
        sentences, str(tmp_path / "one"), train_iters=20, eval_interval=20, position_embedding_type="relative"
    )
    assert_one_curve(ranks, one, *BERT[layout])


def assert_one_curve(ranks, one, processes, changes):
    """A run on one process, and on many with `changes`."""
    steps, tmp_path = one.schedule.train_iters, pathlib.Path(one.run_folder).parent
    assert one.model.hidden_dropout == one.model.attention_dropout == 0.1
    train(one)
    ranks(run, processes, one.replace(run_dir=str(tmp_path / "many"), **changes), timeout=280)
    expected, found = (records(str(tmp_path / name)) for name in ("one", "many"))
    for key, count in {"loss": steps, "grad_norm": steps, "validation_loss": 2}.items():
        curves = [[line[key] for line in lines if key in line] for lines in (expected, found)]
        assert len(curves[0]) == count
        assert curves[1] == pytest.approx(curves[0], rel=1e-4), key
