"""Near-duplicates are found, verified and written down; the same whatever the workers, the order, and after a kill."""

import gzip
import itertools
import json
import pathlib
import random
import shutil

import numpy as np
import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.common.locks import LockedError, locked
from megalith.curation.dedup.links import find_groups, unite
from megalith.curation.dedup.occurrences import first_occurrences
from megalith.curation.dedup.signatures import DIGEST, normal_url, shingles
from megalith.curation.dedup.store import Piece, Store
from megalith.curation.words import split_words

SHARED = pathlib.Path(__file__).parents[3] / "shared/data"
WORDS = [f"w{i}" for i in range(3000)]


def text(draw, count=120):
    return " ".join(draw.choice(WORDS) for _ in range(count))


def edited(draw, source, share):
    """The text with a share of its words replaced, each by one from elsewhere."""
    words = source.split()
    for place in draw.sample(range(len(words)), round(share * len(words))):
        words[place] = f"new{draw.randrange(10**6)}"
    return " ".join(words)


def corpus(seed=1, count=60):
    """Documents, every third with a copy, a near copy (3 % of its words), and one that is far (40 %)."""
    draw, rows = random.Random(seed), []
    for i in range(count):
        source = text(draw)
        rows.append({"id": f"{i}", "text": source, "source": f"s{i % 2}"})
        if i % 3 == 0:
            rows.append({"id": f"{i}-copy", "text": source.upper() + " !", "source": "s1"})
            rows.append({"id": f"{i}-near", "text": edited(draw, source, 0.03) + " tail", "source": "s2"})
            rows.append({"id": f"{i}-far", "text": edited(draw, source, 0.4), "source": "s2"})
    return rows


def removed(tmp_path, output="out.jsonl"):
    return [json.loads(line) for line in (tmp_path / f"{output}.removed.jsonl").read_text().splitlines()]


WARN = {"over_budget": "warn"}


def test_copies_and_near_copies_go(write, step, tmp_path):
    rows = corpus()
    records, report = step("dedup", write("a.jsonl", rows), WARN)
    assert [record["id"] for record in records] == [
        row["id"] for row in rows if row["id"].endswith("far") or "-" not in row["id"]
    ]
    assert all(record == row for record, row in zip(records, (r for r in rows if r in records)))
    evidence = removed(tmp_path)
    assert len(evidence) == 40 == report["rules"]["exact"]["documents"] + report["rules"]["near"]["documents"]
    for line in evidence:
        place, kept = (int(line[name].rpartition(":")[2]) - 1 for name in ("document", "kept"))
        assert rows[place]["id"].startswith(f"{rows[kept]['id']}-")
        assert (line["document_id"], line["kept_id"]) == (rows[place]["id"], rows[kept]["id"])
        a, b = (
            set(zip(*(rows[i]["text"].lower().replace(" !", "").split()[k:] for k in range(5)))) for i in (place, kept)
        )
        assert line["similarity"] == pytest.approx(len(a & b) / len(a | b), abs=1e-4)
        assert line["rule"] == ("exact" if rows[place]["id"].endswith("copy") else "near")


def test_any_workers_any_order(write, step, tmp_path):
    rows = corpus(2)
    path = write("a.jsonl", rows)
    one, _ = step("dedup", path, {"keep": "longest"} | WARN, "1.jsonl")
    pieces, _ = step("dedup", path, {"keep": "longest"} | WARN, "9.jsonl", partitions=9)
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "9.jsonl").read_bytes() and one == pieces
    random.Random(5).shuffle(rows)
    shuffled, _ = step("dedup", write("b.jsonl", rows), {"keep": "longest"} | WARN, "s.jsonl")
    # Of exact copies the first stays, and those differ in case here.
    assert {record["text"].lower().rstrip(" !") for record in shuffled} == {
        record["text"].lower().rstrip(" !") for record in one
    }


@pytest.mark.parametrize("keep", ["first", "longest", "source"])
def test_who_stays(keep, write, step):
    draw = random.Random(3)
    base = text(draw)
    rows = [
        {"id": "a", "text": base, "source": "web"},
        {"id": "b", "text": f"{base} one more", "source": "web"},
        {"id": "c", "text": f"{base} end", "source": "book"},
    ]
    best = {"best_sources": ("book", "web"), "source_key": "source"} if keep == "source" else {}
    records, _ = step("dedup", write("a.jsonl", rows), {"keep": keep} | best | WARN)
    assert [record["id"] for record in records] == [{"first": "a", "longest": "b", "source": "c"}[keep]]


