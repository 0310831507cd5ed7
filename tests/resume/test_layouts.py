"""A checkpoint opens in any layout: saved by tensor 2 x pipeline 2 x data 2, resumed in others, with dropout."""

import pathlib
import shutil

import pytest

from megalith.common.errors import ConfigError
from megalith.training.pretrain import train
from tests.tiny import losses, records, tiny_config

SAVED, STEPS = 5, 15
SAVED_IN = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "micro_batch_size": 1}
pytestmark = pytest.mark.slow  # eight processes; test_bits.py resumes in other layouts in `make test`
# name -> (processes, what differs from one process)
LAYOUTS: dict[str, tuple[int, dict]] = {
    "one process": (1, {}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "pp4 interleaved": (
        4,
        {"pipeline_model_parallel_size": 4, "num_layers_per_virtual_pipeline_stage": 1, "micro_batch_size": 1},
    ),
    "tp2 sp dp2 full": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "data_parallel_sharding": "full",
            "micro_batch_size": 2,
        },
    ),
}


def run(config) -> None:
    """On each rank of a pool."""
    train(config)


@pytest.fixture(scope="module")
def runs(ranks, corpus, tmp_path_factory) -> pathlib.Path:
    """A folder with two runs by 8 processes: `whole`, of 15 steps, and `stopped`, ended after 5 of them."""
    folder = tmp_path_factory.mktemp("layouts")
    for name, changes in {"whole": {}, "stopped": {"exit_interval": SAVED}}.items():
        ranks(run, 8, config_of(corpus, folder / name, **SAVED_IN, **changes), timeout=240)
    assert len(losses(str(folder / "whole"))) == STEPS and len(losses(str(folder / "stopped"))) == SAVED
    return folder


def config_of(corpus: str, folder: pathlib.Path, **changes):
    return tiny_config(corpus, str(folder), **({"num_layers": 8, "train_iters": STEPS, "eval_iters": 0} | changes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumes_in_another_layout(ranks, runs, layout, corpus, tmp_path):
    processes, changes = LAYOUTS[layout]
    shutil.copytree(runs / "stopped", tmp_path / "moved")
    ranks(run, processes, config_of(corpus, tmp_path / "moved", **changes), timeout=240)
    expected, found = (records(str(folder)) for folder in (runs / "whole", tmp_path / "moved"))
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in found[SAVED:]] == pytest.approx(
            [line[key] for line in expected[SAVED:]], rel=1e-4
        )


def test_without_the_optimizer_the_curve_is_another(runs, corpus, tmp_path):
    """So the comparison above would notice optimizer state that did not come along."""
    train(config_of(corpus, tmp_path / "moved", load=str(runs / "stopped" / "checkpoints"), no_load_optim=True))
    expected, found = (losses(str(folder))[-1] for folder in (runs / "whole", tmp_path / "moved"))
    assert found != pytest.approx(expected, rel=1e-3)


def test_a_batch_that_does_not_divide_is_an_error(ranks, runs, corpus, tmp_path):
    shutil.copytree(runs / "stopped", tmp_path / "moved")
    with pytest.raises(
        ConfigError, match="must be a multiple of --micro-batch-size 2 x data-parallel size 3 = 6; found 8"
    ):
        ranks(run, 3, config_of(corpus, tmp_path / "moved", micro_batch_size=2))
