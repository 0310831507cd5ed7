"""Pages: everything is escaped, nothing is loaded, and tables say what they were given."""

import html.parser
import io

from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from megalith.reports.page import Bars, Folded, Lines, Picture, page
from megalith.reports.table import Table, number_text, print_table

WORDS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=8)


class Reader(html.parser.HTMLParser):
    """The tags and the texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.texts = set[str](), list[str]()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@settings(deadline=None)
@given(WORDS, st.lists(st.lists(WORDS, min_size=2, max_size=2), max_size=3), WORDS)
def test_texts_come_out_as_they_went_in(title: str, rows: list[list[str]], line: str) -> None:
    reader = Reader()
    folded = Folded(title, [(line, f"<{line}>"), ("", line)])
    parts = [Table(title, ["<a>", "&"], rows, [1]), Lines("x", [line]), Bars("y", [(line, 2.0, line)]), folded]
    reader.feed(page(title, parts))
    reader.close()
    expected = [title, "<a>", "&", *(cell for row in rows for cell in row), line, f"<{line}>"]
    assert [text for text in expected if text not in reader.texts] == []
    assert reader.tags.isdisjoint({"script", "link", "img", "iframe", "a"}) and {"table", "ul", "div"} <= reader.tags


def test_bars_are_as_long_as_their_numbers() -> None:
    made = page("t", [Bars("b", [("one", 1.0, "1"), ("four", 4.0, "4")]), Bars("none", [])])
    assert "width: 5.000rem" in made and "width: 20.000rem" in made


def test_a_picture_is_in_the_page() -> None:
    made = page("t", [Picture('a "b"', "iVBORw0KGgo=")])
    assert '<img alt="a &quot;b&quot;" src="data:image/png;base64,iVBORw0KGgo=">' in made and "img-src data:" in made


def test_tables_on_a_terminal_and_in_a_file() -> None:
    table = Table("[bold]t[/bold]", ["a", "b"], [["[red]x", "1.5" * 60]], [1])
    console = Console(file=io.StringIO(), width=40)
    print_table(table, console)
    shown = console.file.getvalue()
    assert "[bold]t[/bold]" in shown and "[red]x" in shown and "1.5" * 60 in shown


def test_numbers() -> None:
    assert [number_text(value) for value in (12345678, 0.123456789, 1e-9, float("inf"))] == [
        "12345678", "0.123457", "1e-09", "inf",
    ]  # fmt: skip
