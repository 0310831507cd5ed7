"""Several whole steps, clipped and with AdamW, end in the weights of one process."""

import functools

import pytest
import torch

from megalith.optim.build import build_optimizer
from megalith.optim.loss_scale import StaticLossScale
from megalith.optim.schedule import Schedule
from megalith.parallel import mesh as meshes
from megalith.runtime.build import build_runtime
from megalith.testing import parity, run_ranks
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer, train_step
from megalith.training.tasks import LanguageModelling
from tests.parity.cases import LAYOUTS, config_of

STEPS = 3


def weights(form: str, layout: str | None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights after some steps, and each step's gradient norm before clipping."""
    config = config_of(form, layout).replace(lr=1e-2, clip_grad=0.5, lr_warmup_iters=0, train_iters=10)
    mesh = meshes.init_mesh(config.parallel)
    runtime = build_runtime(config, mesh, torch.float64)
    optimizer = build_optimizer(config.optimizer, runtime.named_parameters())
    schedule = Schedule(config.optimizer, config.schedule, config.batch.global_batch_size)
    trainer = Trainer(runtime, LanguageModelling(), optimizer, schedule, StaticLossScale())
    norms = []
    for number in range(STEPS):
        batches = parity.micro_batches(parity.batch(config, number), config.batch.micro_batch_size, mesh)
        norms.append(train_step(trainer, batches, Progress(iteration=number)).grad_norm)
    return {name: parity.full_tensor(parameter) for name, parameter in runtime.named_parameters()}, norms


@functools.cache
def on_one_process(form: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    return run_ranks(weights, 1, form, None)[0]


@pytest.mark.parametrize(
    ("form", "layout"),
    [
        ("dropout", "tp2 sp"),
        ("rotary", "tp4"),
        ("odd vocabulary", "tp2 sp dp2 full"),
        ("rotary", "tp2 dp2"),
        ("absolute", "tp2 dp2 optimizer"),
        pytest.param("lora", "tp2 sp dp2 full", marks=pytest.mark.slow),
        pytest.param("absolute", "dp 2x2", marks=pytest.mark.slow),
        pytest.param("dropout", "dp2 none", marks=pytest.mark.slow),
    ],
)
def test_steps_end_in_the_same_weights(form: str, layout: str) -> None:
    expected, norms = on_one_process(form)
    for found, others in run_ranks(weights, LAYOUTS[layout][0], form, layout):
        assert others == pytest.approx(norms, rel=1e-10) and norms[0] > 0.5
        for name, weight in found.items():
            if not name.endswith("k.bias"):  # its gradient is only rounding, of which Adam makes full steps
                torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-8)
