"""Training and evaluating through a pipeline is training and evaluating; gradients of one step are in tests/parity."""

import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megalith import checkpoint
from megalith.config.flags.loading import to_yaml
from megalith.optim.build import build_optimizer
from megalith.optim.loss_scale import StaticLossScale
from megalith.optim.schedule import Schedule
from megalith.parallel import mesh as meshes
from megalith.runtime import state
from megalith.runtime.build import build_runtime
from megalith.testing import parity, run_ranks
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer, train_step
from megalith.training.tasks import LanguageModelling
from megalith.training.validation import evaluate
from tests.parity.cases import SMALL

PP, TP, VIRTUAL = "pipeline_model_parallel_size", "tensor_model_parallel_size", "num_layers_per_virtual_pipeline_stage"
CONFIG = SMALL.replace(
    num_layers=4, hidden_dropout=0.1, attention_dropout=0.1, global_batch_size=8, lr=1e-2, lr_warmup_iters=0,
    train_iters=10, clip_grad=0.1,
    add_bias_linear=False,  # the key bias has no gradient, and Adam would make steps of rounding
)  # fmt: skip
LAYOUTS = {
    "gpipe": (2, {PP: 2, "pipeline_schedule": "gpipe"}),
    "1f1b": (2, {PP: 2}),
    "four stages": (4, {PP: 4}),
    "interleaved": (2, {PP: 2, VIRTUAL: 1}),
    "zero-bubble": (2, {PP: 2, VIRTUAL: 1, "pipeline_schedule": "zero_bubble"}),
    "zbv": (2, {PP: 2, "pipeline_schedule": "zbv"}),
    "dualpipev": (2, {PP: 2, "pipeline_schedule": "dualpipev"}),
    "zbv, dp": (4, {PP: 2, "pipeline_schedule": "zbv"}),
    "zbv, tp and sp": (4, {PP: 2, TP: 2, "sequence_parallel": True, "pipeline_schedule": "zbv"}),
    "1f1b, ZeRO-2": (4, {PP: 2, "use_distributed_optimizer": True}),
    "interleaved, ZeRO-3": (4, {PP: 2, VIRTUAL: 1, "data_parallel_sharding": "full"}),
    "zero-bubble, ZeRO-3": (4, {PP: 2, "pipeline_schedule": "zero_bubble", "data_parallel_sharding": "full"}),
    "zbv, ZeRO-2": (4, {PP: 2, "pipeline_schedule": "zbv", "use_distributed_optimizer": True}),
}


class Batches:
    """Stands for a loader: global batches of parity.batch, one per step."""

    def __init__(self, config, mesh):
        self.config, self.mesh = config, mesh

    def step(self, consumed, size):
        global_batch = parity.batch(self.config.replace(global_batch_size=size), step=consumed)
        return parity.micro_batches(global_batch, self.config.batch.micro_batch_size, self.mesh)


def trainer(config):
    mesh = meshes.init_mesh(config.parallel)
    runtime = build_runtime(config, mesh)
    optimizer = build_optimizer(config.optimizer, runtime.named_parameters())
    schedule = Schedule(config.optimizer, config.schedule, config.batch.global_batch_size)
    return Trainer(runtime, LanguageModelling(), optimizer, schedule, StaticLossScale(1.0)), Batches(config, mesh)


def trained(config, sizes=(8, 8, 8), folder=None):
    """Losses and gradient norms of a few steps, validation before and after, and the weights by name."""
    built, batches = trainer(config)
    losses, norms = [], []
    before = evaluate(built, batches, 90, 2, sizes[0]).losses["lm loss"]
    for number, size in enumerate(sizes):
        result = train_step(built, batches.step(number, size), Progress(iteration=number, scheduled_samples=8 * number))
        losses.append(result.losses["lm loss"])
        norms.append(result.grad_norm)
    after = evaluate(built, batches, 90, 2, sizes[-1]).losses["lm loss"]
    if folder is not None:
        stages = built.runtime.stages
        tensors = [state.weights(stage) | state.optimizer_state(stage, built.optimizer) for stage in stages]
        checkpoint.save(folder, 1, tensors, train_state={}, config_yaml=to_yaml(config))
    weights: dict[str, list] = {}
    for name, parameter in built.runtime.named_parameters():
        weights.setdefault(name, []).append(parity.full_tensor(parameter))
    return losses, norms, before, after, weights


@functools.cache
def on_one_process(sizes=(8, 8, 8)):
    return run_ranks(trained, 1, CONFIG.replace(micro_batch_size=sizes[0]) if len(set(sizes)) == 1 else CONFIG, sizes)[
        0
    ]


def check(expected, found):
    """Numbers agree on every rank, and the copies of a weight to the bit."""
    losses, norms, before, after, weights = expected
    copies: dict[str, list] = {}
    for each in found:
        assert each[0] == pytest.approx(losses, rel=1e-5)
        assert each[1] == pytest.approx(norms, rel=1e-4)
        assert (each[2], each[3]) == (pytest.approx(before, rel=1e-6), pytest.approx(after, rel=1e-5))
        for name, held in each[4].items():
            copies.setdefault(name, []).extend(held)
    assert copies.keys() == weights.keys()
    for name, held in copies.items():
        assert all(torch.equal(held[0], other) for other in held), name
        assert (held[0] - weights[name][0]).norm() <= 1e-3 * weights[name][0].norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_and_evaluation_are_those_of_one_process(layout):
    ranks, changes = LAYOUTS[layout]
    check(on_one_process(), run_ranks(trained, ranks, CONFIG.replace(**changes)))


