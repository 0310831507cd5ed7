"""Orders do all the work once, in an order that works; simulated with equal stages they idle as the formulas say."""

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.parallel.pipeline.schedules import order, schedule_without_model
from megalith.planner.timeline import Work, ideal_bubble, simulate, timeline_bubble

ONE, TWO = ("gpipe", "1f1b"), ("interleaved_1f1b", "zero_bubble", "zbv", "dualpipev")
SECONDS = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


def seconds(work):
    return SECONDS[work.kind]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ONE + TWO)
def test_every_pass_of_every_micro_batch_is_done_once(name, processes):
    v = 2 if name in TWO else 1
    works = [work for works_of_process in order(name, processes, 8, v) for work in works_of_process]
    counted = collections.Counter(works)
    assert set(counted.values()) == {1}
    for stage in range(v * processes):
        for number in range(8):
            assert Work("F", stage, number) in counted
            assert (Work("B", stage, number) in counted) != (
                Work("I", stage, number) in counted and Work("W", stage, number) in counted
            )


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 4), (2, 8), (4, 8), (4, 16), (8, 16)])
@pytest.mark.parametrize(
    ("name", "v"),
    [
        ("gpipe", 1),
        ("1f1b", 1),
        ("interleaved_1f1b", 2),
        ("interleaved_1f1b", 4),
        ("zero_bubble", 1),
        ("zero_bubble", 2),
    ],
)
def test_the_formulas_of_the_bubble(name, v, processes, micro_batches):
    simulated = timeline_bubble(simulate(order(name, processes, micro_batches, v), seconds))
    assert simulated == pytest.approx(ideal_bubble(name, processes, micro_batches, v))


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("name", ["zero_bubble", "zbv", "dualpipev"])
def test_zero_bubble_schedules_idle_less_than_interleaved_1f1b(name, processes):
    simulated = timeline_bubble(simulate(order(name, processes, 4 * processes, 2), seconds))
    assert simulated < ideal_bubble("interleaved_1f1b", processes, 4 * processes, 2) / 2


@given(st.sampled_from(ONE), st.integers(1, 5), st.integers(1, 12))
def test_any_number_of_micro_batches_can_be_played(name, processes, micro_batches):
    spans = simulate(order(name, processes, micro_batches), seconds)
    assert len(spans) == 2 * processes * micro_batches
    assert timeline_bubble(spans) == pytest.approx((processes - 1) / micro_batches)


@pytest.mark.parametrize("name", ONE + TWO)
def test_nothing_starts_before_its_input_is_there(name):
    spans = simulate(order(name, 2, 4, 2 if name in TWO else 1), seconds, transfer=0.25)
    ends = {span.work: span for span in spans}
    for span in spans:
        kind, stage, number = span.work
        before = ends.get(Work("F", stage - 1, number)) if kind == "F" else ends.get(Work("F", stage, number))
        if before is not None:
            assert span.start >= before.end + (0.25 if before.process != span.process else 0.0)
    for process in range(2):
        works_of_process = [span for span in spans if span.process == process]
        assert all(earlier.end <= later.start for earlier, later in itertools.pairwise(works_of_process))


@pytest.mark.parametrize("name", TWO)
def test_what_is_done_is_handed_on_at_once(name):
    """Every send stands behind the work that made it, with no other work between."""
    for actions in schedule_without_model(name, 2, 8, 2).pipeline_order_with_comms.values():
        done, sent = None, 0
        for action in actions:
            assert action.sub_actions is None
            if action.is_compute_op:
                done = (action.stage_index, action.microbatch_index)
            elif action.computation_type.name.startswith("SEND"):
                sent += 1
                assert (action.stage_index, action.microbatch_index) == done
        assert sent


def test_slow_transfers_cost_time():
    fast, slow = (timeline_bubble(simulate(order("1f1b", 4, 8), seconds, transfer)) for transfer in (0.0, 0.5))
    assert slow > fast