def test_chains(write, step, tmp_path):
    """a ~ b ~ c, a not like c: one group; --direct removes only what is like the document that stays."""
    draw = random.Random(4)
    a = text(draw, 200)
    b = edited(draw, a, 0.03)
    c = edited(draw, b, 0.03)
    rows = [{"id": name, "text": each} for name, each in zip("abc", (a, b, c))]
    settings = {"threshold": 0.72} | WARN
    records, report = step("dedup", write("a.jsonl", rows), settings)
    chained, _ = step("dedup", str(tmp_path / "a.jsonl"), settings | {"direct": True}, "direct.jsonl")
    if len(records) == 1:  # whether c is compared with b depends on the bands that they share
        assert report["below_threshold_to_kept"] == 1 and removed(tmp_path)[-1]["link_similarity"] >= 0.72
    assert [record["id"] for record in chained] == ["a", "c"]
    copied, report = step(
        "dedup", write("b.jsonl", [*rows, {"id": "copy", "text": c}]), settings | {"direct": True}, "d"
    )
    assert [record["id"] for record in copied] == ["a", "c"] and report["rules"]["exact"]["documents"] == 1
    assert removed(tmp_path, "d")[-1]["kept"].endswith("b.jsonl:3")


@pytest.mark.parametrize("kind", ["union", "min", "max"])
def test_jaccard(kind, write, step):
    draw = random.Random(6)
    whole = text(draw, 200)
    rows = [{"text": whole}, {"text": " ".join(whole.split()[:150])}]  # 146 of 196 shingles
    for threshold, size in ((0.72, 1), (0.76, 1 if kind == "min" else 2)):
        records, _ = step(
            "dedup", write("a.jsonl", rows), {"jaccard": kind, "threshold": threshold} | WARN, f"{threshold}.jsonl"
        )
        assert len(records) == size


def test_an_index_is_added_to_in_turn_and_a_changed_one_is_noticed(write, step, tmp_path):
    settings = {"index": str(tmp_path / "index")} | WARN
    rows = corpus(7)
    inputs = {
        name: write(f"{name}.jsonl", rows[start : start + 30]) for name, start in (("a", 0), ("b", 30), ("c", 60))
    }
    for name, path in inputs.items():
        step("dedup", path, settings, f"{name}.out")
    shutil.rmtree(tmp_path / "index/000001")  # somebody drops what a run has added; numbers are not given again
    step("dedup", write("d.jsonl", rows[90:]), settings, "d.out")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["000000", "000002", "000003"]
    write("a.jsonl", rows[60:])
    step("dedup", inputs["a"], settings, "a.out", overwrite=True)
    again, _ = step("dedup", inputs["c"], settings, "c.out", overwrite=True)
    assert again == []  # not taken for done: the first run's documents are others now
    with locked(tmp_path / "index", inside=True), pytest.raises(LockedError):
        step("dedup", inputs["b"], settings, "b.out", overwrite=True)


def test_an_index_of_earlier_runs(write, step, tmp_path):
    rows = corpus(7)
    settings = {"index": str(tmp_path / "index")} | WARN
    first, _ = step("dedup", write("a.jsonl", rows[:80]), settings, "a.out")
    second, _ = step("dedup", write("b.jsonl", rows[40:]), settings, "b.out")
    together, _ = step("dedup", write("c.jsonl", rows), WARN, "c.out")
    assert first + second == together
    kept = [line["kept"] for line in removed(tmp_path, "b.out")]
    assert any("a.jsonl:" in name for name in kept)
    again, _ = step("dedup", str(tmp_path / "b.jsonl"), settings, "b.out")
    assert again == second  # its own entries are not compared with
    with pytest.raises(DataError, match="must be one that was made with the same settings"):
        step("dedup", str(tmp_path / "a.jsonl"), settings | {"ngram_size": 3}, "d.out")


def test_a_source_that_loses_too_much(write, step, tmp_path):
    rows = [
        {"text": f"{WORDS[0]} templated page about {WORDS[1]} and nothing else", "source": "bad"} for _ in range(120)
    ]
    rows += [{"text": text(random.Random(i)), "source": "good"} for i in range(120)]
    path = write("a.jsonl", rows)
    with pytest.raises(DataError, match=r"1 sources that lose more.*\n  bad: 119 of 120 documents") as stopped:
        step("dedup", path, {"source_key": "source"})
    assert not (tmp_path / "out.jsonl").exists() and "out.jsonl.parts/removed.jsonl" in str(stopped.value)
    records, report = step("dedup", path, {"source_key": "source", "over_budget": "warn"})
    assert len(records) == 121 and report["over_budget"] and report["sources"]["bad"]["removed"] == 119
    assert report["clusters"][0] == {"documents": 120, "kept": f"{path}:1"}


