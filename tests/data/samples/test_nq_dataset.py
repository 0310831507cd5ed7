"""Samples of passage retrieval: the right passage first, the draws those of the seed."""

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.data.questions import Passage, Question
from megalith.data.samples.nq_dataset import PassageDataset
from tests.data.word_pieces import WordPieces


class Words(WordPieces):
    def encode(self, text):
        return [10 + len(word) for word in text.split()]


def passage(*lengths):
    return Passage("t" * 9, " ".join("x" * length for length in lengths))


QUESTION = Question(
    "who was it", ("a",), (passage(1, 2), passage(3)), (passage(4), passage(5), passage(6)), (passage(7, 7, 7, 7, 7),)
)


def test_a_sample_has_the_right_passage_first():
    data = PassageDataset([QUESTION, Question("q", ("a",))], Words(), seq_length=8, hard=2, other=2)
    assert len(data) == 1 and data.left_out == 1
    sample = data[0]
    assert sample["query_ids"].tolist() == [1, 13, 13, 12, 2, 0, 0, 0]
    assert sample["query_padding_mask"].tolist() == [1] * 5 + [0] * 3
    assert sample["context_ids"].tolist() == [
        [1, 19, 2, 11, 12, 2, 0, 0],
        [1, 19, 2, 17, 17, 17, 17, 2],
        [1, 2, 0, 0, 0, 0, 0, 0],
        [1, 19, 2, 14, 2, 0, 0, 0],
        [1, 19, 2, 15, 2, 0, 0, 0],
    ]
    assert sample["context_mask"].tolist() == [1, 1, 0, 1, 1] and sample["loss_mask"] == 1.0
    assert len(set(sample["document"].tolist())) == 5


def test_draws_are_those_of_seed_and_sample():
    options = {"seq_length": 8, "other": 1, "draw": True}
    one, other = (PassageDataset([QUESTION] * 40, Words(), seed=seed, **options) for seed in (1, 2))
    samples = [one[number]["context_ids"] for number in range(40)]
    again = [one[number]["context_ids"] for number in reversed(range(40))][::-1]
    assert all(np.array_equal(first, second) for first, second in zip(samples, again))
    assert {tuple(sample[0]) for sample in samples} == {(1, 19, 2, 11, 12, 2, 0, 0), (1, 19, 2, 13, 2, 0, 0, 0)}
    assert len({tuple(sample[1]) for sample in samples}) == 3
    assert any(not np.array_equal(sample, other[number]["context_ids"]) for number, sample in enumerate(samples))


def test_other_negatives_take_the_place_of_hard_ones_that_are_missing():
    options = {"seq_length": 8, "hard": 3, "draw": True}
    data = PassageDataset([QUESTION] * 9, Words(), **options)
    hard = (1, 19, 2, 17, 17, 17, 17, 2)
    others = {(1, 19, 2, 14 + number, 2, 0, 0, 0) for number in range(3)}
    for number in range(9):
        sample = data[number]
        _, first, *rest = map(tuple, sample["context_ids"].tolist())
        assert (
            first == hard and len(set(rest)) == 2 and set(rest) < others and sample["context_mask"].tolist() == [1] * 4
        )


def test_epochs_draw_anew_and_have_every_question():
    questions = [
        Question(f"{'q' * number} x", ("a",), QUESTION.positives, QUESTION.negatives) for number in range(1, 8)
    ]
    data = PassageDataset(questions, Words(), seq_length=8, other=1, draw=True)
    epochs = [[data.in_epoch(epoch, index) for index in range(7)] for epoch in range(5)]
    orders = [[int(sample["query_ids"][1]) for sample in epoch] for epoch in epochs]
    assert (
        all(sorted(order) == list(range(11, 18)) for order in orders) and len({tuple(order) for order in orders}) == 5
    )
    by_question = [
        {int(sample["query_ids"][1]): sample["context_ids"].tolist() for sample in epoch} for epoch in epochs
    ]
    assert any(by_question[0][number] != by_question[1][number] for number in range(11, 18))
    again = data.in_epoch(3, 2)
    assert all(np.array_equal(again[name], epochs[3][2][name]) for name in again)


def test_questions_without_a_right_passage_are_an_error():
    with pytest.raises(DataError, match="must have questions with positive_ctxs"):
        PassageDataset([Question("q", ("a",))], Words(), seq_length=8)
