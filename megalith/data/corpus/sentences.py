"""Texts to sentences, in many languages and without a download."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator

from megalith.common.errors import ConfigError, problem
from megalith.common.extras import require

# nltk calls its languages by name, and so do Megatron's commands; sentencex by ISO code.
LANGUAGE_CODES = {
    "czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "estonian": "et", "finnish": "fi", "french": "fr",
    "german": "de", "greek": "el", "italian": "it", "malayalam": "ml", "norwegian": "no", "polish": "pl",
    "portuguese": "pt", "russian": "ru", "slovene": "sl", "spanish": "es", "swedish": "sv", "turkish": "tr",
}  # fmt: skip
ISO_639_1 = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo es
et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka kg ki kj
kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng nl nn no nr nv
ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg sh si sk sl sm sn so sq sr ss st su sv sw ta te tg th
ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
ISO_639_2 = {  # three letters of those languages, which the library does not know
    "ces": "cs", "cze": "cs", "dan": "da", "deu": "de", "dut": "nl", "ell": "el", "eng": "en", "est": "et", "fin": "fi",
    "fra": "fr", "fre": "fr", "ger": "de", "gre": "el", "ita": "it", "mal": "ml", "nld": "nl", "nor": "no", "pol": "pl",
    "por": "pt", "rus": "ru", "slv": "sl", "spa": "es", "swe": "sv", "tur": "tr",
}  # fmt: skip
# Characters passed to the library at once: it is quadratic in long paragraphs. A change log of 690 kB took 0.9 s
# whole and 0.05 s in runs.
MAX_RUN = 4096


def language_code(language: str) -> str:
    """The library's code of a language given by its English name or an ISO 639 code; ConfigError for anything else.

    Three letters are taken on trust: there are 7,900 such codes, and for one that it does not know the library has the
    rules of English.
    """
    name = language.lower()
    code = LANGUAGE_CODES.get(name) or ISO_639_2.get(name, name)
    if code not in ISO_639_1.split() and not re.fullmatch("[a-z]{3}", code):
        near = difflib.get_close_matches(name, LANGUAGE_CODES, 1)
        rule = f"must be a code of ISO 639 (en, de, ceb) or one of {', '.join(LANGUAGE_CODES)}"
        cure = f"Write --lang {near[0]}, if that is meant" if near else "Correct the name"
        raise ConfigError(problem("--lang", language, rule, cure))
    return code


def sentence_splitter(language: str = "english", keep_newlines: bool = False) -> Callable[[str], list[str]]:
    """A function from a text to its sentences.

    language: as `language_code` takes it; one without rules of its own has those of its nearest language.
    keep_newlines: white space after a sentence stays with it, so that the sentences concatenate to the text; else it is
    stripped.
    """
    library = require("sentencex", "--split-sentences").segment
    code = language_code(language)

    def segment(text: str) -> list[str]:
        if len(text) <= MAX_RUN:
            return library(code, text)
        return [piece for run in _runs(text) for piece in library(code, run)]

    def segment_with_newlines(text: str) -> list[str]:
        sentences: list[str] = []
        for piece in segment(text):
            if sentences and (piece.isspace() or sentences[-1].isspace()):
                sentences[-1] += piece  # a paragraph break is no sentence
            else:
                sentences.append(piece)
        return sentences

    if keep_newlines:
        return segment_with_newlines
    return lambda text: [stripped for piece in segment(text) if (stripped := piece.strip())]


def _runs(text: str) -> Iterator[str]:
    """The text in runs of at most MAX_RUN characters where it can be split.

    That is between paragraphs, else after a full stop, else at the end of a line.
    """
    begin = 0
    while len(text) - begin > MAX_RUN:
        for mark in ("\n\n", ".\n", "\n"):
            end = text.rfind(mark, begin + 1, begin + MAX_RUN)
            if end > 0:
                break
        else:
            mark, end = "\n", text.find("\n", begin + MAX_RUN)
        if end < 0:
            break
        yield text[begin : end + len(mark)]
        begin = end + len(mark)
    yield text[begin:]
