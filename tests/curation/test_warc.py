"""Web archives: any form and any split gives the same pages; damage costs what it hits; charsets; bombs."""

import gzip
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.curation.warc.pages import decode, read_page
from megalith.curation.warc.records import Damage, Record, read_records
from tests.curation.test_hostile import run

CHUNKED = {"Transfer_Encoding": "chunked"}
SENTENCE = "The river {} runs through the old town, and nobody there remembers when the bridge was built. "


def record(kind, content, url="", **headers):
    """A record as bytes."""
    headers = {"WARC-Type": kind, "Content-Length": len(content)} | headers
    headers |= {"WARC-Target-URI": url, "WARC-Date": "2026-01-02T03:04:05Z"} if url else {}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return b"WARC/1.0\r\n" + head.encode() + b"\r\n" + content + b"\r\n\r\n"


def answer(body, kind="text/html; charset=utf-8", status="200 OK", **headers):
    """An answer of HTTP as bytes."""
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{head}\r\n".encode() + body


def response(body, url="http://example.org/", *args, **headers):
    return record("response", answer(body, *args, **headers), url, Content_Type="application/http; msgtype=response")


def html(number):
    return f"<html><body><nav>Home</nav><article><p>{SENTENCE.format(number) * 4}</p></article></body></html>"


def pages(count):
    return [response(html(i).encode(), f"http://example.org/{i}") for i in range(count)]


def text(number):
    return (SENTENCE.format(number) * 4).strip()


def chunked(content, size=100):
    pieces = (content[i : i + size] for i in range(0, len(content), size))
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def test_what_becomes_of_records(tmp_path, step):
    body = html(0).encode()
    records = [
        record("warcinfo", b"software: x\r\n"),
        record("request", b"GET / HTTP/1.1\r\n\r\n", "http://example.org/0"),
        response(chunked(gzip.compress(body)), "http://example.org/0", **CHUNKED, Content_Encoding="gzip"),
        response(body, "<http://example.org/1>", **CHUNKED),  # put together by the crawler
        response(body, "http://example.org/2", Content_Length=len(body) + 99),  # cut off by it
        record("conversion", "Extracted – already.".encode(), "http://example.org/3", Content_Type="text/plain"),
        record("resource", body, "http://example.org/4", Content_Type="application/xhtml+xml"),
        response(b"\x89PNG", "http://example.org/5", "image/png"),
        response(body, "http://example.org/6", "text/html", "404 Not Found"),
        response(b"<html><body></body></html>", "http://example.org/7"),
        response(b"\x1b\0", "http://example.org/8", Content_Encoding="br"),
        record("response", b"nonsense", "http://example.org/9", Content_Type="application/http"),
    ]  # fmt: skip
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(map(gzip.compress, records)))
    kept, report = step("warc", str(path), dropped=str(tmp_path / "dropped"), max_unusable=0.5)
    assert [(page["url"][-1], page["text"]) for page in kept] == [
        *((i, text(0)) for i in "012"), ("3", "Extracted – already."), ("4", text(0))
    ]  # fmt: skip
    assert kept[0] == {"url": "http://example.org/0", "date": "2026-01-02T03:04:05Z", "text": text(0)}
    assert {rule: found["documents"] for rule, found in report["rules"].items()} == {
        "media_type": 1, "status": 1, "no_text": 1,
    }  # fmt: skip
    assert report["documents"] == 8 and report["unusable"] == 2
    assert "no answer of HTTP (BadStatusLine" in report["problems"][1]
    start = sum(len(gzip.compress(each)) for each in records[:-2])
    assert f"at byte {start:,}: Content-Encoding br" in report["problems"][0]
    as_html, _ = step("warc", str(path), {"html": True}, "html", max_unusable=0.5)
    assert as_html[0]["text"] == html(0)


def test_any_form_and_any_split(tmp_path, step):
    records = pages(30)
    contents = {
        "a.warc": b"".join(records),
        "b.warc.gz": b"".join(map(gzip.compress, records)),
        "c.warc.gz": gzip.compress(b"".join(records)),
    }
    made = []
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        for partitions in (1, 7):
            step("warc", str(tmp_path / name), output=f"{name}.{partitions}", partitions=partitions)
            made.append((tmp_path / f"{name}.{partitions}").read_bytes())
    assert len(set(made)) == 1
    assert [json.loads(line)["text"] for line in made[0].splitlines()] == [text(i) for i in range(30)]


