"""Speed over a window of steps."""

import pytest

from megalith.training.reporting.speed import Speed
from tests.training.records import run_info, step


def test_the_first_step_of_a_process_does_not_count_once_there_is_another():
    speed = Speed(run_info(start_step=4))
    speed.add(step(5, seconds=100.0))
    assert speed.tokens_per_second == 10.0
    speed.add(step(6, seconds=0.5))
    speed.add(step(7, seconds=1.5))
    assert speed.tokens_per_second == 1000.0
    assert speed.seconds_per_step == 1.0
    assert speed.time_left() == "3.0 s"


def test_old_steps_leave_the_window():
    speed = Speed(run_info(), window=2)
    for number, seconds in enumerate((9.0, 9.0, 1.0, 3.0), 1):
        speed.add(step(number, seconds=seconds))
    assert speed.seconds_per_step == 2.0


def test_both_conventions():
    speed = Speed(run_info(world_size=2, flops_per_token_full=4e9, flops_per_token_half=3e9, peak_flops=1e13))
    speed.add(step(1))  # 2000 tokens per second
    assert speed.tflops() == pytest.approx((4.0, 3.0))
    assert speed.mfu() == pytest.approx((0.4, 0.3))
    assert Speed(run_info()).mfu() is None


def test_before_the_first_step():
    assert Speed(run_info()).time_left() == "0.0 s"
