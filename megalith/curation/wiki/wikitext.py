"""Wikitext to plain text, by mwparserfromhell: what docs/corpus.md says of each part of a page.

Templates are not expanded, which would need the whole wiki; those whose text is among their own arguments are read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from megalith.common.extras import require

DROPPED_TAGS = frozenset((
    "ref", "references", "gallery", "timeline", "score", "syntaxhighlight", "source", "imagemap", "templatestyles",
    "style", "script", "mapframe", "maplink", "graph", "hiero", "inputbox", "categorytree", "section", "indicator",
))  # fmt: skip
FORMULA_TAGS = frozenset(("math", "chem", "ce"))
FILE_NAMESPACES, CATEGORY, MEDIA = (6,), 14, -2
DEFAULT_NAMESPACES = frozenset(("file", "image", "category", "media"))
# Templates that show some of their arguments: name -> how they are put together ({1} is the first one).
TEMPLATES = {
    "nbsp": " ", "snd": " – ", "spnd": " – ", "spaced ndash": " – ", "ndash": "–", "mdash": "—", "'": "'", "!": "|",
    "nowrap": "{1}", "nobr": "{1}", "small": "{1}", "big": "{1}", "em": "{1}", "strong": "{1}", "abbr": "{1}",
    "lang": "{2}", "transl": "{2}", "transliteration": "{2}", "convert": "{1} {2}", "cvt": "{1} {2}", "val": "{1}",
    "formatnum": "{1}", "quote": "{1}", "blockquote": "{1}", "sic": "{1}", "circa": "c. {1}", "c.": "c. {1}",
    "ill": "{1}", "interlanguage link": "{1}", "usd": "US${1}", "frac": "{1}/{2}",
}  # fmt: skip
HEADING = "\x01"  # one for each level, before the text of a heading, while lines are sorted out
ITEM = "\x02"  # one for each level, before an item of a list
STYLE_MARKS = re.compile(r"'{2,5}")
MAGIC = re.compile(r"__[A-Z]+__")
EMPTY_BRACKETS = re.compile(r"\s?[(\[][\s,;:–-]*[)\]]")
LOOSE_PUNCTUATION = re.compile(r"\s+([,.;:])(?!\S)|([(])[\s,;]+")
SPACES = re.compile(r"[^\S\n]+")
NO_TEXT = f"-*#:;|! \t{ITEM}"  # a line of these alone holds none
LEFT_OVER = re.compile(r"\{\{|\}\}|\{\||\|\}|\[\[|\]\]")  # of markup that was never closed


@dataclasses.dataclass(frozen=True)
class Choices:
    """What becomes of parts of a page."""

    headings: bool = True
    lists: bool = True
    tables: bool = False
    formulas: bool = False
    dropped_namespaces: frozenset[str] = DEFAULT_NAMESPACES


def dropped_namespaces(names: Mapping[int, str]) -> frozenset[str]:
    """The namespaces, in lower case, whose links show a picture or nothing, in the wiki's own language too."""
    return DEFAULT_NAMESPACES | {
        names[number].lower() for number in (*FILE_NAMESPACES, CATEGORY, MEDIA) if number in names
    }


def to_text(wikitext: str, choices: Choices) -> str:
    """The text of a page. Raises RecursionError for markup that is nested too deeply."""
    parser = require("mwparserfromhell", "data wiki")
    # Bold and italics are left to `STYLE_MARKS`: unbalanced ones would make the parser take the page for one of them.
    code = parser.parse(wikitext.replace(HEADING, "").replace(ITEM, ""), skip_style_tags=True)
    return _tidy("".join(_shown(code.nodes, choices)), choices)


def _shown(nodes: Iterable[Any], choices: Choices) -> Iterable[str]:
    for node in nodes:
        yield _SHOWN[type(node).__name__](node, choices)


def _inside(code: Any, choices: Choices) -> str:
    return "".join(_shown(code.nodes, choices)) if code is not None else ""


def _link(node: Any, choices: Choices) -> str:
    title = str(node.title).strip()
    namespace, colon, _ = title.partition(":")
    if colon and namespace.strip().lower() in choices.dropped_namespaces:
        return ""
    return _inside(node.text, choices) if node.text is not None else title.lstrip(":")


def _external_link(node: Any, choices: Choices) -> str:
    if node.title is not None:
        return _inside(node.title, choices)
    return "" if node.brackets else str(node.url)


def _template(node: Any, choices: Choices) -> str:
    pattern = TEMPLATES.get(str(node.name).strip().lower())
    if pattern is None:
        return ""
    arguments = {str(each.name).strip(): _inside(each.value, choices).strip() for each in node.params}
    return re.sub(r"\{(\d)\}", lambda found: arguments.get(found[1], ""), pattern)


def _tag(node: Any, choices: Choices) -> str:
    name = str(node.tag).strip().lower()
    if name in DROPPED_TAGS:
        return ""
    if name in FORMULA_TAGS:
        return f"${str(node.contents).strip()}$" if choices.formulas else ""
    if name == "table":
        return _inside(node.contents, choices) + "\n" if choices.tables else ""
    if name in ("td", "th"):
        return _inside(node.contents, choices).strip() + "\t"
    if name == "tr":
        return "\n" + _inside(node.contents, choices).strip()
    if name == "br":
        return "\n"
    if node.wiki_markup and name in ("li", "dt", "dd", "hr"):
        return ITEM if name == "li" else ""
    if name in ("li", "p", "div", "blockquote"):
        return f"\n{ITEM if name == 'li' else ''}{_inside(node.contents, choices).strip()}\n"
    return _inside(node.contents, choices)


def _heading(node: Any, choices: Choices) -> str:
    return f"\n{HEADING * node.level}{_inside(node.title, choices).strip()}\n"


_SHOWN: dict[str, Callable[[Any, Choices], str]] = {
    "Text": lambda node, choices: str(node.value),
    "Wikilink": _link,
    "ExternalLink": _external_link,
    "Template": _template,
    "Tag": _tag,
    "Heading": _heading,
    "HTMLEntity": lambda node, choices: node.normalize(),
    "Comment": lambda node, choices: "",
    "Argument": lambda node, choices: _inside(node.default, choices),
}


def _tidy(text: str, choices: Choices) -> str:
    """Without what dropped parts leave behind: empty brackets, list items and sections, spaces, empty lines."""
    text = MAGIC.sub("", STYLE_MARKS.sub("", text)).replace("\u00a0", " ").replace("\r", "")
    text = LEFT_OVER.sub("", EMPTY_BRACKETS.sub("", text))
    text = LOOSE_PUNCTUATION.sub(lambda found: found[1] or found[2], text)
    lines = (SPACES.sub(" ", line).strip() for line in text.split("\n"))
    kept: list[str] = []
    for line in reversed([line for line in lines if not line or line.strip(NO_TEXT)]):
        level = len(line) - len(line.lstrip(HEADING))
        if level:
            # A section without text, before another of its level or above, or at the end, goes.
            below = next((other for other in reversed(kept) if other), "")
            if not below or 0 < len(below) - len(below.lstrip(HEADING)) <= level:
                continue
        if line.startswith(ITEM):
            if not choices.lists:
                continue
            line = f"- {line.lstrip(ITEM).strip()}"
        if line or (kept and kept[-1]):
            kept.append(line)
    if not choices.headings:
        kept = [line for line in kept if not line.startswith(HEADING)]
    return "\n".join(reversed(kept)).replace(HEADING, "").strip("\n")