@pytest.mark.parametrize("packed", [True, False])
def test_damage_costs_what_it_hits(packed, tmp_path, step):
    records = [gzip.compress(each) if packed else each for each in pages(6)]
    broken = bytearray(records[2])
    broken[len(broken) // 2 if packed else 0] ^= 0xFF
    cut = records[5][: len(records[5]) // 2]
    path = tmp_path / ("a.warc.gz" if packed else "a.warc")
    path.write_bytes(b"".join([*records[:2], broken, *records[3:5], cut]))
    kept, report = step("warc", str(path), max_unusable=0.5)
    assert [page["text"] for page in kept] == [text(i) for i in (0, 1, 3, 4)]
    where = [sum(map(len, records[:2])), sum(map(len, records[:5]))]
    assert report["unusable"] == 2
    for line, at, why in zip(
        report["problems"], where, ("damaged gzip", "ends inside") if packed else ("no WARC", "ends after")
    ):
        assert f"at byte {at:,}: " in line and why in line
    with pytest.raises(DataError, match="--max-unusable"):
        step("warc", str(path), output="strict")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.booleans(), st.integers(0, 2**32), st.integers(1, 400))
def test_no_damage_fails(tmp_path, packed, seed, part):
    """Bytes that are changed, taken out or put in: nothing is raised, and records that are told of as whole are so."""
    draw = random.Random(seed)
    good = [f"content {i} ".encode() * draw.randrange(40) for i in range(6)]
    whole = [record("conversion", each, f"http://a/{i}") for i, each in enumerate(good)]
    content = bytearray(b"".join(map(gzip.compress, whole)) if packed else b"".join(whole))
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(content))
        match draw.randrange(3):
            case 0:
                content[at] = draw.randrange(256)
            case 1:
                del content[at : at + draw.randrange(200)]
            case 2:
                content[at:at] = draw.randbytes(draw.randrange(50))
    path = tmp_path / "a"
    path.write_bytes(b"\x1f\x8b\x08" + content[3:] if packed else content)
    size = path.stat().st_size
    step = part if packed else size
    found = [each for at in range(0, size, step) for each in read_records(str(path), at, min(at + step, size), 10_000)]
    assert all(isinstance(each, Record | Damage) for each in found)
    if packed:  # each has a checksum
        assert all(each.content in good for each in found if isinstance(each, Record))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_any_answer_is_a_page_or_told_of(seed):
    draw = random.Random(seed)
    kind, status = draw.choice(("text/html", "text/html; charset", "text/plain", "html", "")), "200 OK"
    encoding = draw.choice(("gzip", "deflate", "gzip, gzip", "zstd", "x"))
    headers = draw.choice(({}, CHUNKED, {"Content_Encoding": encoding}, CHUNKED | {"Content_Length": "-1"}))
    content = bytearray(answer(gzip.compress(html(1).encode()), kind, status, **headers))
    for _ in range(draw.randrange(4)):
        at = draw.randrange(len(content))
        content[at : at + draw.randrange(9)] = draw.randbytes(draw.randrange(9))
    record = Record(0, {"warc-type": "response", "content-type": "application/http"}, bytes(content))
    try:
        assert isinstance(read_page(record, 10_000).text, str)
    except ValueError as error:
        assert "no answer of HTTP" in str(error) or "Content-Encoding" in str(error)


@pytest.mark.parametrize(
    ("content", "server", "page"),
    [
        ("déjà vu – 10 €", "utf-8", "utf-8"),
        ("déjà vu – 10 €", "utf-8", "iso-8859-1"),  # the server is wrong: it is UTF-8
        ("déjà vu – 10 €", "cp1252", "iso-8859-1"),  # as browsers take it
        ("déjà vu – 10 €", "cp1252", "utf-8"),  # the server is wrong: it is not UTF-8; the page says so
        ("déjà vu", "cp1252", "no-such-charset"),
        ("déjà vu", "cp1252", "hex"),  # a codec of Python's that is none of text
        ("Быстрая коричневая лиса", "koi8-r", "koi8-r"),
        ("吾輩は猫である", "shift_jis", "Shift_JIS"),
    ],
)
def test_charsets(content, server, page):
    """page: what the server says; the page itself declares the charset that it is in."""
    body = f'<html><head><meta charset="{server}"></head><p>{content}</p></html>'.encode(server)
    assert content in decode(body, page)


def test_a_charset_that_nobody_names():
    content = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 8
    assert content in decode(content.encode("cp1251"), "utf-8")
    assert decode(b"\xef\xbb\xbfa", "utf-8") == "a"
    assert isinstance(decode(bytes(range(256)), ""), str)


@pytest.mark.parametrize("kind", ["record", "answer"])
def test_a_bomb(kind, tmp_path):
    """300 MB in some hundred kB: as a record, and inside of an answer."""
    bomb = b"0" * (300 << 20)
    if kind == "answer":
        bomb = gzip.compress(bomb, 1)
    headers = {"Content_Encoding": "gzip"} if kind == "answer" else {}
    first, last = pages(2)
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(gzip.compress(each, 1) for each in (first, response(bomb, **headers), last)))
    assert path.stat().st_size < 3_000_000
    del bomb
    done, peak = run(path, tmp_path / "out.jsonl", "--max-unusable", "0.5", verb="warc")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        text(0),
        text(1),
    ]
    assert "longer than 16.00 MiB" in done.stderr
    assert peak < 300


def test_hostile_pages(tmp_path, step):
    deep = b"<div>" * 50_000 + b"text" + b"</div>" * 50_000
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join([response(deep), response(b"\0" * 1000), response(b"<html><p>&#0;&#xD800;"), *pages(1)]))
    kept, report = step("warc", str(path))
    assert kept[-1]["text"] == text(0) and report["documents"] == 4


@pytest.mark.parametrize("content", [b'{"text": "a"}\n', gzip.compress(b'{"text": "a"}\n')], ids=["plain", "gzip"])
def test_a_file_of_another_kind(content, tmp_path, step):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"--input must be WARC, plain or in gzip.*a.jsonl"):
        step("warc", str(path))
    assert not (tmp_path / "out.jsonl.parts").exists()
