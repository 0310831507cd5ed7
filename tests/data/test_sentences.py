"""Sentences: several languages, nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data.sentences import sentence_splitter

pytest.importorskip("sentencex")


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("english", "Mr. Smith came. He left!  Why?\n", ["Mr. Smith came.", "He left!", "Why?"]),
        ("german", "Das ist z. B. gut. Ja.", ["Das ist z. B. gut.", "Ja."]),
        ("fr", "Il est là. Bon.", ["Il est là.", "Bon."]),
        ("ja", "吾輩は猫である。名前はまだ無い。", ["吾輩は猫である。", "名前はまだ無い。"]),
    ],
)
def test_languages(language, text, expected):
    assert sentence_splitter(language)(text) == expected


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab. \n!?A"), max_size=40))
def test_keep_newlines_loses_nothing(text):
    pieces = sentence_splitter("english", keep_newlines=True)(text)
    assert "".join(pieces) == text
    assert not any(piece.isspace() for piece in pieces[1:])
    assert [piece for piece in sentence_splitter()(text) if piece != piece.strip() or not piece] == []


def test_missing_package(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sentencex", None)
    with pytest.raises(DataError, match=r"megalith\[data\]"):
        sentence_splitter()
