"""The commands of the pages run as typed, on small inputs in their places; what they say of files is so."""

import bz2
import gzip
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
from tests.curation.test_warc import pages as warc_pages
from tests.curation.test_wiki import HEAD, page
from tests.toy import make_corpus

DOCS = pathlib.Path(__file__).parents[2] / "docs"
WORDS = [
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
    "bridge",
    "captain",
    "doctor",
    "evening",
    "farmer",
    "glass",
    "harbour",
    "kitchen",
    "leader",
    "mountain",
    "north",
    "office",
    "people",
    "quiet",
    "road",
    "school",
    "teacher",
    "under",
    "village",
    "window",
    "young",
    "about",
    "before",
    "carry",
    "describe",
    "every",
    "follow",
    "ground",
    "house",
    "inside",
    "journey",
    "keep",
    "large",
    "might",
    "never",
    "often",
    "place",
    "quickly",
    "round",
    "small",
    "through",
    "until",
    "visit",
    "water",
    "years",
    "answer",
    "build",
    "close",
    "during",
    "early",
    "friend",
    "great",
    "hold",
]
COMMON = ["the", "of", "and", "to", "that", "with", "have", "be", "in", "it", "was"]


def commands(name):
    """The commands of a page, in order, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (DOCS / name).read_text(), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def article(draw, number):
    """A page of English words that no rule takes for repetition."""
    sentences = (
        " ".join(draw.choice(COMMON if draw.random() < 0.4 else WORDS) for _ in range(12)).capitalize() + f" {number}."
        for _ in range(16)
    )
    return f"Article {number}. " + " ".join(sentences)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with what the pages name; work is done in this process, to save the start of others."""
    monkeypatch.chdir(tmp_path)
    addresses = preprocess_pool.ENGINES.addresses
    monkeypatch.setitem(addresses, "processes", addresses["inline"])
    make_corpus(tmp_path)
    (tmp_path / "bert-vocab.txt").write_bytes((tmp_path / "vocab.txt").read_bytes())
    draw = random.Random(1)
    texts = [article(draw, i) for i in range(40)]
    pages = [*texts, *texts[:5], "too short"]
    for name in ("crawl.jsonl", "pages.jsonl"):
        write(tmp_path / name, ({"url": f"http://example.org/{i}", "text": text} for i, text in enumerate(pages)))
    (tmp_path / "urls.txt").write_text("http://example.org/a\nhttp://youtube.com/b\nhttp://example.org/a\n")
    write(tmp_path / "lambada_test.jsonl", [{"text": texts[3][200:400]}])
    write(tmp_path / "questions.jsonl", [{"question": "Who met the dog at the old stone bridge in May?"}])
    squad = {"data": [{"paragraphs": [{"context": "Nothing of it is in there at all, I think.", "qas": []}]}]}
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(squad))
    content = "".join(page(i, f"'''{i}''' {text}<ref>r</ref>") for i, text in enumerate(texts))
    dump = tmp_path / "enwiki-latest-pages-articles-multistream.xml.bz2"
    dump.write_bytes(bz2.compress(HEAD.encode()) + bz2.compress(content.encode()) + bz2.compress(b"</mediawiki>"))
    (tmp_path / "crawl").mkdir()
    (tmp_path / "crawl/a.warc.gz").write_bytes(gzip.compress(b"".join(warc_pages(3))))
    folder = tmp_path / "extracted/AA"
    folder.mkdir(parents=True)
    write(folder / "wiki_00", [{"id": "1", "url": "u", "title": "t", "text": "x"}])
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
    number = len((place / "train.jsonl").read_text().splitlines())
    assert IndexedDataset("my-gpt2_text_document").num_documents == number


def test_corpus_page(place):
    """Commands that write what one before has written have --overwrite added, and the pipe goes through a shell."""
    steps = re.search(r"^```yaml\n(.*?)^```", (DOCS / "corpus.md").read_text(), re.MULTILINE | re.DOTALL)[1]
    (place / "steps.yaml").write_text(steps)
    made = set()
    for line in commands("corpus.md"):
        output = re.search(r"--output (\S+)", line)
        name = output[1] if output else "train.jsonl" if "pipeline" in line else ""
        if "|" in line:
            command = line.replace("megalith ", f"{sys.executable} -m megalith ")
            subprocess.run(["bash", "-o", "pipefail", "-c", command], check=True, capture_output=True)
            assert IndexedDataset("train_text_document").num_documents > 30
        else:
            run(f"{line} --overwrite" if name in made else line)
        made.add(name)
    assert len((place / "train.jsonl.report.html").read_text()) > 1000


def test_links_lead_somewhere():
    assert "docs/corpus.md" in (DOCS.parent / "README.md").read_text()
    for name in ("corpus.md", "wikipedia.md", "openwebtext.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (DOCS / name).read_text())
        assert links and all("://" in link or (DOCS / link).exists() for link in links)
