"""A dump that the test makes: every kind of markup gives its text; blocks of bzip2; damage costs what it is in."""

import bz2
import json
import random
import xml.sax.saxutils

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.curation.wiki.bzip2_blocks import read_blocks
from megalith.curation.wiki.dump import Damage, Page, read_pages, read_site
from megalith.curation.wiki.wikitext import Choices, to_text

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="de">
  <siteinfo><sitename>W</sitename><base>https://de.wikipedia.org/wiki/Start</base>
    <namespaces><namespace key="6" case="first-letter">Datei</namespace>
    <namespace key="14" case="first-letter">Kategorie</namespace><namespace key="0" /></namespaces></siteinfo>
"""


def page(number, text, namespace=0, redirect=""):
    leads = f'<redirect title="{redirect}" />' if redirect else ""
    text = xml.sax.saxutils.escape(text)
    return (
        f"  <page>\n<title>Page {number}</title><ns>{namespace}</ns><id>{number}</id>{leads}<revision><id>9</id>"
        f'<text bytes="1" xml:space="preserve">{text}</text></revision></page>\n'
    )


MARKUP = [
    ("'''Anna''' was ''born'' in [[Köln|Cologne]], a [[city]].", "Anna was born in Cologne, a city."),
    ("A.<ref>Source, {{cite|a={{b}}}}</ref> B.<ref name=x /> C", "A. B. C"),
    ("{{Infobox|name={{lang|de|x}}|b=[[c]]}}\nText ({{IPA|x}}; ) here.", "Text here."),
    ("It is {{convert|5|km|mi}} {{lang|fr|loin}}{{nbsp}}away.", "It is 5 km loin away."),
    ("[[File:a.jpg|thumb|A [[nested]] caption]]Text[[Datei:b.png]] and [[Kategorie:X]].", "Text and."),
    ("[[:Category:Shown]] and [https://a.org a site] and [https://b.org].", "Category:Shown and a site and."),
    ("A\n{| class=x\n! h\n|-\n| cell {{t}}\n|}\nB", "A\n\nB"),
    ("== One ==\n== Two ==\nText\n=== Three ===\n== Links ==\n* [[Category:X]]\n", "Two\n\nText"),
    ("* a\n* [[b]]\n** c\n# d", "- a\n- b\n- c\n- d"),
    ("x<!-- hidden --> &amp; y&nbsp;z &lt;b&gt; __NOTOC__", "x & y z <b>"),
    ("E = <math>mc^2</math> holds", "E = holds"),
    ("Broken [[link and {{template and '''bold\nnext line", "Broken link and template and bold\nnext line"),
    ("{{a|{{b|{{c|{{d}}}}}}}}after", "after"),
    ("a<br/>b<gallery>\nFile:x.jpg|y\n</gallery>", "a\nb"),
]


@pytest.mark.parametrize(("wikitext", "text"), MARKUP)
def test_markup(wikitext, text):
    names = frozenset(("file", "image", "category", "media", "datei", "kategorie"))
    assert to_text(wikitext, Choices(dropped_namespaces=names)) == text


def test_choices():
    source = "A\n== H ==\n* i\n{|\n| x || y\n|-\n| z\n|}\n<math>a</math>"
    assert to_text(source, Choices(headings=False, lists=False)) == "A"
    assert to_text(source, Choices(tables=True, formulas=True)) == "A\n\nH\n\n- i\nx y\nz\n\n$a$"


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="{}[]|='<>/refab \n*#!-", max_size=60))
def test_any_markup_ends(source):
    assert isinstance(to_text(source, Choices()), str)


def multistream(pages, per_stream=3):
    streams = [HEAD, *("".join(pages[i : i + per_stream]) for i in range(0, len(pages), per_stream)), "</mediawiki>\n"]
    return b"".join(bz2.compress(stream.encode()) for stream in streams)


@pytest.mark.parametrize("kind", ["multistream", "one stream", "plain"])
@pytest.mark.parametrize("partitions", [1, 7])
def test_dump(kind, partitions, tmp_path, step):
    draw = random.Random(3)
    texts = [f"Text {i} " + " ".join(str(draw.random()) for _ in range(draw.choice([5, 3000]))) for i in range(40)]
    pages = [page(i, text) for i, text in enumerate(texts)]
    pages[5] = page(5, "#REDIRECT [[Page 6]]", redirect="Page 6")
    pages[6] = page(6, "Talk", namespace=1)
    pages[7] = page(7, "{{Infobox}}")
    plain = HEAD.encode() + "".join(pages).encode() + b"</mediawiki>\n"
    content = {"multistream": multistream(pages), "one stream": bz2.compress(plain, 1), "plain": plain}[kind]
    path = tmp_path / ("dump.xml" if kind == "plain" else "dump.xml.bz2")
    path.write_bytes(content)
    records, report = step("wiki", str(path), partitions=partitions)
    kept = [i for i in range(40) if i not in (5, 6, 7)]
    assert [record["id"] for record in records] == [str(i) for i in kept]
    assert [record["text"] for record in records] == [texts[i] for i in kept]
    assert records[0]["url"] == "https://de.wikipedia.org/wiki?curid=0" and records[0]["title"] == "Page 0"
    assert {rule: found["documents"] for rule, found in report["rules"].items()} == {
        "redirect": 1,
        "namespace": 1,
        "no_text": 1,
    }
    assert report["documents"] == 40 and report["unusable"] == 0


def test_damage_costs_its_block(tmp_path, step):
    pages = [page(i, f"Text {i}") for i in range(30)]
    content = bytearray(multistream(pages))
    starts = [i for i in range(len(content)) if content[i : i + 10] == b"BZh91AY&SY"]
    content[starts[3] + 60] ^= 0xFF  # in the third stream of pages: 6, 7, 8
    path = tmp_path / "dump.xml.bz2"
    path.write_bytes(content[:-60])  # the end is cut too
    records, report = step("wiki", str(path), max_unusable=0.5)
    assert [int(record["id"]) for record in records] == [i for i in range(30) if i not in (6, 7, 8)][: len(records)]
    assert len(records) >= 24
    assert f"the bzip2 block at byte {starts[3] + 4} is damaged" in report["problems"][0]


def test_a_damaged_page_and_a_cut_plain_dump(tmp_path, step):
    broken = page(1, "x").replace("<revision>", "<revision><bad>")
    path = tmp_path / "dump.xml"
    other = page(4, "x").replace("<ns>0<", "<ns>none<")
    path.write_text(HEAD + page(0, "a") + broken + page(2, "b") + other + page(3, "c")[:60])
    records, report = step("wiki", str(path), max_unusable=0.9)
    assert [record["text"] for record in records] == ["a", "b"]
    assert "malformed page 'Page 1" in report["problems"][0] and "ends inside a page" in report["problems"][2]
    assert "its namespace is 'none'" in report["problems"][1]


def test_a_page_that_is_too_long(tmp_path):
    path = tmp_path / "dump.xml"
    path.write_text(HEAD + page(0, "a") + page(1, "x" * 3_000_000) + page(2, "b"))
    found = list(read_pages(str(path), 0, path.stat().st_size, 100_000))
    assert [type(each) for each in found] == [Page, Damage, Page] and "longer than" in found[1].reason


def test_extracted_by_wikiextractor(tmp_path, step):
    folder = tmp_path / "text" / "AA"
    folder.mkdir(parents=True)
    rows = [{"id": "1", "revid": "2", "url": "u", "title": "T", "text": "a &lt;b"}, {"id": "2", "text": ""}]
    (folder / "wiki_00").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, report = step("wiki", str(tmp_path / "text" / "*" / "wiki_*"))
    assert records == [{"id": "1", "url": "u", "title": "T", "text": "a <b"}]
    assert report["rules"]["no_text"]["documents"] == 1


def test_no_dump(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<html>")
    with pytest.raises(DataError, match="must be a MediaWiki dump"):
        read_site(str(path))


@settings(max_examples=15, deadline=None)
@given(st.lists(st.binary(max_size=3000), min_size=1, max_size=4), st.integers(1, 2))
def test_blocks_are_the_file(contents, level):
    import io

    draw = random.Random(1)
    contents = [*contents, bytes(draw.randrange(256) for _ in range(250_000))]
    data = b"".join(bz2.compress(content, level) for content in contents)
    blocks = list(read_blocks(io.BytesIO(data), 0))
    assert b"".join(block.content for block in blocks) == b"".join(contents)
    assert all(block.bit < 8 * len(data) for block in blocks)
