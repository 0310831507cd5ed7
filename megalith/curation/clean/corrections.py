"""Corrections of a text's characters: encoding, Unicode form, punctuation, white space, private data."""

from __future__ import annotations

import functools
import ipaddress
import re
import unicodedata
from typing import Any

from megalith.common.extras import require

# Of lines of these characters alone ftfy changes the quotes, and nothing else: printable ASCII without what may be
# HTML or an escape, dashes, curled quotes.
PLAIN = re.compile(r"[\t\n\x20-%'-~–—‘’“”]*")
CURLED = (("‘", "'"), ("’", "'"), ("“", '"'), ("”", '"'))
LINES = re.compile(r"[^\n]*\n|[^\n]+")  # each with its end: ftfy makes one newline of \r\n
QUOTES = {
    **dict.fromkeys("‘’‚‛′＇`´", "'"), **dict.fromkeys("“”„‟″«»＂", '"'), **dict.fromkeys("‐‑‒–−", "-"),
    "—": " - ", "―": " - ", "…": "...", "‹": "'", "›": "'", "\u00a0": " ", "\u2028": "\n", "\u2029": "\n\n",
}  # fmt: skip
PUNCTUATION = str.maketrans(QUOTES)
EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
IP_ADDRESS = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f:]{0,39}:[0-9A-Fa-f:]{1,39}(?:\.\d{1,3}){0,3})(?![\w:]|\.\d)"
)  # IPv6 has up to 39 characters; without a limit a long row of colons takes quadratic time
HTML = re.compile(r"<(?:!doctype html|html|head|body|article|div|p|br)\b[^<]*>", re.IGNORECASE)
SPACES = re.compile(r"(?<![^\S\n])[^\S\n]+\n")  # from the first of them on: else quadratic in their number
MANY_NEWLINES = re.compile(r"\n{3,}")
GENERAL = re.compile(r"  +|\b\n+ |\b\n+")


@functools.cache
def _ftfy() -> Any:
    return require("ftfy", "the rule ftfy")


def fix_encoding(text: str) -> str:
    """ftfy.fix_text: mojibake, HTML entities, ligatures, widths, curled quotes, control characters (Speer, 2019).

    ftfy works line by line; lines in which it would change quotes alone are not given to it: most are of that kind.
    """
    if PLAIN.fullmatch(text):
        return _straight(text)
    if "<" in text:  # behind a line with <, ftfy takes entities for HTML's, so that lines depend on lines before
        return _ftfy().fix_text(text)
    fix = _ftfy().fix_text
    return "".join(_straight(line) if PLAIN.fullmatch(line) else fix(line) for line in LINES.findall(text))


def _straight(text: str) -> str:
    for curled, straight in CURLED:
        text = text.replace(curled, straight)
    return text


def extract_html(text: str) -> str:
    """The text of a page's article, by trafilatura (Barbaresi, 2021); a text that is no HTML stays."""
    if not HTML.search(text):
        return text
    return require("trafilatura", "the rule html").extract(text, include_comments=False) or ""


def normalize(text: str) -> str:
    """Unicode's composed form (NFC): one spelling of each accented letter."""
    return unicodedata.normalize("NFC", text)


def normalize_compatible(text: str) -> str:
    """Unicode's compatible form (NFKC): also ligatures, widths and superscripts as plain characters."""
    return unicodedata.normalize("NFKC", text)


def standardize_punctuation(text: str) -> str:
    """Quotes, dashes, dots and special spaces as ASCII: what Megatron-LM's README asks of Wikipedia for BERT."""
    return text if text.isascii() and "`" not in text else text.translate(PUNCTUATION)


def squeeze_newlines(text: str) -> str:
    """Unix line ends, none with spaces before it, at most two in a row, no white space at both ends."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return MANY_NEWLINES.sub("\n\n", SPACES.sub("\n", text)).strip()


def general_cleaning(text: str) -> str:
    """Megatron-LM's step of that name: runs of spaces, and newlines behind a word, become one space."""
    return GENERAL.sub(" ", text)


def mask_emails(text: str) -> str:
    """E-mail addresses as <EMAIL>."""
    return EMAIL.sub("<EMAIL>", text) if "@" in text else text


def mask_ip_addresses(text: str) -> str:
    """IPv4 and IPv6 addresses as <IP_ADDRESS>; times, versions and other numbers stay."""
    return IP_ADDRESS.sub(_masked_address, text)


def _masked_address(found: re.Match) -> str:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:
        return found[0]
    # "::" and the like are found in source code.
    return found[0] if address.is_unspecified or len(found[0]) < 7 else "<IP_ADDRESS>"
