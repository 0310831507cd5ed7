"""Text of language-modelling data sets, whose words and punctuation are spaced apart, as it was written before.

The replacements and their order are those of Megatron's tasks/zeroshot_gpt/detokenizer.py, because perplexities are
only comparable after the same ones. (Its rule for contractions of digits, `/' [0-9]/`, is left out: it can only match
text between two slashes, and would damage that.)
"""

from __future__ import annotations

import re

_WIKITEXT = (
    *(("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_BRACKETS = {  # what they enclose loses the spaces at its ends
    "()": r"\(\s*([^\)]*?)\s*\)", "[]": r"\[\s*([^\]]*?)\s*\]", "{}": r"{\s*([^}]*?)\s*}",
    '""': r"\"\s*([^\"]*?)\s*\"", "''": r"'\s*([^']*?)\s*'",
}  # fmt: skip
_WIKITEXT_END = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "==")),
    *((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)
_PTB = ((" '", "'"), (" \n", "\n"), ("\n ", "\n"), (" n't", "n't"), (" N ", "1 "), ("$ 1", "$1"), ("# 1", "#1"))


def detokenize(text: str, name: str) -> str:
    """The text without the spaces that a data set added. name: wikitext, ptb or none."""
    if name == "wikitext":
        text = _replace(text, _WIKITEXT)
        for pair, pattern in _BRACKETS.items():
            text = re.sub(pattern, rf"{pair[0]}\1{pair[1]}", text)
        return _replace(text, _WIKITEXT_END)
    return _replace(text, _PTB) if name == "ptb" else text


def detokenizer_of(path: str) -> str | None:
    """The detokenizer that Megatron chooses by a path's name; None where it would choose none."""
    known = {"ptb": "ptb", "wiki": "wikitext", "lambada": "none"}
    return next((name for word, name in known.items() if word in path), None)


def _replace(text: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text
