"""A recorded step has every piece of work once, in the order the schedule says, and its ideal idles less."""

import pytest

from megalith.parallel.pipeline.schedules import order
from megalith.runtime import timeline
from megalith.runtime.build import build_runtime, init_mesh
from megalith.testing import parity, run_ranks
from tests.parity.cases import SMALL

CONFIG = SMALL.replace(num_layers=4, pipeline_model_parallel_size=2)


def recorded(config):
    runtime = build_runtime(config, init_mesh(config.parallel))
    parity.forward_backward_once(runtime)
    timeline.record(runtime)
    parity.forward_backward_once(runtime)
    found = timeline.collect(runtime)
    parity.forward_backward_once(runtime)  # nothing is recorded any more
    assert runtime.pipeline.spans is None
    return found


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b", "zbv"])
def test_a_step_is_recorded_whole(schedule):
    one, other = run_ranks(recorded, 2, CONFIG.replace(pipeline_schedule=schedule))
    assert [span.work for span in one.measured] == [span.work for span in other.measured]
    works = order(schedule, 2, 4, 1 if schedule == "1f1b" else 2)
    for process in (0, 1):
        local = sorted((span for span in one.measured if span.process == process), key=lambda span: span.start)
        assert [span.work for span in local] == works[process]
        assert all(0.0 <= span.start < span.end for span in local)
    assert (one.processes, one.stages, one.micro_batches) == (2, 2 if schedule == "1f1b" else 4, 4)
    measured, ideal, equal = one.bubbles()
    assert ideal > 0.0 and measured > 0.0
    assert equal == pytest.approx({"1f1b": 1 / 4, "interleaved_1f1b": 1 / 8, "zbv": 1 / 24}[schedule])
