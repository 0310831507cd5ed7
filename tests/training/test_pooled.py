"""In-batch negatives: one loss and one gradient, whatever the layout and the size of micro-batches."""

import functools

import pytest
import torch

from megalith.parallel import mesh as meshes
from megalith.runtime.build import build_runtime
from megalith.testing import parity, run_ranks
from megalith.testing.parity import TOLERANCE, compare, measure, merge
from megalith.training import pooled
from megalith.training.tasks import build_task
from tests.parity.cases import SMALL

TASK = "tests.training.contrastive:Contrastive"
CONFIG = SMALL.replace(num_layers=4, hidden_dropout=0.1, attention_dropout=0.1, global_batch_size=8, loss=TASK)
CASES = {
    "micro-batches of 1": (1, {"micro_batch_size": 1}),
    "micro-batches of 4": (1, {"micro_batch_size": 4}),
    "recomputed": (1, {"micro_batch_size": 2, "recompute_activations": True}),
    "dp2": (2, {"micro_batch_size": 2}),
    "dp4": (4, {}),
    "dp2 full": (2, {"data_parallel_sharding": "full"}),
    "dp2 optimizer": (2, {"use_distributed_optimizer": True}),
    "tp2": (2, {"tensor_model_parallel_size": 2, "micro_batch_size": 2}),
    "tp2 sp dp2": (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "zbv": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}),
    "pp2 dp2": (4, {"pipeline_model_parallel_size": 2, "micro_batch_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp2 dp2": (4, {"context_parallel_size": 2}),
}  # fmt: skip


def at_once(config, dtype=torch.float64):
    """The definition: the whole batch in one piece, and autograd through all of it."""
    runtime = build_runtime(config, meshes.init_mesh(config.parallel), dtype)
    task, batch = build_task(config, runtime.mesh), parity.batch(config)
    runtime.begin_step(0)
    step = {"samples": batch["samples"], "step": torch.tensor(0)}
    output = runtime.model(**task.inputs(batch, {}), **step)
    loss = task.losses(task.pooled(output, batch), {}, task.counts(batch))["contrastive loss"]
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in runtime.named_parameters()}
    return parity.LayoutResult(float(loss), {}, gradients)


@functools.cache
def expected():
    return run_ranks(at_once, 1, CONFIG)[0]


SLOW = ("recomputed", "dp2 optimizer", "pp2 dp2", "cp2 dp2")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_the_gradient_is_that_of_the_batch_in_one_piece(case):
    ranks, changes = CASES[case]
    parts = run_ranks(measure, ranks, CONFIG.replace(**changes), torch.float64)
    whole = merge(parts)
    assert whole.gradients.keys() == expected().gradients.keys()
    for found in [*parts, whole]:  # what a part has not, another has
        here = parity.LayoutResult(found.loss, {}, expected().gradients | found.gradients)
        loss, worst, *_ = compare(expected(), here, torch.float64)
        assert loss.error <= TOLERANCE[torch.float64] and worst.error <= TOLERANCE[torch.float64], (loss, worst)


def gathered(config, contexts):
    """What each rank has of the pool: the samples of its own micro-batches, several numbers for each, gathered."""
    mesh = meshes.init_mesh(config.parallel)
    batches = parity.micro_batches({"samples": torch.arange(8)}, config.batch.micro_batch_size, mesh)
    local = torch.stack([batch["samples"] for batch in batches])
    return pooled.gather(mesh, local[..., None] * contexts + torch.arange(contexts))


@pytest.mark.parametrize("case", ["dp2", "dp4", "tp2 sp dp2", "pp2 dp2", "cp2 dp2"])
def test_gathering_is_over_data_parallel_ranks_alone_and_keeps_the_order(case):
    """Each sample once, in order, and with it its contexts: more copies would be more negatives."""
    ranks, changes = CASES[case]
    for found in run_ranks(gathered, ranks, CONFIG.replace(**changes), 3):
        assert found.tolist() == torch.arange(24).view(8, 3).tolist()
