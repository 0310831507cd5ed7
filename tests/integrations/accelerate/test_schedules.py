"""Learning-rate schedulers: Megatron's from a dummy, and those of torch and transformers, one move per step."""

import types
from typing import Any

import accelerate.utils
import pytest
import torch
from accelerate.state import GradientState
from accelerate.utils.deepspeed import DummyScheduler
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from transformers import get_scheduler

from megalith.common.errors import ConfigError
from megalith.integrations.accelerate.plugin import MegatronLMPlugin
from megalith.integrations.accelerate.schedules import (
    MegatronLMDummyScheduler,
    MegatronScheduler,
    build_schedule,
    is_scheduler,
    prepare,
)
from tests.integrations.accelerate.helpers import accelerating

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # no optimizer steps here
DEFAULTS = {"lr_decay_style": "linear", "min_lr": 0.0, "weight_decay_incr_style": "constant"}


@pytest.fixture(autouse=True)
def state():
    with accelerating():
        yield


def plugin_of(**fields: Any) -> Any:
    """What build_schedule reads of a MegatronLMPlugin."""
    return types.SimpleNamespace(
        schedule_fields=lambda: {**DEFAULTS, **fields},
        global_batch_size=8,
        num_micro_batches=1,
        megatron_lm_default_args={},
    )


def optimizer_of(*rates: float) -> Optimizer:
    return AdamW(
        [
            {"params": [torch.nn.Parameter(torch.ones(2))], "lr": rate, "weight_decay": 0.1 * (number == 0)}
            for number, rate in enumerate(rates or (1e-3,))
        ]
    )


