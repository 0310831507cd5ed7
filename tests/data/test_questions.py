"""Questions and answers: every form of file, DPR's matching, and files that would rather run something."""

import gzip
import json
import pathlib
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError, DataError
from megalith.data.questions import Matcher, parse_answers, read_questions, words

SHARED = pathlib.Path(__file__).parents[3] / "shared/data/nq"


def write(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_form_of_file_is_read(tmp_path):
    table = write(tmp_path, "dev.csv", """who is it\t['Ann', "O'Neil"]\nwhen\t"[""1999""]"\n""")
    lines = write(
        tmp_path, "dev.jsonl", '{"question": "who is it", "answer": ["Ann"]}\n\n{"question": "b", "answer": "c"}\n'
    )
    passage = {"title": "T", "text": "words"}
    dpr = write(
        tmp_path, "dev.json",
        json.dumps([{"question": "q", "answers": ["a"], "positive_ctxs": [passage], "hard_negative_ctxs": []}]),
    )  # fmt: skip
    assert [(each.text, each.answers) for each in read_questions(table)] == [
        ("who is it", ("Ann", "O'Neil")),
        ("when", ("1999",)),
    ]
    assert [(each.text, each.answers) for each in read_questions(lines)] == [("who is it", ("Ann",)), ("b", ("c",))]
    packed = tmp_path / "dev.json.gz"
    packed.write_bytes(gzip.compress(dpr.read_bytes()))
    assert read_questions(packed) == read_questions(dpr)
    packed.write_bytes(packed.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read as questions"):
        read_questions(packed)
    (question,) = read_questions(dpr)
    assert question.positives[0].text == "words" and question.negatives == () and question.answers == ("a",)


@pytest.mark.parametrize(
    "column",
    [
        "__import__('os').system('touch hostile')",
        "[__import__('os').system('touch hostile')]",
        "['a'] + [open('hostile', 'w')]",
        "[print]",
        "(lambda: 1)()",
        "'a'",
        "{'a': 1}",
        "[['a']]",
        "[" * 3000 + "]" * 3000,
        "9**9**9",
        "",
    ],
)
def test_an_answers_column_that_is_code_is_refused(tmp_path, monkeypatch, column):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, "hostile.csv", f"good\t['a']\nq\t{column}\n")
    with pytest.raises(DataError, match="line 2"):
        read_questions(path)
    assert not (tmp_path / "hostile").exists()


@pytest.mark.parametrize(
    "text", ["", "q\n", "a\tb\tc\n", "[1]", '[{"question": 1, "answers": []}]', '{"question": "a"}\n', "{\n"]
)
def test_what_is_no_file_of_questions_is_named(tmp_path, text):
    with pytest.raises(DataError, match="x\\.csv"):
        read_questions(write(tmp_path, "x.csv", text))


@given(st.lists(st.text(max_size=20), max_size=5))
def test_a_list_as_python_writes_it_is_read_back(values):
    assert parse_answers(repr(values)) == tuple(values)


@settings(deadline=None)  # the first text waits for the table of Unicode
@given(st.text(max_size=60))
def test_words_are_those_of_the_rule(text):
    """The rule of SimpleTokenizer, character by character."""
    expected, word = [], ""
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            word += character
            continue
        expected += [word] if word else []
        word = ""
        expected += [character] if kind not in "ZC" else []
    expected += [word] if word else []
    assert words(text) == [each.lower() for each in expected]


@pytest.mark.parametrize(
    ("match", "answers", "passage", "holds"),
    [
        ("string", ["Mount Rainier"], "It is mount  rainier, of course", True),
        ("string", ["Rainier mount"], "It is mount rainier", False),
        ("string", ["rain"], "It is mount rainier", False),
        ("string", ["a", "rainier"], "It is mount rainier", True),
        ("string", ["U.S."], "the u . s . army", True),
        ("string", ["café"], "Cafe\u0301 Noir", True),
        ("string", ["cafe"], "café", False),
        ("string", ["1,000"], "about 1,000 men", True),
        ("string", ["1000"], "about 1,000 men", False),
        ("string", ["", " "], "anything", False),
        ("string", ["日本"], "日本 は", True),
        ("regex", ["19[0-9]{2}"], "in 1984", True),
        ("regex", ["^the end$"], "It is\nTHE END\n", True),
        ("regex", ["("], "in (1984)", False),
        ("regex", ["18[0-9]{2}"], "in 1984", False),
    ],
)
def test_matching(match, answers, passage, holds):
    assert Matcher(match)(answers, passage) is holds


def test_another_match_is_refused():
    with pytest.raises(ConfigError, match="--faiss-match must be one of string, regex; found 'fuzzy'"):
        Matcher("fuzzy")


@pytest.mark.skipif(not SHARED.exists(), reason="needs nq of ../shared")
def test_natural_questions_are_read():
    table = read_questions(SHARED / "nq-dev.csv")
    assert len(table) == 8757 and all(question.answers for question in table)
    lines = (SHARED / "nq-dev.csv").read_text(encoding="utf-8").splitlines()
    assert table[0].text == re.split("\t", lines[0])[0]
    assert len(read_questions(SHARED / "NQ-open.efficientqa.dev.1.1.jsonl")) == 1800
