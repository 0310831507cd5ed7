"""The commands of the pages run as typed, on small inputs in their places; what they say of files is so."""

import bz2
import json
import pathlib
import random
import re
import shlex
import subprocess
import sys

import pytest

from megalith.cli.main import main
from megalith.data.corpus import preprocess_pool
from megalith.data.indexed import IndexedDataset
from tests.curation.test_wiki import HEAD, page
from tests.toy import make_corpus

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def commands(name):
    """The commands of a page, in order, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def article(draw, number):
    words = [
        "river",
        "music",
        "stone",
        "engine",
        "garden",
        "letter",
        "winter",
        "market",
        "island",
        "history",
        "painter",
    ]
    sentences = (
        f"The {draw.choice(words)} of {draw.choice(words)} number {draw.randrange(10**6)} was near the {draw.choice(words)}"
        f" and people have seen it with their own eyes in {draw.randrange(1000, 2000)}."
        for _ in range(14)
    )
    return f"Article {number}. " + " ".join(sentences)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the pages name; workers are this process, to save the time of starting them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(preprocess_pool.ENGINES.addresses, "processes", preprocess_pool.ENGINES.addresses["inline"])
    make_corpus(tmp_path)
    (tmp_path / "bert-vocab.txt").write_bytes((tmp_path / "vocab.txt").read_bytes())
    draw = random.Random(1)
    texts = [article(draw, i) for i in range(40)]
    rows = [
        {"url": f"http://example.org/{i}", "text": text} for i, text in enumerate([*texts, *texts[:5], "too short"])
    ]
    for name in ("crawl.jsonl", "pages.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "urls.txt").write_text("http://example.org/a\nhttp://youtube.com/b\nhttp://example.org/a\n")
    (tmp_path / "lambada_test.jsonl").write_text(json.dumps({"text": texts[3][200:400]}) + "\n")
    (tmp_path / "questions.jsonl").write_text(
        json.dumps({"question": "Who met the dog at the old stone bridge in May?"}) + "\n"
    )
    squad = {"data": [{"paragraphs": [{"context": "Nothing of it is in there at all, I think.", "qas": []}]}]}
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(squad))
    pages = "".join(page(i, f"'''{i}''' {text}<ref>r</ref>") for i, text in enumerate(texts))
    dump = tmp_path / "enwiki-latest-pages-articles-multistream.xml.bz2"
    dump.write_bytes(bz2.compress(HEAD.encode()) + bz2.compress(pages.encode()) + bz2.compress(b"</mediawiki>"))
    folder = tmp_path / "extracted/AA"
    folder.mkdir(parents=True)
    (folder / "wiki_00").write_text(json.dumps({"id": "1", "url": "u", "title": "t", "text": "x"}) + "\n")
    return tmp_path


def run(line):
    words = shlex.split(line)
    assert words.pop(0) == "megalith"
    assert main(words) == 0, line


def test_wikipedia_to_bert(place):
    for line in commands("wikipedia.md"):
        run(line)
    assert len((place / "wiki-unique.jsonl").read_text().splitlines()) == 40
    assert IndexedDataset("my-bert_text_sentence").num_documents == 40
    assert IndexedDataset("my-bert_title_sentence").num_documents == 40


def test_openwebtext_to_gpt(place):
    for line in commands("openwebtext.md"):
        run(line)
    assert (place / "good_urls.txt").read_text() == "http://example.org/a\n"
    assert len((place / "unique.jsonl").read_text().splitlines()) == 40
    report = json.loads((place / "filtered.jsonl.report.json").read_text())["steps"][0]
    assert report["tasks"]["lambada"]["documents"] == 1
    assert IndexedDataset("my-gpt2_text_document").num_documents == len(
        (place / "train.jsonl").read_text().splitlines()
    )


def test_corpus_page(place):
    (place / "steps.yaml").write_text(
        re.search(r"^```yaml\n(.*?)^```", (DOCS / "corpus.md").read_text(), re.M | re.S)[1]
    )
    for line in commands("corpus.md"):
        if "|" in line:
            command = line.replace("megalith ", f"{sys.executable} -m megalith ")
            subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, capture_output=True)
            assert IndexedDataset("train_text_document").num_documents > 30
        else:
            if (
                "pipeline" in line or line.endswith("longest") or "squad" in line
            ):  # outputs that a command before has made
                line += "" if "pipeline" not in line else " --overwrite"
                for path in place.glob("unique.jsonl*") if "longest" in line else place.glob("train.jsonl*"):
                    path.unlink()
            run(line)
    assert len((place / "train.jsonl.report.html").read_text()) > 1000


def test_the_map_of_pages():
    readme = (DOCS.parent / "README.md").read_text()
    assert "docs/corpus.md" in readme
    links = [
        link
        for name in ("corpus.md", "wikipedia.md", "openwebtext.md")
        for link in re.findall(r"\]\(([^)#]+)\)", (DOCS / name).read_text())
    ]
    assert all("://" in link or (DOCS / link).exists() for link in links)
