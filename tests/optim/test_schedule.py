"""Schedules against values worked out by hand from Megatron's formulas."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.config.run import RunConfig
from megalith.optim.schedule import Schedule


def make(global_batch_size=8, **flags):
    defaults = {"lr": 1.0, "min_lr": 0.1}
    if "train_samples" not in flags:
        defaults["train_iters"] = 100
    config = RunConfig().replace(**(defaults | flags))
    return Schedule(config.optimizer, config.schedule, global_batch_size)


def test_the_first_step_of_a_warm_up_has_rate_zero_and_its_last_sample_the_peak():
    schedule = make(lr_warmup_iters=10)  # 80 samples
    assert [schedule.lr(n) for n in (0, 8, 40, 80)] == [0.0, 0.1, 0.5, 1.0]


def test_warm_up_may_start_above_zero():
    schedule = make(lr_warmup_iters=10, lr_warmup_init=0.2)
    assert [schedule.lr(n) for n in (0, 40, 80)] == pytest.approx([0.2, 0.6, 1.0])


def test_without_warm_up_the_first_step_has_the_peak():
    assert make().lr(0) == 1.0


@pytest.mark.parametrize(
    "flags, samples",
    [
        ({"lr_warmup_iters": 5}, 40),
        ({"lr_warmup_fraction": 0.05}, 40),
        ({"train_samples": 800, "lr_warmup_samples": 40}, 40),
        ({"lr_warmup_fraction": 0.001}, 0.8),  # a fraction is not rounded
        ({"lr_decay_iters": 50, "lr_warmup_fraction": 0.1}, 40),  # a fraction is of the decay, not of the run
    ],
)
def test_three_ways_to_give_a_warm_up(flags, samples):
    schedule = make(**flags)
    assert schedule.parameters.warmup_samples == pytest.approx(samples)
    assert schedule.lr(samples) == 1.0


# warm-up 80, decay until 800, peak 1, minimum 0.1: at 80, 260 (a quarter of the way), 440 (half), 620, 800, 801
@pytest.mark.parametrize(
    "style, values",
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 0.775, 0.55, 0.325, 0.1, 0.1]),
        ("cosine", [1, 0.1 + 0.45 * (1 + math.sqrt(0.5)), 0.55, 0.1 + 0.45 * (1 - math.sqrt(0.5)), 0.1, 0.1]),
        (
            "inverse-square-root",
            [1, math.sqrt(80 / 260), math.sqrt(80 / 440), math.sqrt(80 / 620), math.sqrt(0.1), 0.1],
        ),
    ],
)
def test_decay(style, values):
    schedule = make(lr_decay_style=style, lr_warmup_iters=10)
    assert [schedule.lr(n) for n in (80, 260, 440, 620, 800, 801)] == pytest.approx(values, rel=1e-12)


def test_inverse_square_root_never_falls_below_the_minimum_and_needs_no_warm_up():
    schedule = make(lr_decay_style="inverse-square-root")
    assert [schedule.lr(n) for n in (0, 1, 4, 800)] == [1.0, 1.0, 0.5, 0.1]


# the last 40 steps (320 samples) of 800: stable until 480; then at 560 (a quarter), 640 (half), 800, 801
@pytest.mark.parametrize(
    "style, quarter, half",
    [
        ("linear", 0.75, 0.5),
        ("cosine", 0.5 * (1 + math.sqrt(0.5)), 0.5),
        ("exponential", 2 * 0.5**0.25 - 1, 2 * math.sqrt(0.5) - 1),
        ("minus_sqrt", 0.5, 1 - math.sqrt(0.5)),
    ],
)
def test_warm_up_stable_decay(style, quarter, half):
    schedule = make(lr_decay_style="WSD", lr_wsd_decay_style=style, lr_wsd_decay_iters=40, lr_warmup_iters=10)
    values = [0.5, 1, 1, 1, 0.1 + 0.9 * quarter, 0.1 + 0.9 * half, 0.1, 0.1]
    assert [schedule.lr(n) for n in (40, 80, 300, 480, 560, 640, 800, 801)] == pytest.approx(values, rel=1e-12)


def test_decay_may_end_before_the_run():
    schedule = make(lr_decay_iters=50)
    assert schedule.lr(200) == pytest.approx(0.55)
    assert schedule.lr(401) == 0.1


def test_steps_are_multiplied_by_the_final_global_batch_size():
    assert make(global_batch_size=1536, lr_warmup_iters=3).parameters.decay_samples == 153600
    assert make(global_batch_size=1536, lr_warmup_iters=3).parameters.warmup_samples == 4608


@pytest.mark.parametrize("style, half", [("linear", 0.2), ("cosine", 0.2)])
def test_weight_decay_grows(style, half):
    schedule = make(weight_decay_incr_style=style, start_weight_decay=0.1, end_weight_decay=0.3)
    assert [schedule.weight_decay(n) for n in (0, 400, 800, 900)] == pytest.approx([0.1, half, 0.3, 0.3])
    quarter = 0.15 if style == "linear" else 0.1 + 0.2 * 0.5 * (1 - math.sqrt(0.5))
    assert schedule.weight_decay(200) == pytest.approx(quarter)


def test_weight_decay_is_constant_by_default():
    assert {make(weight_decay=0.05).weight_decay(n) for n in (0, 5, 1000)} == {0.05}


def test_a_run_of_no_steps_has_a_schedule():
    assert make(train_iters=0).lr(0) == 1.0


@given(
    st.integers(0, 2000),
    st.sampled_from(["linear", "cosine", "constant", "inverse-square-root", "WSD"]),
    st.integers(0, 99),
)
def test_a_rate_stays_between_zero_and_the_peak(samples, style, warmup):
    tail = {"lr_wsd_decay_iters": 1} if style == "WSD" else {}
    assert 0.0 <= make(lr_decay_style=style, lr_warmup_iters=warmup, **tail).lr(samples) <= 1.0


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"lr": None}, "--lr"),
        ({"min_lr": 2.0}, "--min-lr"),
        ({"lr_warmup_init": 2.0}, "--lr-warmup-init"),
        ({"train_iters": None}, "--train-iters or --train-samples"),
        ({"train_iters": 5, "train_samples": 5}, "only one"),
        ({"lr_warmup_samples": 5}, "--lr-warmup-samples"),
        ({"train_samples": 50, "lr_decay_iters": 5}, "--lr-decay-iters"),
        ({"lr_warmup_iters": 100}, "shorter than the decay"),
        ({"lr_warmup_fraction": 1.0}, "shorter than the decay"),
        ({"lr_warmup_fraction": 0.1, "lr_warmup_iters": 5}, "--lr-warmup-fraction"),
        ({"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters"),
        ({"lr_decay_style": "WSD", "lr_wsd_decay_iters": 200}, "last phase of WSD"),
        ({"start_weight_decay": 0.1}, "--weight-decay-incr-style"),
        ({"weight_decay_incr_style": "linear", "start_weight_decay": 0.1}, "Give both"),
        ({"weight_decay_incr_style": "linear", "start_weight_decay": 0.2, "end_weight_decay": 0.1}, "Swap"),
        ({"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True}, "contradict"),
    ],
)
def test_what_makes_no_schedule_is_named(flags, words):
    with pytest.raises(ConfigError, match=words):
        make(**flags)


def test_all_conflicts_are_shown_at_once():
    with pytest.raises(ConfigError, match=r"--lr must (.|\n)*The length of the run must be given"):
        make(lr=None, train_iters=None)


def test_the_same_schedule_resumes_silently():
    schedule = make(lr_warmup_iters=10)
    assert schedule.resumed(schedule.state()).parameters == schedule.parameters


def test_another_schedule_lists_every_difference_and_both_cures():
    stored = make(lr=2.0, lr_warmup_iters=20, train_iters=200).state()
    with pytest.raises(ConfigError) as caught:
        make().check_state(stored)
    text = str(caught.value)
    assert "lr: 2.0 in the checkpoint, 1.0 by the flags" in text
    assert "warmup_samples: 160 in the checkpoint, 0 by the flags" in text
    assert "decay_samples: 1600" in text and "min_lr" not in text
    assert "--override-opt-param-scheduler" in text and "--use-checkpoint-opt-param-scheduler" in text


def test_two_flags_decide_which_schedule_resumes():
    stored = make(lr=2.0, lr_decay_style="cosine").state()
    assert make(override_opt_param_scheduler=True).resumed(stored).lr(0) == 1.0
    kept = make(use_checkpoint_opt_param_scheduler=True).resumed(stored)
    assert kept.lr(0) == 2.0 and kept.state() == stored


def test_a_checkpoint_of_an_older_version_may_lack_numbers():
    schedule = make()
    stored = {name: value for name, value in schedule.state().items() if name != "lr_warmup_init"}
    assert schedule.resumed(stored).parameters == schedule.parameters


def test_the_state_is_plain():
    state = make().state()
    assert set(state) == {field.name for field in dataclasses.fields(make().parameters)}
    assert all(isinstance(value, int | float | str) for value in state.values())
