"""Questions: asked again until the answer can be read; defaults after the end of the input."""

import io
import sys

import pytest

from megalith.common.questions import Questions


@pytest.mark.parametrize(
    ("ask", "answers", "expected", "said"),
    [
        (lambda q: q.text("name", "x"), "\n", "x", "name [x]: "),
        (lambda q: q.choice("format", ("no", "BF16"), "no"), "fp8\nbf16\n", "BF16", "one of no, BF16; found 'fp8'"),
        (lambda q: q.number("size", 3, divides=6), "4\n0\n2\n", 2, "that divides 6; found '0'"),
        (lambda q: q.real("clip", 1.0), "nan\n-1\nx\n0\n", 0.0, "clip must be a number, at least 0; found 'x'"),
        (lambda q: q.real("clip", 1.0), "\n", 1.0, "clip [1.0]: "),
        (lambda q: q.yes("sure", True), "\n", True, "sure [YES/no]: "),
        (lambda q: q.yes("sure", False), "maybe\nY\n", True, "must be yes or no; found 'maybe'"),
    ],
)
def test_answers(monkeypatch, capsys, ask, answers, expected, said):
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers))
    questions = Questions()
    assert ask(questions) == expected and said in capsys.readouterr().out and not questions.ended
    assert ask(questions) in ("x", "no", 3, 1.0, True, False) and questions.ended