def test_paragraphs(write, step, tmp_path):
    rows = [
        {"text": "A first paragraph here.\n\nShared line of words.\nEnd"},
        {"text": "SHARED line of words!\n\nAnother one of them."},
    ]
    rows += [{"text": "Shared line of words"}, {"text": "End\nEnd"}]
    path = write("a.jsonl", rows)
    records, report = step("dedup", path, {"by": "paragraph"}, partitions=3)
    assert [record["text"] for record in records] == [rows[0]["text"], "Another one of them.", "End\nEnd"]
    assert report["rules"]["paragraphs"]["documents"] == 1 and report["values"]["repeated paragraphs"] == 2
    same = {"rule": "paragraph", "paragraph": 1, "kept": f"{path}:1", "kept_paragraph": 3, "source": path}
    assert removed(tmp_path) == [{"document": f"{path}:{line}"} | same for line in (2, 3)]
    assert report["evidence"] == f"{tmp_path}/out.jsonl.removed.jsonl"
    assert report["sources"] == {path: {"paragraphs": 5, "removed": 2, "share": 0.4}}


def test_a_source_that_loses_too_many_paragraphs(write, step, tmp_path):
    line = "The same line on every page."
    bad = [{"text": f"{line}\n{line}", "source": "bad"} for _ in range(60)]
    good = [{"text": f"{text(random.Random(i))}\n{line}", "source": "good"} for i in range(60)]
    path = write("a.jsonl", bad + good)
    settings = {"by": "paragraph", "source_key": "source"}
    with pytest.raises(DataError, match=r"1 sources that lose more.*\n  bad: 119 of 120 paragraphs") as stopped:
        step("dedup", path, settings, partitions=4)
    assert not (tmp_path / "out.jsonl").exists() and "out.jsonl.parts/removed.jsonl" in str(stopped.value)
    records, report = step("dedup", path, settings | WARN, partitions=4)
    assert len(records) == 61 and len(removed(tmp_path)) == 179
    assert report["sources"]["good"] == {"paragraphs": 120, "removed": 60, "share": 0.5}


def test_urls_and_exact(write, step):
    rows = [
        {"url": "http://www.A.org/x/", "text": "a b"},
        {"url": "https://a.org/x#top", "text": "c"},
        {"text": "A  b!"},
        {"text": "d"},
    ]
    path = write("a.jsonl", rows)
    assert step("dedup", path, {"by": "url"} | WARN, "u.jsonl")[0] == [rows[0], rows[2], rows[3]]
    assert step("dedup", path, {"by": "exact"} | WARN, "e.jsonl")[0] == [rows[0], rows[1], rows[3]]
    assert normal_url("HTTPS://www.A.org/B/?q=1#f") == "a.org/B/?q=1"


def test_killed_and_resumed(write, step, tmp_path, monkeypatch):
    from megalith.curation.dedup import command

    path = write("a.jsonl", corpus(8))
    expected, _ = step("dedup", path, WARN, "whole.jsonl", partitions=5)

    class Killed(BaseException):
        pass

    original, calls = command.Filter.process, itertools.count()

    def killed(self, documents, out):
        if next(calls) == 3:
            raise Killed
        original(self, documents, out)

    monkeypatch.setattr(command.Filter, "process", killed)
    with pytest.raises(Killed):
        step("dedup", path, WARN, partitions=5)
    assert not (tmp_path / "out.jsonl").exists()
    records, _ = step("dedup", path, WARN, partitions=5)
    assert records == expected and not (tmp_path / "out.jsonl.parts").exists()


def test_shingles_are_sets_of_words_in_a_row():
    texts = ["a b c d", "a b", "", "!!", "x x x x x"]
    words = split_words(texts)
    documents, values = shingles(texts, words.hashes, words.first, 3, "word")
    assert np.bincount(documents, minlength=5).tolist() == [2, 1, 1, 1, 1]
    assert all((np.diff(values[documents == i].astype(np.int64)) > 0).all() for i in range(5))
    documents, _ = shingles(["aaaa bb"], words.hashes, words.first, 3, "character")
    assert len(documents) == len({"aaa", "aa ", "a b", " bb"})


