"""The page in a record: what the server answered, as text."""

from __future__ import annotations

import codecs
import dataclasses
import http.client
import io
import re
from typing import Any

from megalith.common import units
from megalith.common.extras import require
from megalith.curation.warc.records import Record

HTML, PLAIN = ("text/html", "application/xhtml+xml"), ("text/plain",)
DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
HEAD = 4096  # bytes in which a page may declare its charset


@dataclasses.dataclass(frozen=True)
class Page:
    """A page. status: of the answer, 200 for records that are no answer. media_type: without parameters."""

    url: str
    date: str
    status: int
    media_type: str
    text: str  # of HTML and plain text; of others nothing

    @property
    def is_html(self) -> bool:
        """Whether the text is HTML."""
        return self.media_type in HTML


def read_page(record: Record, max_bytes: int) -> Page | None:
    """The page of a record; None for a record of another kind (request, metadata, revisit ...).

    An answer's content is freed of chunks and compression. Raises ValueError that says what is wrong with it; of more
    than max_bytes after decompression, too.
    """
    kind, content = record.headers.get("warc-type", ""), record.content
    described, status = record.headers.get("content-type", ""), 200
    if kind == "response" and described.startswith("application/http"):
        described, status, content = _answer(content, max_bytes)
    elif kind not in ("response", "resource", "conversion"):
        return None
    message = http.client.HTTPMessage()
    message["Content-Type"] = described or "application/octet-stream"
    media_type = message.get_content_type()
    text = decode(content, message.get_content_charset() or "") if media_type in HTML + PLAIN else ""
    url = record.headers.get("warc-target-uri", "").strip("<>")
    return Page(url, record.headers.get("warc-date", ""), status, media_type, text)


class _Socket:
    """What http.client reads an answer from."""

    def __init__(self, content: bytes):
        self.content = content

    def makefile(self, *args: Any) -> io.BytesIO:
        return io.BytesIO(self.content)


def _answer(content: bytes, max_bytes: int) -> tuple[str, int, bytes]:
    """(Content-Type, status, body) of an answer of HTTP."""
    urllib3 = require("urllib3", "data warc")
    answer = http.client.HTTPResponse(_Socket(content))  # type: ignore[arg-type]
    try:
        answer.begin()
        kind, status = answer.headers.get("Content-Type", ""), answer.status
        if kind.partition(";")[0].strip().lower() not in HTML + PLAIN or status != 200:
            return kind, status, b""
        if answer.chunked and not re.match(rb"[0-9A-Fa-f]+\s*[\r;]", content[content.find(b"\r\n\r\n") + 4 :][:20]):
            answer.chunked, answer.length = False, None  # type: ignore[assignment]  # the crawler has put it together
        packed = {each.strip() for each in answer.headers.get("Content-Encoding", "").lower().split(",")}
        if unknown := packed - {"", "identity", *urllib3.HTTPResponse.CONTENT_DECODERS}:
            raise ValueError(f"Content-Encoding {', '.join(unknown)}, which is not read (br needs the package brotli)")
        # Crawlers cut long answers off, so that their length is not always what they say.
        reader = urllib3.HTTPResponse(
            answer, answer.headers.items(), preload_content=False, enforce_content_length=False
        )
        body = reader.read(max_bytes + 1)
    except (http.client.HTTPException, urllib3.exceptions.HTTPError) as error:
        raise ValueError(f"no answer of HTTP ({type(error).__name__}: {str(error)[:100]})") from error
    if len(body) > max_bytes:
        raise ValueError(f"a page longer than {units.size(max_bytes)} (--max-document-bytes)")
    return kind, status, body


def decode(content: bytes, charset: str) -> str:
    """The text of a page: as UTF-8 where it is that; else as its server, then the page itself, says; else guessed.

    No other charset is UTF-8 by chance, and servers name one for all their pages, so that what they say comes second.
    """
    declared = DECLARED.search(content[:HEAD])
    for name in ("utf-8-sig", charset, declared[1].decode("ascii", "replace") if declared else ""):
        try:
            name = codecs.lookup(name).name if name else ""
            # Browsers take these for Windows-1252 (the WHATWG's Encoding Standard, section 4.2).
            return content.decode("cp1252" if name in ("iso8859-1", "ascii") else name)
        except (LookupError, ValueError):
            continue
    for name in require("trafilatura.utils", "data warc").detect_encoding(content):
        try:
            return content.decode(name)
        except (LookupError, ValueError):
            continue
    return content.decode("utf-8", "replace")
