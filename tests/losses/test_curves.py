"""Promise 1: one loss curve, whatever the layout, with the default dropout of 0.1 on hidden states and attention."""

import pytest

from megalith.training.pretrain import train
from tests.tiny import records, tiny_config

# name -> (processes, steps, the layout)
CASES: dict[str, tuple[int, int, dict]] = {
    "tp2 pp2": (4, 20, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 2}),
    "tp2 pp2 dp2": (8, 100, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 2}),
}
SLOW = ("tp2 pp2 dp2",)


def run(config) -> None:
    """On each rank of a pool."""
    train(config)


@pytest.mark.parametrize("layout", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_one_curve(ranks, layout, corpus, tmp_path):
    processes, steps, changes = CASES[layout]
    one = tiny_config(corpus, str(tmp_path / "one"), train_iters=steps, eval_interval=steps)
    assert one.model.hidden_dropout == one.model.attention_dropout == 0.1
    train(one)
    ranks(run, processes, one.replace(run_dir=str(tmp_path / "many"), **changes), timeout=280)
    expected, found = (records(str(tmp_path / name)) for name in ("one", "many"))
    for key, count in {"loss": steps, "grad_norm": steps, "validation_loss": 2}.items():
        curves = [[line[key] for line in lines if key in line] for lines in (expected, found)]
        assert len(curves[0]) == count
        assert curves[1] == pytest.approx(curves[0], rel=1e-4), key