class Prepared(torch.optim.Optimizer):
    """What the wrapper of an optimizer shows a scheduler."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer, self.step_was_skipped = optimizer, False

    param_groups = property(lambda self: self.optimizer.param_groups)


def session_of(optimizer: Optimizer, *, processes: int = 1, data: int = 1, **fields: Any) -> Any:
    return types.SimpleNamespace(
        plugin=plugin_of(**fields), optimizer=Prepared(optimizer), gradient_state=GradientState(),
        runtime=types.SimpleNamespace(mesh=types.SimpleNamespace(world_size=processes, data_size=data)),
    )  # fmt: skip


def rates(scheduler: Any, steps: int) -> list[float]:
    """The rate of each step."""
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.step()
    return found


def test_linear_schedule_is_that_of_transformers() -> None:
    optimizer, other = optimizer_of(), optimizer_of()
    dummy = MegatronLMDummyScheduler(optimizer=optimizer, total_num_steps=20, warmup_num_steps=5)
    scheduler, lines = prepare(dummy, session_of(optimizer))
    theirs = get_scheduler("linear", other, num_warmup_steps=5, num_training_steps=20)
    found = rates(scheduler, 21)
    assert found == pytest.approx(rates(theirs, 21), abs=1e-12) and found[0] == 0.0 and found[5] == pytest.approx(1e-3)
    assert lines == ["> learning rate decay style: linear"]


def test_fields_of_the_plugin_go_first() -> None:
    optimizer = optimizer_of(1e-3, 5e-4)
    dummy = accelerate.utils.MegatronLMDummyScheduler(optimizer, total_num_steps=10)
    fields = {"lr_decay_style": "cosine", "min_lr": 1e-4, "lr_warmup_iters": 2, "lr_decay_iters": 6}
    scheduler = build_schedule(dummy, plugin_of(**fields), optimizer)
    seen = [tuple(scheduler.get_last_lr())]
    for _ in range(9):
        scheduler.step()
        seen.append(tuple(scheduler.get_last_lr()))
    assert seen[0] == (0.0, 0.0) and seen[2] == pytest.approx((1e-3, 5e-4)) and seen[9] == pytest.approx((1e-4, 1e-4))
    assert seen[4] == pytest.approx((5.5e-4, 3e-4))


def test_lengths_in_samples() -> None:
    """8 samples a call, 2 calls a step."""
    optimizer = optimizer_of()
    dummy = MegatronLMDummyScheduler(optimizer, warmup_num_steps=2)
    in_samples = build_schedule(dummy, plugin_of(train_samples=160), optimizer, accumulation=2)
    dummy = MegatronLMDummyScheduler(other := optimizer_of(), total_num_steps=10, warmup_num_steps=2)
    assert rates(in_samples, 12) == pytest.approx(rates(build_schedule(dummy, plugin_of(), other), 12))


def test_weight_decay_grows() -> None:
    optimizer = optimizer_of(1e-3, 1e-3)
    dummy = MegatronLMDummyScheduler(optimizer, total_num_steps=4)
    growing = {"weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.2}
    scheduler = build_schedule(dummy, plugin_of(**growing), optimizer)
    seen = []
    for _ in range(6):
        seen.append([group["weight_decay"] for group in optimizer.param_groups])
        scheduler.step()
    assert [one for one, _ in seen] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2])
    assert {other for _, other in seen} == {0.0}


@pytest.mark.parametrize(
    ("arguments", "fields", "messages"),
    [
        ({}, {}, ["total_num_steps must be given; found None"]),
        ({"total_num_steps": 10}, {"train_iters": 12}, ["must be the length .* has, 12 steps; found 10"]),
        ({"total_num_steps": 10}, {"train_samples": 96}, ["must be the length .* has, 12 steps; found 10"]),
        ({"total_num_steps": 10, "warmup_num_steps": 2}, {"lr_warmup_fraction": 0.1}, ["lr_warmup_fraction=0.1"]),
        ({"total_num_steps": 10, "warmup_num_steps": 10}, {}, ["Lower lr_warmup_iters, lr_warmup_samples or"]),
        ({"total_num_steps": 10.5}, {}, ["must be a number of optimizer steps; found 10.5"]),
        ({"total_num_steps": 10, "cycle": 2}, {}, ["cycle is no argument that does anything; found 2"]),
        ({"total_num_steps": 10}, {"min_lr": 1.0}, ["min_lr must be at most lr 0.001; found 1.0"]),
        ({"total_num_steps": -1, "x": 1}, {}, ["x is no argument", "found -1"]),
    ],
)  # fmt: skip
def test_values_that_cannot_work(arguments: dict, fields: dict, messages: list[str]) -> None:
    optimizer = optimizer_of()
    with pytest.raises(ConfigError) as error:
        build_schedule(MegatronLMDummyScheduler(optimizer, **arguments), plugin_of(**fields), optimizer)
    for message in messages:
        assert error.match(message)


def test_it_moves_when_the_optimizer_has() -> None:
    optimizer = optimizer_of()
    session = session_of(optimizer)
    scheduler, _ = prepare(StepLR(optimizer, 1, 0.5), session)
    state = session.gradient_state
    assert isinstance(scheduler, accelerate.scheduler.AcceleratedScheduler)
    state._set_sync_gradients(False)
    scheduler.step()
    assert scheduler.get_last_lr() == [1e-3]
    state._set_sync_gradients(True)
    session.optimizer.step_was_skipped = True
    scheduler.step()
    assert scheduler.get_last_lr() == [1e-3]
    session.optimizer.step_was_skipped = False
    scheduler.step()
    assert scheduler.get_last_lr() == [5e-4] == [optimizer.param_groups[0]["lr"]]
    state._set_sync_gradients(False)
    always, _ = prepare(LambdaLR(optimizer, lambda step: 1.0 + step), session, step_with_optimizer=False)
    always.step()
    assert always.get_last_lr() == [2e-3]


def test_one_cycle_ends_and_plateaus_get_their_metric() -> None:
    optimizer = SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    scheduler, _ = prepare(OneCycleLR(optimizer, 1.0, total_steps=4), session_of(optimizer))
    assert len(set(rates(scheduler, 8)[4:])) == 1
    optimizer = optimizer_of()
    scheduler, _ = prepare(ReduceLROnPlateau(optimizer, patience=0), session_of(optimizer))
    for metric in (1.0, torch.tensor(2.0)):
        scheduler.step(metric)
    assert scheduler.get_last_lr() == pytest.approx([1e-4])


@pytest.mark.parametrize("how", ["dummy", "linear", "tensor"])
def test_resuming_sets_the_rates(how: str) -> None:
    def make() -> tuple[Optimizer, MegatronScheduler]:
        optimizer = optimizer_of(2e-3, 1e-3)
        if how == "tensor":
            optimizer = AdamW([torch.nn.Parameter(torch.ones(2))], lr=torch.tensor(1e-3))
        dummy = MegatronLMDummyScheduler(optimizer, total_num_steps=10, warmup_num_steps=2)
        given = dummy if how == "dummy" else get_scheduler("linear", optimizer, 2, 10)
        return optimizer, prepare(given, session_of(optimizer))[0]

    before, scheduler = make()
    rates(scheduler, 5)
    state = scheduler.state_dict()
    assert "schedules" not in state and state["last_epoch"] == 5
    after, resumed = make()
    resumed.load_state_dict(state)
    assert [float(group["lr"]) for group in after.param_groups] == [float(group["lr"]) for group in before.param_groups]
    assert rates(resumed, 3) == rates(scheduler, 3)


def test_what_the_user_is_told() -> None:
    optimizer = optimizer_of()
    dummy = MegatronLMDummyScheduler(optimizer, total_num_steps=10)
    _, (_, divided) = prepare(dummy, session_of(optimizer, processes=4, data=2))
    assert divided.endswith("optimizer steps; Accelerate divided them by the 2 data-parallel processes")
    own = StepLR(optimizer, 1)
    fields = {"lr_decay_style": "cosine", "train_iters": 10, "lr_warmup_iters": 3}
    _, (unused, moves) = prepare(own, session_of(optimizer, processes=2, **fields))
    assert unused.startswith("lr_decay_style, lr_warmup_iters of MegatronLMPlugin has no effect")
    assert moves.startswith("The scheduler moves once per optimizer step; Accelerate moves one num_processes times")
    _, (_, counted) = prepare(own, session_of(optimizer, processes=4, data=2))
    assert counted.startswith("A prepared loader has 2 times fewer batches than the script's")
    assert prepare(own, session_of(optimizer))[1] == []


def test_which_schedulers_are_prepared() -> None:
    optimizer = optimizer_of()
    session = session_of(optimizer)
    scheduler, _ = prepare(StepLR(optimizer, 1), session)
    assert is_scheduler(scheduler) and prepare(scheduler, session) == (scheduler, [])
    assert not is_scheduler(optimizer)
    assert prepare(StepLR(session.optimizer.optimizer, 1), session)
    with pytest.raises(ConfigError, match="bound to another one; found StepLR"):
        prepare(StepLR(optimizer_of(), 1), session)
    deepspeed = DummyScheduler(optimizer)
    assert is_scheduler(deepspeed)
    with pytest.raises(ConfigError, match="must not be DeepSpeed's"):
        prepare(deepspeed, session)
    session.optimizer = None
    with pytest.raises(ConfigError, match="must be prepared with its optimizer"):
        prepare(StepLR(optimizer, 1), session)


def test_fields_of_a_whole_plugin() -> None:
    optimizer = optimizer_of()
    session = session_of(optimizer)
    session.plugin = MegatronLMPlugin()
    assert prepare(StepLR(optimizer, 1), session)[1] == []
    session.plugin = MegatronLMPlugin(lr_decay_style="WSD", other_megatron_args={"lr_wsd_decay_iters": 4})
    scheduler, lines = prepare(MegatronLMDummyScheduler(optimizer, 10, 2), session)
    assert lines == ["> learning rate decay style: WSD"]
    assert session.plugin.megatron_lm_default_args["lr_warmup_iters"] == 2
    assert rates(scheduler, 11)[2:8] == pytest.approx([1e-3] * 5 + [1e-3 * (2.0 * 0.5**0.25 - 1.0)])
