"""Orders do all the work once, in an order that works; played with equal stages they idle as the formulas say."""

import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.config import stages
from megalith.parallel.pipeline.schedules import Span, Work, bubble, order, play, without_model

ONE, TWO = ("gpipe", "1f1b"), ("interleaved_1f1b", "zero_bubble", "zbv", "dualpipev")
SECONDS = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


def seconds(work):
    return SECONDS[work.kind]


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("name", ONE + TWO)
def test_every_pass_of_every_micro_batch_is_done_once(name, processes):
    v = 2 if name in TWO else 1
    works = [work for mine in order(name, processes, 8, v) for work in mine]
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
    played = bubble(play(order(name, processes, micro_batches, v), seconds))
    assert played == pytest.approx(stages.bubble(name, processes, micro_batches, v))


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("name", ["zero_bubble", "zbv", "dualpipev"])
def test_zero_bubble_schedules_idle_less_than_interleaved_1f1b(name, processes):
    played = bubble(play(order(name, processes, 4 * processes, 2), seconds))
    assert played < stages.bubble("interleaved_1f1b", processes, 4 * processes, 2) / 2


@given(st.sampled_from(ONE), st.integers(1, 5), st.integers(1, 12))
def test_any_number_of_micro_batches_can_be_played(name, processes, micro_batches):
    spans = play(order(name, processes, micro_batches), seconds)
    assert len(spans) == 2 * processes * micro_batches
    assert bubble(spans) == pytest.approx((processes - 1) / micro_batches)


@pytest.mark.parametrize("name", ONE + TWO)
def test_nothing_starts_before_its_input_is_there(name):
    spans = play(order(name, 2, 4, 2 if name in TWO else 1), seconds, transfer=0.25)
    ends = {span.work: span for span in spans}
    for span in spans:
        kind, stage, number = span.work
        before = ends.get(Work("F", stage - 1, number)) if kind == "F" else ends.get(Work("F", stage, number))
        if before is not None:
            assert span.start >= before.end + (0.25 if before.process != span.process else 0.0)
    for process in range(2):
        mine = [span for span in spans if span.process == process]
        assert all(earlier.end <= later.start for earlier, later in itertools.pairwise(mine))


@pytest.mark.parametrize("name", TWO)
def test_what_is_done_is_handed_on_at_once(name):
    """Every send stands behind the work that made it, with no other work between."""
    for actions in without_model(name, 2, 8, 2).pipeline_order_with_comms.values():
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
    fast, slow = (bubble(play(order("1f1b", 4, 8), seconds, transfer)) for transfer in (0.0, 0.5))
    assert slow > fast


def test_bubble_of_a_timeline():
    work = Work("F", 0, 0)
    assert bubble([Span(0, work, 0.0, 3.0), Span(1, work, 1.0, 4.0)]) == pytest.approx(2 / 6)
