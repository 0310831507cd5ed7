"""In-batch negatives: a whole run has one curve, whatever the layout and the size of micro-batches."""

import pytest

from megalith.testing import run_ranks
from megalith.training.pretrain import train
from tests.tiny import records, tiny_config
from tests.training.test_pooled import TASK

CURVES = {
    "micro-batches of 2": (1, {"micro_batch_size": 2}),
    "dp2": (2, {}),
    "dp4": (4, {"micro_batch_size": 2}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
}


def curve(corpus, folder, **changes):
    """The config of a few steps on a corpus."""
    values = {
        "add_bias_linear": False,
        "train_iters": 4,
        "eval_interval": 4,
        "save_interval": None,
        "loss": TASK,
    } | changes
    return tiny_config(corpus, str(folder), **values)


def measurements(folder):
    """(loss, accuracy) of each step and of each validation."""
    lines = [line for line in records(str(folder)) if "test_loss" not in line]
    losses = [line.get("loss", line.get("validation_loss")) for line in lines]
    metrics = [line.get("metrics", line.get("validation_metrics", {})) for line in lines]
    return [(loss, *values.values()) for loss, values in zip(losses, metrics, strict=True)]


@pytest.fixture(scope="module")
def one_process(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive")
    run_ranks(train, 1, curve(corpus, folder, micro_batch_size=8))
    return measurements(folder)


def test_half_precision_follows(corpus, tmp_path, one_process):
    run_ranks(train, 2, curve(corpus, tmp_path, pipeline_model_parallel_size=2, bf16=True))
    assert [loss for loss, _ in measurements(tmp_path)] == pytest.approx([loss for loss, _ in one_process], rel=3e-2)


@pytest.mark.parametrize("case", CURVES)
def test_one_curve(corpus, tmp_path, one_process, case):
    ranks, changes = CURVES[case]
    run_ranks(train, ranks, curve(corpus, tmp_path, **changes))
    assert len(one_process) == 4 + 2 and one_process[3][0] < one_process[1][0]
    for (loss, accuracy), (other, share) in zip(one_process, measurements(tmp_path), strict=True):
        assert other == pytest.approx(loss, rel=1e-4) and share == pytest.approx(accuracy, abs=0.13), (
            "of 8 samples one may be a tie"
        )
