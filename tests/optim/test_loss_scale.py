"""Loss scales against a table of Megatron's rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.config.sections.precision import PrecisionConfig
from megalith.optim.loss_scale import DynamicLossScale, StaticLossScale, build_loss_scale


def scales(scaler, overflows):
    seen = []
    for found_inf in overflows:
        scaler.update(bool(found_inf))
        seen.append(scaler.scale)
    return seen


def test_hysteresis_forgives_before_the_first_halving_and_not_again_until_growth():
    scaler = DynamicLossScale(initial=64.0, window=3, hysteresis=2)
    assert scales(scaler, [1, 1, 1]) == [64.0, 32.0, 16.0]  # the second exhausts patience; the third halves at once
    assert scales(scaler, [0, 0, 1]) == [16.0, 16.0, 8.0]  # good steps short of the window restore nothing
    assert scales(scaler, [0, 0, 0]) == [8.0, 8.0, 16.0]  # growth
    assert scales(scaler, [1, 1]) == [16.0, 8.0]  # and patience with it


def test_good_steps_between_overflows_do_not_restore_patience():
    assert scales(DynamicLossScale(initial=64.0, window=10, hysteresis=2), [1, 0, 1]) == [64.0, 64.0, 32.0]


def test_an_overflow_restarts_the_window():
    assert scales(DynamicLossScale(initial=4.0, window=3, hysteresis=5), [0, 0, 1, 0, 0, 0]) == [4.0] * 5 + [8.0]


def test_never_below_the_minimum():
    assert scales(DynamicLossScale(initial=4.0, minimum=1.0, hysteresis=1), [1] * 5) == [2.0, 1.0, 1.0, 1.0, 1.0]


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60), st.integers(1, 5), st.integers(1, 4))
def test_a_restored_scale_goes_on_as_if_never_stopped(overflows, cut, window, hysteresis):
    whole, first, second = (DynamicLossScale(2.0**10, 1.0, window, hysteresis) for _ in range(3))
    expected = scales(whole, overflows)
    seen = scales(first, overflows[:cut])
    second.load_state_dict(first.state_dict())
    assert seen + scales(second, overflows[cut:]) == expected


def test_the_inverse_is_a_float64():
    assert DynamicLossScale(initial=3.0).inverse == 1.0 / 3.0


def test_a_fixed_scale_stays_whatever_happens_and_whatever_is_loaded():
    scaler = StaticLossScale(128.0)
    assert scales(scaler, [1, 0, 1]) == [128.0] * 3
    scaler.load_state_dict({"scale": 4.0})
    assert scaler.scale == 128.0 and scaler.state_dict() == {"scale": 128.0}


def test_a_dynamic_scale_can_resume_from_a_fixed_one():
    scaler = DynamicLossScale(hysteresis=3)
    scaler.load_state_dict({"scale": 128.0})
    assert (scaler.scale, scaler.growth_tracker, scaler.hysteresis_tracker) == (128.0, 0, 3)


def test_by_configuration():
    assert build_loss_scale(PrecisionConfig(bf16=True)).scale == 1.0
    assert build_loss_scale(PrecisionConfig(fp16=True, loss_scale=256.0)).scale == 256.0
    dynamic = build_loss_scale(PrecisionConfig(fp16=True))
    assert isinstance(dynamic, DynamicLossScale)
    assert (dynamic.scale, dynamic.minimum, dynamic.window, dynamic.hysteresis) == (2.0**32, 1.0, 1000, 2)


@pytest.mark.parametrize(
    "flags", [{"loss_scale": 0.0}, {"min_loss_scale": 8.0, "initial_loss_scale": 4.0}, {"min_loss_scale": 0.0}]
)
def test_scales_that_cannot_work(flags):
    with pytest.raises(ConfigError, match="loss-scale"):
        build_loss_scale(PrecisionConfig(fp16=True, **flags))
