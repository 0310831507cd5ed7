"""When the loop calls its callbacks, and what they can do there."""

import pytest
import torch

from megalith.training.callbacks import Callback
from megalith.training.loop import train_loop
from megalith.training.resume.state import FAILED, Progress
from tests.training.records import run_info
from tests.training.test_step import batches, no_group_left, trainer  # noqa: F401 - a fixture


class Batches:
    """Stands for a loader: the same micro-batches at every step."""

    def step(self, consumed, size):
        return batches(4)


class Spy(Callback):
    """Notes what is called; `then`: {call: what to do}."""

    def __init__(self, **then):
        self.calls, self.then = [], then

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(run, *given):
            self.calls.append(name[3:])
            self.then.get(name, lambda *_: None)(*given)

        return note


def loop(made, callbacks, steps=2) -> Progress:
    progress = Progress()
    train_loop(made, Batches(), progress, lambda consumed: 8, run_info(train_iters=steps), callbacks, lambda: None)
    return progress


def test_gradients_can_be_changed_before_the_optimizer_has_them():
    def halve(made):
        for _, gradient in made.runtime.gradients()[0]:
            gradient.mul_(0.5)

    def moved(**then):
        made = trainer(
            optimizer="sgd", lr=1.0, min_lr=1.0, lr_warmup_iters=0, clip_grad=0.0, weight_decay=0.0, sgd_momentum=0.0
        )
        before = [p.detach().clone() for p in made.runtime.model.parameters()]
        spy = Spy(**then)
        loop(made, [spy], steps=1)
        assert spy.calls == ["start", "before_optimizer_step", "step", "end"]
        return [p.detach() - old for p, old in zip(made.runtime.model.parameters(), before, strict=True)]

    for whole, half in zip(moved(), moved(on_before_optimizer_step=halve), strict=True):
        torch.testing.assert_close(half, 0.5 * whole, rtol=1e-4, atol=1e-7)


def test_a_step_that_is_skipped_has_no_update_to_come_before():
    made, spy = trainer(), Spy()
    with torch.no_grad():
        made.runtime.model.final_norm.weight[0] = float("nan")
    loop(made, [spy], steps=1)
    assert spy.calls == ["start", "step", "end"]


def test_an_error_is_reported_to_all_that_have_started_and_is_the_one_that_leaves():
    def fail(*_):
        raise OSError("of the step")

    def fail_again(error):
        assert str(error) == "of the step"
        raise ValueError("of the callback")

    first, second, last = Spy(on_error=fail_again), Spy(on_step=fail), Spy()
    with pytest.raises(OSError, match="of the step") as error:
        loop(trainer(), [first, second, last])
    assert error.value.__notes__ == ["and Spy.on_error: ValueError: of the callback"]
    assert [spy.calls[-2:] for spy in (first, second, last)] == [["error", "end"]] * 3

    never = Spy()
    with pytest.raises(OSError):
        loop(trainer(), [Spy(on_start=fail), never])
    assert never.calls == []


def test_an_error_at_the_end_is_reported_too():
    """As where the last save finds the disk full."""

    def fail(*_):
        raise OSError("of the last save")

    first, second = Spy(), Spy(on_end=fail)
    with pytest.raises(OSError, match="of the last save"):
        loop(trainer(), [first, second])
    assert first.calls[-2:] == second.calls[-2:] == ["end", "error"]


def test_ends_that_follow_an_error_at_the_end_know_of_it():
    """What predicts at the end would wait for processes that measure still."""

    def fail(*_):
        raise OSError("of the last validation")

    progress, found = Progress(), list[str | None]()
    callbacks = [Spy(on_end=lambda: found.append(progress.stop)), Spy(on_end=fail)]
    with pytest.raises(OSError, match="of the last validation"):
        train_loop(trainer(), Batches(), progress, lambda consumed: 8, run_info(train_iters=1), callbacks, lambda: None)
    assert found == [FAILED]


def test_after_an_error_nothing_may_be_saved():
    def fail(*_):
        raise KeyboardInterrupt

    progress = Progress()
    with pytest.raises(KeyboardInterrupt):
        train_loop(trainer(), Batches(), progress, lambda consumed: 8, run_info(), [Spy(on_step=fail)], lambda: None)
    assert progress.stop == FAILED
