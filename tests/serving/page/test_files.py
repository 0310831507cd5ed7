"""The page's files: each is served, none names another site or has script or style inline, and colors have contrast."""

import itertools
import pathlib
import re
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest

from megalith.serving.page.routes import FILES, MEDIA_TYPES

SOURCES = {name: path.read_text() for name, path in FILES.items()}
HTML = SOURCES["index.html"]
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
TINTS = [f"tint-{level}" for level in range(1, 5)]
TEXT = [  # (color of text, of what is behind it): WCAG 2.2 AA, 1.4.3, asks for 4.5 to 1
    *itertools.product(["ink", "muted", "accent", "bad"], ["paper", "surface"]),
    *itertools.product(["ink"], [*TINTS, "bad-paper"]),
    ("bad", "bad-paper"), ("on-accent", "accent"), ("on-accent", "accent-hover"),
]  # fmt: skip
SHAPES = [  # borders of controls, what shows the focus, the dot: 1.4.11 asks for 3 to 1
    *itertools.product(["edge", "accent", "good", "warn", "bad"], ["paper", "surface"]),
    ("accent", "bad-paper"),
]  # fmt: skip


def luminance(color: str) -> float:
    """The relative luminance of #rrggbb, as WCAG 2.2 defines it."""
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", SOURCES["colors.css"])
    colors = {name: pair[theme] for name, *pair in pairs}
    poor = {pair: contrast(*map(colors.get, pair)) for pair in TEXT if contrast(*map(colors.get, pair)) < 4.5}
    poor |= {pair: contrast(*map(colors.get, pair)) for pair in SHAPES if contrast(*map(colors.get, pair)) < 3}
    assert not poor
    used = set(re.findall(r"var\(--([\w-]+)\)", SOURCES["layout.css"] + SOURCES["texts.css"]))
    assert used - colors.keys() <= {"sans", "serif", "mono", "share"}
    assert not re.search(r"#[0-9a-f]{3,8}\b(?=[^{]*;)", SOURCES["layout.css"] + SOURCES["texts.css"])


class Tags(HTMLParser):
    """(tag, attributes) of a document, and the texts of its scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.found, self.inline = list[tuple[str, dict[str, str | None]]](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.lasttag in ("script", "style") and data.strip():
            self.inline.append(data)


def test_nothing_is_inline_or_from_elsewhere():
    tags = Tags(HTML)
    assert not tags.inline
    attributes = [(tag, name, value) for tag, found in tags.found for name, value in found.items()]
    assert not [each for each in attributes if each[1] == "style" or each[1].startswith("on")]
    needed = [value for _, name, value in attributes if name in ("src", "href")]
    needed += re.findall(r'from "\./([\w.]+)"', "".join(SCRIPTS.values()))
    assert {path.removeprefix("page/") for path in needed} == FILES.keys() - {"index.html"}
    for name, text in SOURCES.items():
        assert not re.search(r"(?<!xmlns=\")https?:|url\(|@import", text), name
    for name, text in SCRIPTS.items():  # the model's text is text, and nothing that a browser reads as HTML or code
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|alert\(", text
        ), name


def test_scripts_name_what_is_there():
    ids = [found["id"] for _, found in Tags(HTML).found if "id" in found]
    assert len(ids) == len(set(ids))
    named = re.findall(r'(?:\$|getElementById)\("([\w-]+)"\)|querySelector\("#([\w-]+)"\)', "".join(SCRIPTS.values()))
    assert {one or other for one, other in named} - set(ids) == set()
    labels = {found.get("for") for tag, found in Tags(HTML).found if tag == "label"}
    assert labels - {None} <= set(ids)


@pytest.mark.parametrize("name", SOURCES)
def test_files_are_short(name):
    lines = SOURCES[name].splitlines()
    assert len(lines) < 400 and max(map(len, lines)) <= 120


def test_files_are_served(served):
    url, _ = served
    for name, text in SOURCES.items():
        with urllib.request.urlopen(f"{url}/page/{name}" if name != "index.html" else url, timeout=10) as answer:
            assert answer.read().decode() == text
            assert answer.headers["Content-Type"].partition(";")[0] == MEDIA_TYPES[pathlib.Path(name).suffix]
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'self';")
            assert "unsafe" not in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("routes.py", "..%2froutes.py", "nothing.js"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}/page/{name}", timeout=10)
