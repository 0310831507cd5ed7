"""Detokenizers, on text whose result is written by hand, and the names by which Megatron chooses them."""

import pytest

from megalith.evaluation.detokenizers import detokenize, detokenizer_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a well @-@ known 1 @,@ 200 and 3 @.@ 5", "a well-known 1,200 and 3.5"),
        ("yes , no ; so : it . is ! not ? so", "yes, no; so: it. is! not? so"),
        ('he ( said ) [ this ] { or } " that " and', 'he (said) [this] {or} "that" and'),
        ("the boys ' game", "the boys' game"),
        ("Ann 's game", "Ann's game"),
        ("the boys ' game is Ann 's", "the boys'game is Ann's"),  # two apostrophes are quotes to Megatron
        (" \n = Title = \n \n = = Part = = \n text \n", "\n= Title =\n\n== Part ==\ntext\n"),
        ("20 ° C and N of", "20°C and 1 of"),
        ("/' 5/", "/' 5/"),
    ],
)
def test_wikitext(text: str, expected: str) -> None:
    assert detokenize(text, "wikitext") == expected


def test_ptb_and_none() -> None:
    text = "it 's n't $ N of \n # 1"
    assert detokenize(text, "ptb") == "it'sn't $1 of\n#1"
    assert detokenize(text, "none") == text


def test_the_path_chooses() -> None:
    assert [detokenizer_of(path) for path in ("x/wiki.test.tokens", "ptb.txt", "lambada/a.jsonl", "a.txt")] == [
        "wikitext", "ptb", "none", None,
    ]  # fmt: skip
