"""Texts to sentences, in many languages and without a download."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megalith.common.extras import require

# nltk calls its languages by name, and so do Megatron's commands; sentencex by ISO code.
CODES = {
    "czech": "cs", "danish": "da", "dutch": "nl", "english": "en", "estonian": "et", "finnish": "fi", "french": "fr", "german": "de",
    "greek": "el", "italian": "it", "malayalam": "ml", "norwegian": "no", "polish": "pl", "portuguese": "pt", "russian": "ru",
    "slovene": "sl", "spanish": "es", "swedish": "sv", "turkish": "tr",
}  # fmt: skip
LONG = 4096  # characters; the library is quadratic in long paragraphs: a change log of 690 kB took 0.9 s whole and 0.05 s in runs


def sentence_splitter(language: str = "english", keep_newlines: bool = False) -> Callable[[str], list[str]]:
    """A function from a text to its sentences.

    language: an English name that nltk knows or an ISO 639 code; an unknown code falls back to the rules of its nearest language.
    keep_newlines: white space after a sentence stays with it, so that the sentences join to the text; else it is stripped.
    """
    library = require("sentencex", "--split-sentences").segment
    code = CODES.get(language.lower(), language)

    def segment(text: str) -> list[str]:
        return library(code, text) if len(text) <= LONG else [piece for run in _runs(text) for piece in library(code, run)]

    def kept(text: str) -> list[str]:
        sentences: list[str] = []
        for piece in segment(text):
            if sentences and (piece.isspace() or sentences[-1].isspace()):
                sentences[-1] += piece  # a paragraph break is no sentence
            else:
                sentences.append(piece)
        return sentences

    return kept if keep_newlines else lambda text: [bare for piece in segment(text) if (bare := piece.strip())]


def _runs(text: str) -> Iterator[str]:
    """The text in runs of at most LONG characters where it can be cut: between paragraphs, else after a full stop, else at a line's end."""
    begin = 0
    while len(text) - begin > LONG:
        for mark in ("\n\n", ".\n", "\n"):
            end = text.rfind(mark, begin + 1, begin + LONG)
            if end > 0:
                break
        else:
            mark, end = "\n", text.find("\n", begin + LONG)
        if end < 0:
            break
        yield text[begin : end + len(mark)]
        begin = end + len(mark)
    yield text[begin:]