@pytest.mark.parametrize("schedule", ["auto", "gpipe", "zbv", "zero_bubble"])
def test_any_number_of_micro_batches(schedule):
    """One, three and five, in steps of one run, as a growing batch has."""
    sizes = (1, 3, 5) if schedule != "zero_bubble" else (1, 3, 4)  # it wants equal rounds
    found = run_ranks(trained, 2, CONFIG.replace(**{PP: 2, "pipeline_schedule": schedule}), sizes)
    check(on_one_process(sizes), found)


def test_uneven_stages():
    """Five layers on three stages, the last of which has a head that costs as much as two."""
    config = CONFIG.replace(num_layers=5, vocab_size=512)
    expected = run_ranks(trained, 1, config)[0]
    found = run_ranks(trained, 3, config.replace(**{PP: 3}))
    check(expected, found)
    layers = [{name.split(".")[1] for name in each[4] if name.startswith("layers.")} for each in found]
    assert [len(local) for local in layers] == [2, 2, 1]


@pytest.mark.parametrize("format", ["bf16", "fp16"])
def test_16_bits_put_off_weight_gradients_to_the_same_bits(format):
    narrow = CONFIG.replace(**{format: True, PP: 2, VIRTUAL: 1})
    # fp16 without shards, as with them fused passes are reduced one by one, in another order.
    sharding = {"use_distributed_optimizer": format == "bf16"}
    fused = run_ranks(trained, 4, narrow.replace(pipeline_schedule="interleaved_1f1b", **sharding))
    split = run_ranks(trained, 4, narrow.replace(pipeline_schedule="zero_bubble", **sharding))
    for one, other in zip(fused, split, strict=True):
        assert one[:4] == other[:4]


def test_fp16_with_shards_follows_float32():
    found = run_ranks(trained, 4, CONFIG.replace(fp16=True, use_distributed_optimizer=True, **LAYOUTS["zbv"][1]))
    for each in found:
        assert each[0] == pytest.approx(on_one_process()[0], rel=2e-3)


def loaded(config, folder):
    built, _ = trainer(config)
    tensors = [state.weights(stage) for stage in built.runtime.stages]
    state.create_optimizer_state(built.optimizer)
    tensors = [
        local | state.optimizer_state(stage, built.optimizer)
        for local, stage in zip(tensors, built.runtime.stages, strict=True)
    ]
    checkpoint.load(folder, tensors)
    return [{name: parity.full_tensor(tensor) for name, tensor in local.items()} for local in tensors]


def test_any_layout_saves_and_any_loads(tmp_path):
    run_ranks(trained, 4, CONFIG.replace(**LAYOUTS["zbv, ZeRO-2"][1]), (8,), str(tmp_path))
    (whole,) = run_ranks(loaded, 1, CONFIG, str(tmp_path))[0]
    assert any(name.startswith("optimizer/exp_avg/") for name in whole)
    for layout in ("four stages", "zbv", "interleaved"):
        ranks, changes = LAYOUTS[layout]
        seen = set()
        for stage in (
            stage for local in run_ranks(loaded, ranks, CONFIG.replace(**changes), str(tmp_path)) for stage in local
        ):
            seen.update(stage)
            assert all(torch.equal(tensor, whole[name]) for name, tensor in stage.items())
        assert seen == set(whole)


def held_buffers():
    built, batches = trainer(CONFIG.replace(pipeline_model_parallel_size=2))
    live = []

    class Watching(LanguageModelling):
        def losses(self, output, batch, counts):
            stages = [stage for _, stages in built.runtime.pipeline.built.values() for stage in stages]
            infos = [
                info
                for stage in stages
                for table in (stage.args_recv_info, stage.grad_recv_info)
                for each in table.values()
                for info in each
            ]
            live.append(sum(info.buffer is not None for info in infos))
            return super().losses(output, batch, counts)

    built.task = Watching()
    train_step(built, batches.step(0, 8), Progress())
    return live


def test_buffers_of_activations_do_not_grow_with_micro_batches():
    """Eight micro-batches; the last stage of 1F1B has one activation at a time, and torch would keep eight."""
    assert run_ranks(held_buffers, 2)[1] == [1] * 8


def reductions(config, size):
    """How many collectives sum gradients in a step."""
    built, batches = trainer(config)
    train_step(built, batches.step(0, 8), Progress())
    calls = []
    with mock.patch("torch.distributed.all_reduce", counting(calls, dist.all_reduce)):
        with mock.patch("torch.distributed.reduce_scatter_tensor", counting(calls, dist.reduce_scatter_tensor)):
            train_step(built, batches.step(1, size), Progress(iteration=1))
    return len(calls)


def counting(calls, function):
    def counted(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("layout", ["zbv, dp", "1f1b, ZeRO-2", "interleaved, ZeRO-3", "zbv, ZeRO-2"])
def test_gradients_are_summed_once_a_step(layout):
    ranks, changes = LAYOUTS[layout]
    few, many = (run_ranks(reductions, ranks, CONFIG.replace(**changes), size) for size in (8, 16))
    assert few == many and min(few) > 0
