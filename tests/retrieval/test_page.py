"""docs/retrieval.md: its commands, one after the other, at toy size, and at their own on the articles of ../shared."""

import json
import pathlib
import re
import shlex

import pytest

from megalith.cli.main import main
from megalith.evaluation.records import read_records
from tests.retrieval.articles import SHARED, write_real_files
from tests.tiny import records
from tests.toy import ROOT

SMALLER = {  # what a test has no time for, and what is asked of other articles
    "--num-layers 2": "--num-layers 1",
    "--hidden-size 128": "--hidden-size 32",
    "--train-iters 150": "--train-iters 3",
    "--micro-batch-size 128 --global-batch-size 128": "--micro-batch-size 8 --global-batch-size 8",
    "--eval-iters 2": "--eval-iters 1",
    "--workers 2": "--workers 1",
    "who invented the constant k filter": "who wrote the book",
}
PEOPLE, VERBS, THINGS = ("ann", "bob", "cleo", "dan"), ("wrote", "built", "found"), ("book", "bridge", "river", "ship")


def write_files(folder: pathlib.Path) -> None:
    """The files that the page names: articles, their vocabulary, the same as evidence, and questions on them."""
    articles, questions = [], []
    for number in range(48):
        person, verb, thing = PEOPLE[number % 4], VERBS[number % 3], THINGS[number // 12]
        text = f"{person} {verb} the {thing} of year {number}. It was long ago. Many people saw it there."
        articles.append({"id": number + 1, "text": text, "title": f"the {thing} {number}"})
        questions.append((f"who {verb} the {thing} of year {number}", [person]))
    passages = [{"title": each["title"], "text": each["text"]} for each in articles]
    dpr = [
        {
            "question": question, "answers": answers, "positive_ctxs": [passages[number]],
            "hard_negative_ctxs": [passages[number - 1]], "negative_ctxs": [passages[number - 2]],
        }
        for number, (question, answers) in enumerate(questions)
    ]  # fmt: skip
    lines = "".join(f"{json.dumps(each)}\n" for each in articles)
    rows = "".join(f"{each['id']}\t{each['text']}\t{each['title']}\n" for each in articles)
    words = sorted(set(re.findall(r"[a-z]+|[0-9]+|\.", lines.lower())) | {"who", "the"})
    texts = {
        "corpus.jsonl": lines, "vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]),
        "wiki.tsv": f"id\ttext\ttitle\n{rows}",
        "nq-train.json": json.dumps(dpr[:40]), "nq-dev.json": json.dumps(dpr[40:]),
        "nq-dev.csv": "".join(f"{question}\t{answers}\n" for question, answers in questions),
    }  # fmt: skip
    texts["questions.csv"] = texts["nq-dev.csv"]
    for name, text in texts.items():
        (folder / name).write_text(text)


def blocks() -> list[list[str]]:
    """The commands of the page, in order, those of each block."""
    page = (ROOT / "docs/retrieval.md").read_text()
    found = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [body.replace("\\\n", " ").splitlines() for body in found]


def smaller(line: str) -> str:
    """A command at toy size."""
    for text, instead in SMALLER.items():
        line = line.replace(text, instead)
    return line


def run(lines: list[str], capsys: pytest.CaptureFixture) -> dict[str, str]:
    """What the commands of each verb say."""
    said = {}
    for line in lines:
        program, verb, what, *words = shlex.split(line)
        device = ["--device", "cpu"] * (verb != "data" and what != "verify")
        status = main([verb, what, *words, *device, *["--progress", "none"] * (verb in ("pretrain", "finetune"))])
        shown = capsys.readouterr()
        assert program == "megalith" and status == 0, (line, shown.err)
        said[f"{verb} {what}"] = shown.out
    return said


def test_what_the_page_says_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    lines = [line for body in blocks() for line in body]
    assert all(any(text in line for line in lines) for text in SMALLER)
    said = run([smaller(line) for line in lines], capsys)
    assert len(said) == 7
    assert said["index search"].startswith("who wrote the book") and "the book" in said["index search"]
    assert "undamaged" in said["index verify"] and "top-20 accuracy" in said["evaluate nq"]
    assert "average rank" in list(records("runs/nq"))[-1]["validation_metrics"]
    (record,) = read_records("nq.json")
    assert record["metrics"]["top-48 accuracy"]["value"] == 1.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not SHARED.exists(), reason="needs the real data in ../shared")
def test_real_articles_answer_questions(tmp_path, monkeypatch, capsys):
    """The first block as it is: held-out sentences find their block, and questions that nothing was trained on an
    article.
    """
    monkeypatch.chdir(tmp_path)
    write_real_files(tmp_path)
    said = run(blocks()[0], capsys)
    first, *_, last = [line["validation_metrics"] for line in records("runs/ict") if "validation_metrics" in line]
    assert last["top5_acc"] > max(2 * first["top5_acc"], 0.2)  # chance: 5 of 128
    answered = float(re.search(r"top-20 accuracy +([0-9.]+)", said["evaluate nq"])[1])
    assert answered >= 0.5  # 14 of 16 when the page was written, 2 with random weights
    assert said["index search"].startswith("who invented the constant k filter")
