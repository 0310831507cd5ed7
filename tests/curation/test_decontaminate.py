"""Planted n-grams are found and cut at the right characters; others keep their bytes; published forms are read."""

import itertools
import json
import pathlib
import random
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError, DataError
from megalith.curation.decontaminate.command import SENTENCE_ENDS, split_around
from megalith.curation.decontaminate.ngrams import find_matches, task_ngrams
from megalith.curation.decontaminate.tasks import TASKS, parse_task, read_task

LEAK = "Only one source I know of would be likely to cough up enough money"  # 14 words
FILES = {  # task -> (file, content, its texts)
    "lambada": ("l.jsonl", '{"text": "a b"}\n{"text": "c"}\n', ["a b", "c"]),
    "squad": (
        "s.json",
        '{"version": "1.1", "data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [{"question": "q",'
        ' "id": "1", "answers": [{"text": "c", "answer_start": 0}]}]}]}]}',
        ["c", "q"],
    ),
    "natural_questions": ("n.jsonl", '{"question": "q", "answer": ["a"]}\n{"question_text": "r"}\n', ["q", "r"]),
    "nq": ("n.csv", "who is it\t['a \"b\"', 'c']\n", ["who is it"]),
    "triviaqa": ("t.json", '{"Data": [{"Question": "q", "Answer": {}}], "Domain": "unfiltered-web"}', ["q"]),
    "webqs": ("w.json", '[{"url": "u", "targetValue": "(list)", "utterance": "q"}]', ["q"]),
    "webqa": ("w.jsonl", '{"question": "q", "answers": ["a"]}\n', ["q"]),
    "race": (
        "high/1.txt",
        '{"answers": ["A"], "options": [["a"]], "questions": ["q", "r"], "article": "a"}',
        ["a", "q", "r"],
    ),
    "drop": ("d.json", '{"nfl_1": {"passage": "p", "qa_pairs": [{"question": "q", "answer": {}}]}}', ["p", "q"]),
    "coqa": (
        "c.json",
        '{"version": "1.0", "data": [{"story": "s", "questions": [{"input_text": "q", "turn_id": 1}]}]}',
        ["s", "q"],
    ),
    "piqa": ("p.jsonl", '{"goal": "g", "sol1": "x", "sol2": "y"}\n', ["g", "x", "y"]),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_published_form(task, tmp_path):
    name, content, texts = FILES[task]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert read_task(task, str(path.parent if task == "race" else path), "") == texts
    path.write_text('{"other": 1}\n' if path.suffix != ".csv" else "no list\n")
    with pytest.raises(DataError, match=f"must have the form of {task}"):
        read_task(task, str(path), "")


def sentences(draw, count):
    return " ".join(
        "".join(draw.choice(string.ascii_lowercase) for _ in range(7)) + draw.choice([",", "", "."])
        for _ in range(count)
    )


def test_planted_leaks(write, step, tmp_path):
    draw = random.Random(1)
    task = write("lambada.jsonl", [{"text": LEAK}, {"text": "too short to be searched for"}])
    before, behind = sentences(draw, 100) + ". ", ". " + sentences(draw, 100)
    leaked = before + LEAK.upper().replace(" ", ",  ") + behind
    rows = [
        {"text": sentences(draw, 60), "id": "clean", "other": 1.50},
        {"text": leaked, "id": "leak"},
        {"text": LEAK, "id": "all"},
    ]
    path = write("a.jsonl", rows)
    records, report = step("decontaminate", path, {"tasks": (f"lambada={task}",)})
    assert (tmp_path / "out.jsonl").read_bytes().startswith((tmp_path / "a.jsonl").read_bytes().splitlines(True)[0])
    assert [record["id"] for record in records] == ["clean", "leak", "leak"]
    assert [record["split_id"] for record in records[1:]] == ["leak-0", "leak-1"]
    start, end = len(before), leaked.index(behind)
    left = max(i + 1 for i in range(start - 200) if leaked[i] == ".")
    right = min(i + 1 for i in range(end + 199, len(leaked)) if leaked[i] == ".")
    assert records[1]["text"] == leaked[:left].strip() and records[2]["text"] == leaked[right:].strip()
    assert report["tasks"]["lambada"] == {"ngrams": 2, "leaked": 2, "occurrences": 4, "documents": 2}
    assert report["rules"]["no_piece_left"]["documents"] == 1
    assert report["rules"]["leak_removed"]["examples"][0]["found"].startswith("lambada: 'ONLY,  ONE,  SOURCE")


def test_phrases_of_the_language_stay(write, step):
    task = write("t.jsonl", [{"q": LEAK}])
    path = write("a.jsonl", [{"text": f"{LEAK} and {i}"} for i in range(11)])
    settings = {"tasks": (f"mine={task}:q",), "min_piece": 0}
    assert len(step("decontaminate", path, settings, "a.out")[0]) == 11
    records, report = step("decontaminate", path, settings | {"max_frequency": 11}, "b.out")
    assert records == [] and report["tasks"]["mine"]["documents"] == 11


def test_short_texts_are_one_ngram():
    found = task_ngrams({"a": ["one two three four", "one two", "x"], "b": [LEAK]}, 3, 2)
    assert {size: len(values) for size, values in found.hashes.items()} == {2: 1, 3: 2 + 12}
    matches = find_matches(["zero ONE, two; four one-two"], found)
    assert [(match.start, match.end, match.size) for match in matches] == [(5, 13, 2), (20, 27, 2)]


def test_unicode():
    text = "Ärger! Die ÉTÉ 吾輩は猫 x, ﬁn."
    found = task_ngrams({"a": ["die été 吾 輩 は 猫 X"]}, 7, 2)
    (match,) = find_matches(["𝔘 " + text], found)
    assert ("𝔘 " + text)[match.start : match.end] == "Die ÉTÉ 吾輩は猫 x"


def test_overlapping_and_many():
    text = "A one. " * 3 + "leak here. " + "B two. " * 3
    where = text.index("leak")
    spans = [(where, where + 4), (where + 2, where + 9)]

    assert [text[a:b] for a, b in split_around(text, spans, 0)] == ["A one. A one. A one.", "B two. B two. B two."]


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab. \n", max_size=80),
    st.lists(st.tuples(st.integers(0, 80), st.integers(1, 10)), max_size=4),
    st.integers(0, 9),
)
def test_pieces_are_what_the_rule_says(text, spans, margin):
    spans = [(a, min(a + size, len(text))) for a, size in spans if a < len(text)]
    pieces = split_around(text, spans, margin)
    gone = set(range(len(text)))
    for start, end in pieces:
        assert text[start:end].strip() == text[start:end] != ""
        gone -= set(range(start, end))
    for a, b in spans:
        assert set(range(max(0, a - margin), min(len(text), b + margin))) <= gone | {
            i for i in range(len(text)) if text[i].isspace()
        }
    assert pieces == sorted(pieces) and all(x[1] <= y[0] for x, y in itertools.pairwise(pieces))
    for _, end in pieces[:-1]:
        assert text[end - 1] in SENTENCE_ENDS