def test_unite_is_union_find():
    draw = random.Random(9)
    pairs = [(draw.randrange(50), draw.randrange(50)) for _ in range(40)]
    label = np.arange(50)
    for start in range(0, 40, 8):
        a, b = zip(*pairs[start : start + 8])
        unite(label, np.array(a), np.array(b))
    groups = [{i} for i in range(50)]
    for a, b in pairs:
        joined = groups[a] | groups[b]
        for i in joined:
            groups[i] = joined
    for i in range(50):
        assert label[i] <= i
    from megalith.curation.dedup.links import roots

    assert roots(label, np.arange(50)).tolist() == [min(group) for group in groups]


def test_a_bucket_of_very_many_costs_a_comparison_each():
    """Hundred thousands of copies of one template are one bucket; all pairs of them would never end."""
    number = 5000
    digests = np.zeros(number, DIGEST)
    digests["high"] = np.arange(number)
    values = np.tile(np.arange(20, dtype=np.uint32), number)
    piece = Piece(
        digests, np.ones(number, np.int32), values, np.full(number, 20, np.int32), np.zeros((2, number), np.uint64)
    )
    groups = find_groups(Store([piece]), 2, 0.7, "union")
    assert groups.compared == number - 1 and (groups.label == 0).all()


def test_first_occurrences_range_by_range(tmp_path, monkeypatch):
    from megalith.curation.dedup import occurrences

    values = np.random.default_rng(1).integers(1, 300, 1000).astype(np.uint64)
    monkeypatch.setattr(occurrences, "AT_ONCE", 130)
    first = first_occurrences(lambda: np.array_split(values, 7), 1000, tmp_path / "f")
    wanted = {value: i for i, value in reversed(list(enumerate(values.tolist())))}
    assert first.tolist() == [wanted[value] for value in values.tolist()]
    values[100:900] = 0  # no value
    first = first_occurrences(lambda: np.array_split(values, 7), 1000, tmp_path / "f")
    assert first[100:900].tolist() == list(range(100, 900))
    assert first[:100].tolist() == [wanted[value] for value in values[:100].tolist()]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, "--threshold must be above 0"),
        ({"keep": "source"}, "--best-sources must be given with --keep source"),
        ({"by": "paragraph", "index": "x"}, "--index holds documents"),
        ({"jaccard": "mean"}, "--jaccard must be one of union"),
    ],
)
def test_settings_that_cannot_work(settings, message, write, step):
    with pytest.raises(ConfigError, match=message):
        step("dedup", write("a.jsonl", [{"text": "a"}]), settings)


def truth(name):
    lines = (SHARED / f"dedup/{name}.truth").read_text().splitlines()
    return {frozenset(line.split()) for line in lines}


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data in ../shared")
@pytest.mark.parametrize("name", ["articles_100", "articles_1000"])
def test_published_pairs(name, write, step, tmp_path):
    rows = [line.split(" ", 1) for line in (SHARED / f"dedup/{name}.train").read_text().splitlines()]
    step("dedup", write("a.jsonl", [{"id": key, "text": body} for key, body in rows]))
    found = {
        frozenset(rows[int(line[side].rpartition(":")[2]) - 1][0] for side in ("document", "kept"))
        for line in removed(tmp_path)
    }
    assert found == truth(name)


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data in ../shared")
def test_recall_by_share_of_edits(write, step, tmp_path):
    """At the default threshold: all with 1 % of their words replaced, most with 3 %, none with 30 %; nothing false."""
    with gzip.open(SHARED / "loose_json/gutenberg_docs.jsonl.gz", "rt") as file:
        texts = [" ".join(json.loads(line)["text"].split()[:400]) for line in itertools.islice(file, 0, 600, 2)]
    draw, shares = random.Random(1), (0.01, 0.03, 0.3)
    rows = [{"text": each, "of": i} for i, each in enumerate(texts)]
    planted = [
        {"text": edited(draw, each, share), "of": i, "share": share} for i, each in enumerate(texts) for share in shares
    ]
    records, _ = step("dedup", write("a.jsonl", rows + planted), WARN)
    kept = {share: sum(record.get("share") == share for record in records) / len(texts) for share in shares}
    assert kept[0.01] == 0 and kept[0.03] < 0.1 and kept[0.3] == 1
    for line in removed(tmp_path):
        place, stays = (int(line[name].rpartition(":")[2]) - 1 for name in ("document", "kept"))
        both = rows + planted
        assert both[place]["of"] == both[stays]["of"], "two different texts"


def test_documents_without_a_url_repeat_none(write, step):
    rows = [
        {"text": f"text {number}", "url": url}
        for number, url in enumerate([None, None, "", "http://a?v=B", "http://a?v=b"])
    ]
    records, _ = step("dedup", write("a.jsonl", rows), {"by": "url"})
    assert [record["text"] for record in records] == [f"text {number}" for number in range(5)]
