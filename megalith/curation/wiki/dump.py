"""The pages of a MediaWiki dump (XML, also in bzip2), part by part; damage costs the pages that it is in."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import BinaryIO

from megalith.common import units
from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.curation.wiki.bzip2_blocks import read_blocks
from megalith.data.corpus.compression import compression

BEGIN, END = b"<page>", b"</page>"
READ_BYTES = 1 << 20
HEADER_BYTES = 1 << 18
NAMESPACE = re.compile(rb'<namespace key="(-?\d+)"[^>]*>([^<]*)</namespace>')
BASE = re.compile(rb"<base>([^<]*)</base>")


@dataclasses.dataclass(frozen=True)
class Site:
    """What the head of a dump says: the address of the wiki, and the names of its namespaces by number."""

    base: str = ""
    namespaces: dict[int, str] = dataclasses.field(default_factory=dict)

    def url(self, page: str) -> str:
        """The address of a page by its id, as WikiExtractor writes it."""
        return f"{self.base.rpartition('/')[0]}?curid={page}" if self.base else ""


@dataclasses.dataclass(frozen=True)
class Page:
    """One page: its newest revision's text, or the title that it leads on to."""

    title: str
    id: str
    namespace: int
    redirect: str
    wikitext: str


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is lost, and why."""

    reason: str


def read_site(path: str) -> Site:
    """The head of a dump. Raises DataError where the file is none."""
    with open(path, "rb") as file:
        head = b""
        for _, content in _pieces(file, 0, HEADER_BYTES):
            head += content or b""
            if len(head) > HEADER_BYTES or content is None:
                break
    if content is not None and b"<mediawiki" not in head:
        found = Words(repr(head[:60]))
        raise DataError(problem(path, found, "must be a MediaWiki dump", "Give pages-articles.xml, also in bzip2"))
    names = {int(number): _text(name) for number, name in NAMESPACE.findall(head)}
    base = BASE.search(head)
    return Site(_text(base[1]) if base else "", names)


def _text(content: bytes) -> str:
    return ElementTree.fromstring(b"<a>" + content + b"</a>").text or ""


def read_pages(path: str, start: int, stop: int, max_bytes: int) -> Iterator[Page | Damage]:
    """The pages that begin in bytes start to stop of the file (of a compressed one, in blocks that begin there).

    max_bytes: a longer page is lost.
    """
    with open(path, "rb") as file:
        text, owned, lost = b"", 0, False  # owned: the bytes of `text` in which pages of this part may begin
        for position, content in _pieces(file, start, stop):
            mine = position < stop
            if content is None:
                if not mine:
                    return  # whose block it is tells
                yield Damage(f"the bzip2 block at byte {position} is damaged; the pages in it are lost")
                text, owned, lost = b"", 0, False  # a page that was open is lost with it
                continue
            text += content
            owned = len(text) if mine else owned
            while 0 <= (begin := text.find(BEGIN)) < owned and (end := text.find(END, begin)) >= 0:
                end += len(END)
                if not lost:
                    yield _page(text[begin:end], max_bytes)
                text, owned, lost = text[end:], max(0, owned - end), False
            is_open = 0 <= begin < owned
            # What is no page goes; the end may be the beginning of a tag.
            cut = begin if is_open else max(0, len(text) - len(BEGIN) + 1)
            text, owned = text[cut:], max(0, owned - cut)
            if not mine and not owned:
                return
            if is_open and len(text) > max_bytes + READ_BYTES:
                if not lost:
                    yield Damage(f"a page is longer than {units.size(max_bytes)} (--max-document-bytes)")
                text, lost = BEGIN + text[-len(END) :], True
                owned = len(text) if mine else 1
        if text.startswith(BEGIN) and owned and not lost:
            yield Damage("the file ends inside a page")


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """(byte of the file, text that begins there) in order, to the end; None for the text of a damaged block.

    No piece of a plain file passes `stop`.
    """
    file.seek(0)
    if compression(file.read(16)) == ".bz2":
        blocks = read_blocks(file, start)
        yield from ((block.bit // 8, block.content) for block in blocks)
        return
    while True:
        file.seek(start)
        content = file.read(min(READ_BYTES, stop - start) if start < stop else READ_BYTES)
        if not content:
            return
        yield start, content
        start += len(content)


def _page(content: bytes, max_bytes: int) -> Page | Damage:
    if len(content) > max_bytes:
        return Damage(f"a page of {units.size(len(content))} is longer than --max-document-bytes")
    try:
        # No document type can be declared inside of an element, so that no entity of its own can be defined.
        page = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        title = re.search(rb"<title>(.{0,80})", content)
        shown = title[1].decode(errors="replace") if title else "without a title"
        return Damage(f"malformed page {shown!r} ({error})")
    namespace = page.findtext("ns") or "0"
    if re.fullmatch(r"\s*-?\d{1,9}\s*", namespace) is None:
        return Damage(f"malformed page {page.findtext('title', '')[:80]!r} (its namespace is {namespace[:20]!r})")
    redirect = page.find("redirect")
    text = page.find("revision/text")
    return Page(
        page.findtext("title", ""),
        page.findtext("id", ""),
        int(namespace),
        redirect.get("title", "") if redirect is not None else "",
        (text.text or "") if text is not None else "",
    )