def test_too_many_pieces_and_any_partition(write, step, tmp_path):
    draw = random.Random(2)
    task = write("t.jsonl", [{"text": LEAK}])
    parts = [sentences(draw, 40) + "." for _ in range(5)]
    rows = [{"text": f". {LEAK}. ".join(parts), "id": i} for i in range(8)] + [
        {"text": sentences(draw, 50)} for _ in range(30)
    ]
    path = write("a.jsonl", rows)
    base = {"tasks": (f"lambada={task}",), "max_frequency": 0, "margin": 20, "min_piece": 50}
    records, report = step("decontaminate", path, base | {"max_pieces": 4}, "a.out")
    assert len(records) == 30 and report["rules"]["too_many_pieces"]["documents"] == 8
    step("decontaminate", path, base, "b.out")
    step("decontaminate", path, base, "c.out", partitions=6)
    assert (tmp_path / "b.out").read_bytes() == (tmp_path / "c.out").read_bytes()


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("lambada", "must be NAME=PATH"),
        ("lambda=x", "unknown task lambda: did you mean lambada"),
        ("lambada=/nowhere", "must name a file"),
    ],
)
def test_tasks_that_are_none(task, message):
    with pytest.raises(ConfigError, match=message):
        parse_task(task)


SHARED = pathlib.Path(__file__).parents[3] / "shared/data"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data in ../shared")
def test_real_task_files(write, step):
    """Every passage of LAMBADA that is put into a book is found; a real corpus without them loses nothing else."""
    passages = [
        json.loads(line)["text"] for line in (SHARED / "lambada/lambada_test_even.jsonl").read_text().splitlines()[:200]
    ]
    rows = [json.loads(line) for line in (SHARED / "loose_json/wikitext2_test_articles.jsonl").read_text().splitlines()]
    rows = [{"text": row["text"], "id": str(row["id"])} for row in rows]
    leaky = [
        {
            "text": f"{rows[i % len(rows)]['text'][:3000]}. {passage}. {rows[-1 - i % len(rows)]['text'][:3000]}",
            "id": f"p{i}",
        }
        for i, passage in enumerate(passages)
    ]
    tasks = (
        f"lambada={SHARED}/lambada/lambada_test_even.jsonl",
        f"nq={SHARED}/nq/nq-dev.csv",
        f"nq={SHARED}/nq/NQ-open.efficientqa.dev.1.1.jsonl",
    )
    records, report = step("decontaminate", write("a.jsonl", rows + leaky), {"tasks": tasks, "max_frequency": 0})
    kept = [record for record in records if str(record["id"]).startswith("p")]
    assert report["tasks"]["lambada"]["documents"] >= 200
    for passage in passages:
        assert not any(passage[:80] in record["text"] for record in kept)
    untouched = [record for record in records if "split_id" not in record]
    assert len(untouched) >= len(rows) - 5 and all(record in rows for record in untouched)
