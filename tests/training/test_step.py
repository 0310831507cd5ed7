"""A step's numbers do not depend on how its batch is cut, and a step that went wrong changes nothing."""

import pytest
import torch

from megalith.optim.build import build_optimizer
from megalith.optim.loss_scale import StaticLossScale
from megalith.optim.schedule import Schedule
from megalith.runtime.build import build_runtime, init_mesh
from megalith.training.resume.state import SIGNAL, Progress
from megalith.training.step import Trainer, train_step
from megalith.training.tasks import LanguageModelling
from tests.tiny import VOCABULARY, tiny_config


@pytest.fixture(autouse=True)
def no_group_left():
    """`start` makes a process group of one; leave none behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trainer(loss_scale: float = 1.0, **changes) -> Trainer:
    config = tiny_config("unused", "unused", **changes).replace(vocab_size=VOCABULARY + 1)
    runtime = build_runtime(config, init_mesh(config.parallel))
    optimizer = build_optimizer(config.optimizer, runtime.model.named_parameters())
    return Trainer(
        runtime,
        LanguageModelling(),
        optimizer,
        Schedule(config.optimizer, config.schedule, 8),
        StaticLossScale(loss_scale),
    )


def batches(micro: int, masked: bool = True) -> list[dict]:
    """Eight samples in micro-batches; the mask differs by sample, so an average per micro-batch would show."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCABULARY, (8, 17), generator=random)
    mask = (
        (torch.rand(8, 16, generator=random) < torch.linspace(0.1, 1.0, 8)[:, None]).float()
        if masked
        else torch.ones(8, 16)
    )
    whole = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": mask, "samples": torch.arange(8)}
    return [{name: tensor[i : i + micro] for name, tensor in whole.items()} for i in range(0, 8, micro)]


def after_one_step(micro: int, **changes):
    changes = {"optimizer": "sgd", "lr": 1.0, "min_lr": 1.0} | changes  # the weights move by the gradient itself
    made = trainer(**changes)
    result = train_step(made, batches(micro), Progress(scheduled_samples=8))
    return result, [p.detach().clone() for p in made.runtime.model.parameters()]


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_micro_batches_give_the_step_of_the_whole_batch(micro):
    whole, expected = after_one_step(8)
    cut, found = after_one_step(micro)
    assert cut.losses["lm loss"] == pytest.approx(whole.losses["lm loss"], rel=1e-6)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_mean_over_unmasked_tokens():
    made = trainer(hidden_dropout=0.0, attention_dropout=0.0)
    batch = batches(8)[0]
    logits = made.runtime.model(batch["input_ids"]).float()
    each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    expected = (each * batch["loss_mask"].flatten()).sum() / batch["loss_mask"].sum()
    assert train_step(made, [batch], Progress()).losses["lm loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_loss_scale_changes_no_number():
    plain, expected = after_one_step(4)
    scaled, found = after_one_step(4, loss_scale=1024.0)
    assert scaled.grad_norm == pytest.approx(plain.grad_norm, rel=1e-6) and scaled.loss_scale == 1024.0
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_that_are_not_finite_change_no_weight():
    made = trainer()
    before = [p.detach().clone() for p in made.runtime.model.parameters()]
    with torch.no_grad():
        made.runtime.model.final_norm.weight[0] = float("nan")
    result = train_step(made, batches(8), Progress(scheduled_samples=8))
    assert result.skipped
    changed = [
        name
        for (name, p), old in zip(made.runtime.model.named_parameters(), before, strict=True)
        if not torch.equal(p, old)
    ]
    assert changed == ["final_norm.weight"]


def test_bf16_follows_float32():
    whole, _ = after_one_step(4)
    half, parameters = after_one_step(4, bf16=True)
    assert half.losses["lm loss"] == pytest.approx(whole.losses["lm loss"], rel=2e-2)
    assert all(p.dtype == torch.float32 for p in parameters)


def test_asked_to_stop_is_reported():
    made = trainer()
    assert train_step(made, batches(8), Progress(), stop=SIGNAL).stop == SIGNAL
    assert not train_step(made, batches(8), Progress()).stop
