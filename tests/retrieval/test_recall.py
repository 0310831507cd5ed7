"""Top-k recall, counted by hand."""

import numpy as np
import pytest

from megalith.common.errors import ConfigError
from megalith.data.questions import Question
from megalith.retrieval.recall import measure

TEXTS = ["Rainier is a mountain", "Paris is in France", "the year 1999", "nothing"]
QUESTIONS = [
    Question("which mountain", ("Mount Rainier", "Rainier")),
    Question("where is Paris", ("France",)),
    Question("when", ("1998", "1999")),
    Question("who", ("nobody",)),
]
ROWS = np.array([[0, 1, 2], [0, 3, 1], [3, 2, -1], [0, 1, -1]])


def test_recall_is_that_counted_by_hand():
    found = measure(QUESTIONS, ROWS, TEXTS.__getitem__)
    assert found.first == (0, 2, 1, -1) and found.hits == (1, 2, 3)
    assert [found.at(k) for k in (1, 2, 3, 100)] == [0.25, 0.5, 0.75, 0.75]


def test_regular_expressions():
    questions = [
        Question("when", ("19[0-9]+",)),
        Question("q", ("^paris",)),
        Question("q", ("x",)),
        Question("q", ("z",)),
    ]
    assert measure(questions, ROWS, TEXTS.__getitem__, "regex").first == (2, 2, -1, -1)


def test_results_of_other_questions_are_refused():
    with pytest.raises(ConfigError, match="as many as there are results"):
        measure(QUESTIONS[:2], ROWS, TEXTS.__getitem__)
