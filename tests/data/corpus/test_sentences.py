"""Sentences: several languages, nothing lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.data.corpus import sentences
from megalith.data.corpus.sentences import ISO_639_1, ISO_639_2, LANGUAGE_CODES, language_code, sentence_splitter


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
    with pytest.raises(ConfigError, match=r"^--split-sentences needs the package sentencex, .*'\.\[data\]'"):
        sentence_splitter()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["A sentence. ", "Another one!\n", "word ", "\n\n", "line\n", "x" * 30]), max_size=40))
def test_long_texts_are_cut_where_nothing_is_lost(parts):
    text = "".join(parts)
    before = sentences.MAX_RUN
    try:
        sentences.MAX_RUN = 50
        runs = list(sentences._runs(text))
        assert "".join(runs) == text
        assert "".join(sentence_splitter(keep_newlines=True)(text)) == text
    finally:
        sentences.MAX_RUN = before


def test_cuts_between_paragraphs_change_nothing(monkeypatch):
    text = "\n\n".join(f"Paragraph {i} has one. And two, by Mr. Smith!" for i in range(200))
    expected = sentence_splitter()(text)
    monkeypatch.setattr(sentences, "MAX_RUN", 100)
    assert sentence_splitter()(text) == expected and len(expected) == 400


@pytest.mark.parametrize(
    ("language", "code"), [("English", "en"), ("EN", "en"), ("deu", "de"), ("fre", "fr"), ("zu", "zu"), ("ceb", "ceb")]
)
def test_codes(language, code):
    assert language_code(language) == code


@pytest.mark.parametrize("language", ["zz", "e", "", "xx", "englsh", "en-us", "iw"])
def test_what_is_no_language_is_an_error(language):
    with pytest.raises(ConfigError, match=f"--lang must be a code of ISO 639 .*; found '{language}'"):
        language_code(language)
    with pytest.raises(ConfigError):
        sentence_splitter(language)


def test_tables_of_codes():
    codes = ISO_639_1.split()
    # ISO 639-1's 183, and bh and sh, which it has withdrawn
    assert len(codes) == len(set(codes)) == 185 and codes == sorted(codes)
    assert set(LANGUAGE_CODES.values()) <= set(codes) and set(ISO_639_2.values()) == set(LANGUAGE_CODES.values())
