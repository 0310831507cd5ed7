"""Bubbles: of a timeline, and by formula. Orders of whole schedules: tests/parallel/pipeline/test_schedules.py."""

import pytest

from megalith.planner.timeline import Span, Work, ideal_bubble, timeline_bubble


def test_bubble_of_a_timeline():
    work = Work("F", 0, 0)
    assert timeline_bubble([Span(0, work, 0.0, 3.0), Span(1, work, 1.0, 4.0)]) == pytest.approx(2 / 6)


def test_ideal_bubbles():
    assert ideal_bubble("1f1b", 4, 8) == ideal_bubble("gpipe", 4, 8) == 3 / 8
    assert ideal_bubble("interleaved_1f1b", 4, 8, 2) == 3 / 16
    assert ideal_bubble("zero_bubble", 4, 8) == 1 / 8
