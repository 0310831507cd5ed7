"""Megatron's rules of cleaning, filling in and packing (tasks/data_utils.py, tasks/race/data.py)."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data.tasks.dataset import TaskDataset, names_of
from megalith.data.tasks.description import parse_description, read_description
from megalith.data.tasks.examples import Example, Examples, clean_text, fill_in, read_examples

CLS, SEP, PAD = 101, 102, 0


class Letters:
    """A tokenizer: each letter is a token, its place in the alphabet."""

    def require(self, name):
        return {"cls": CLS, "sep": SEP, "pad": PAD}[name]

    def encode_flat(self, texts):
        rows = [[ord(letter) - 96 for letter in text] for text in texts]
        return np.array([number for row in rows for number in row], np.int32), np.array(list(map(len, rows)), np.int64)


def dataset(pairs, seq_length, text="labels: [a, b]\ncolumns: {text_a: 0, text_b: 1, label: 2}"):
    task = parse_description(text, "mine.yaml", "mine")
    found = Examples(True, [Example("1", tuple(pairs), 1)], [])
    return TaskDataset(found, task, Letters(), seq_length=seq_length, files=[])


def test_clean_text():
    assert clean_text(" a\n b \t c . d . . . e ") == "a b c. d. .. e"
    assert clean_text("a . b . c") == "a. b. c"


def test_a_blank_is_filled_in_or_the_option_comes_behind():
    assert fill_in("He _ it.", "ate\\1") == "He ate\\1 it."
    assert fill_in("He ______ it.", "ate") == "He ate it."
    assert fill_in("What?", "That") == "What? That"


@settings(deadline=None)
@given(a=st.text("xyz", max_size=9), b=st.text("xyz", max_size=9), s=st.integers(3, 24))
def test_packing_is_megatrons(a, b, s):
    """Against its rule in its own words: [CLS] A [SEP] B, cut to s - 1 where it has s or more, then [SEP], padding."""
    a = a or "x"
    ids = [CLS, *(ord(letter) - 96 for letter in a), SEP]
    types = [0] * len(ids)
    if b:
        ids, types = ids + [ord(letter) - 96 for letter in b], types + [1] * len(b)
    trimmed = len(ids) >= s
    if trimmed:
        ids, types = ids[: s - 1], types[: s - 1]
    if b or trimmed:
        ids, types = [*ids, SEP], [*types, int(bool(b))]
    length = len(ids)
    made = dataset([(a, b)], s)
    sample = made[0]
    assert sample["input_ids"].tolist() == ids + [PAD] * (s - length)
    assert sample["token_types"].tolist() == types + [0] * (s - length)
    assert sample["padding_mask"].tolist() == [1] * length + [0] * (s - length)
    assert sample["labels"] == 1 and sample["labels"].dtype == np.int64 and sample["loss_mask"] == 1
    assert made.truncated == (len(a) + 2 + (len(b) + 1 if b else 0) > s)


def test_questions_are_cut_and_choices_come_first():
    text = "kind: multiple_choice\nchoices: 2\nmax_question_tokens: 3\ncolumns: {question: q, options: o, label: l}"
    sample = dataset([("aaaaa", "b"), ("c", "b")], 8, text)[0]
    assert sample["input_ids"].tolist() == [[CLS, 1, 1, 1, SEP, 2, SEP, 0], [CLS, 3, SEP, 2, SEP, 0, 0, 0]]
    assert sample["labels"].shape == () and sample["padding_mask"].shape == (2, 8)


def article(**changes):
    record = {
        "article": "A long\nstory .", "questions": ["Who _ ?", "Why?"], "answers": ["B", "D"],
        "options": [["a", "b", "c", "d"], ["e", "f", "g", "h"]],
    }  # fmt: skip
    return json.dumps({**record, **changes})


def test_an_article_of_race_gives_an_example_for_each_question(tmp_path):
    (tmp_path / "high1.txt").write_text(article() + "\n")
    found = read_examples([tmp_path / "high1.txt"], read_description("race"), training=True)
    first, second = found.examples
    assert (first.uid, first.label, first.pairs[1]) == ("high1-1-0", 1, ("Who b ?", "A long story ."))
    assert (second.label, second.pairs[3]) == (3, ("Why? h", "A long story ."))


def test_articles_that_cannot_be_used(tmp_path):
    lines = {
        "it has different numbers of questions, options and answers: 2, 2, 1": article(answers=["A"]),
        "its answer 'E' is none of A, B, C, D": article(answers=["A", "E"]),
        "question 2 has 3 options, not 4": article(options=[["a", "b", "c", "d"], ["e", "f", "g"]]),
        "its context is empty": article(article=" "),
        "it has no options, only article, questions, answers": json.dumps(
            {"article": "a", "questions": ["b"], "answers": ["A"]}
        ),
    }
    (tmp_path / "a.txt").write_text("\n".join([*lines.values(), article()]) + "\n")
    found = read_examples([tmp_path / "a.txt"], read_description("race"), training=True)
    assert {row.why for row in found.bad} == set(lines) and len(found.examples) == 2
    no_answers = json.loads(article())
    del no_answers["answers"]
    (tmp_path / "b.txt").write_text(json.dumps(no_answers) + "\n")
    with pytest.raises(DataError, match=r"--train-data \S+b.txt must have labels to train on, in the column 'answers'"):
        read_examples([tmp_path / "b.txt"], read_description("race"), training=True)
    assert not read_examples([tmp_path / "b.txt"], read_description("race"), training=False).labelled


def test_names_of_files():
    assert names_of(["MNLI/dev_matched.tsv", "MNLI/dev_mismatched.tsv"]) == ["dev_matched", "dev_mismatched"]
    assert names_of(["RACE/dev/middle", "RACE/test/middle"]) == ["dev-middle", "test-middle"]
