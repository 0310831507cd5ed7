"""`megalith evaluate nq`: its numbers are those of a search by brute force; Megatron's command and files."""

import json
import pickle
import re
import shlex

import numpy as np
import pytest

from megalith.cli.main import main
from megalith.evaluation.records import read_records
from megalith.retrieval.embed import Embedder
from megalith.retrieval.sources import pack
from megalith.runtime.build import process_group
from megalith.testing import run_ranks
from tests.retrieval.evidence import PASSAGES, QUESTIONS, write_evidence, write_questions

CPU = "--device cpu"


@pytest.fixture(scope="module")
def place(ict_run, tmp_path_factory):
    """Evidence, questions and the index of the evidence."""
    folder = tmp_path_factory.mktemp("nq")
    write_evidence(folder / "wiki.tsv")
    write_questions(folder / "dev.csv")
    assert (
        main(shlex.split(f"index build --load {ict_run} --evidence {folder}/wiki.tsv --output {folder}/s {CPU}")) == 0
    )
    return folder


@pytest.fixture(scope="module")
def vectors(ict_run):
    """float32 [30, p] of the passages, as a store keeps them, and [12, p] of the questions."""
    with process_group():
        embedder = Embedder.load(ict_run)
        passages = embedder.embed(pack(embedder.tokenizer, PASSAGES, 24)).numpy().astype(np.float16)
        return passages.astype(np.float32), embedder.queries([question for question, _ in QUESTIONS]).numpy()


def first_places(vectors, holds):
    """The place, from 1, of the first passage of each question that holds an answer; None where none does."""
    passages, questions = vectors
    order = np.argsort(-(questions @ passages.T), axis=1, kind="stable")
    places = [
        [place for place, row in enumerate(rows, 1) if any(holds(answer, PASSAGES[row][1]) for answer in answers)]
        for rows, (_, answers) in zip(order, QUESTIONS)
    ]
    return [min(each, default=None) for each in places]


MATCHES = {
    "string": lambda answer, text: f" {answer} " in f" {text} ",
    "regex": lambda answer, text: re.search(answer, text) is not None,
}


def evaluate(words, folder, capsys):
    """(the top-k accuracies and number of questions of each file, what was said)."""
    path = folder / "out.json"
    path.unlink(missing_ok=True)
    assert main(shlex.split(f"evaluate {words} --json {path} {CPU}")) == 0, capsys.readouterr()
    records = read_records(str(path))
    return [
        {name: each["value"] for name, each in record["metrics"].items()} for record in records
    ], capsys.readouterr()


@pytest.mark.parametrize("match", MATCHES)
def test_recall_is_that_of_brute_force(place, vectors, ict_run, tmp_path, capsys, match):
    expected = first_places(vectors, MATCHES[match])
    assert None in expected and len(set(expected)) > 3  # something to tell apart
    words = (
        f"nq {ict_run} --index {place}/s --qa-data-dev {place}/dev.csv --faiss-match {match} --examples {tmp_path}/x"
    )
    ((found,), said) = evaluate(words, tmp_path, capsys)
    for k in (1, 5, 20, 30):
        assert found[f"top-{k} accuracy"] == pytest.approx(
            sum(each is not None and each <= k for each in expected) / 12
        )
    assert found["questions"] == 12 and "of 30 passages" in said.out
    examples = [json.loads(line) for line in (tmp_path / "x").read_text().splitlines()]
    assert [each["answered_at"] for each in examples] == expected
    best = (vectors[1] @ vectors[0].T).argmax(axis=1)
    assert [(each["title"], each["text"]) for each in examples] == [PASSAGES[row] for row in best]


def test_megatrons_command_builds_the_index_first(place, ict_run, sentences, tmp_path, capsys):
    """As in examples/evaluate_retriever_nq.sh of Megatron, with smaller numbers and other paths."""
    words = (
        f"--task RETRIEVER-EVAL --tokenizer-type BertWordPieceLowerCase --num-layers 2 --hidden-size 32 "
        f"--num-attention-heads 4 --tensor-model-parallel-size 1 --micro-batch-size 128 "
        f"--activations-checkpoint-method uniform --seq-length 24 --max-position-embeddings 24 --load {ict_run} "
        f"--evidence-data-path {place}/wiki.tsv --embedding-path {tmp_path}/new --retriever-seq-length 24 "
        f"--indexer-log-interval 1000 --indexer-batch-size 128 --vocab-file {sentences}.vocab "
        f"--qa-data-test {place}/dev.csv {place}/more.csv --faiss-use-gpu --retriever-report-topk-accuracies 1 5 20 100"
    )
    (place / "more.csv").write_text((place / "dev.csv").read_text().splitlines()[0] + "\n")
    (dev, more), said = evaluate(words, tmp_path, capsys)
    (expected,), _ = evaluate(f"nq --index {place}/s --valid-data {place}/dev.csv", tmp_path, capsys)
    assert dev == expected and more["questions"] == 1
    unused = next(line for line in said.err.splitlines() if "no effect" in line)
    assert all(name in unused for name in ("--activations-checkpoint-method", "--seq-length", "--micro-batch-size"))
    assert (tmp_path / "new/00000.vectors.npy").read_bytes() == (place / "s/00000.vectors.npy").read_bytes()
    assert main(shlex.split(f"evaluate nq {ict_run} --embedding-path {place}/s --qa-data-dev {place}/dev.csv "
                            f"--evidence {place}/dev.csv {CPU}")) == 1  # fmt: skip
    assert "must begin with a line of the names id, text and title" in capsys.readouterr().err


def test_embeddings_of_megatron_with_their_passages(place, vectors, ict_run, tmp_path, capsys):
    pickled = {number: vector.astype(np.float16) for number, vector in enumerate(vectors[0], 1)}
    (tmp_path / "emb.pkl").write_bytes(pickle.dumps({"embed_data": pickled}))
    assert main(["index", "import", str(tmp_path / "emb.pkl"), str(tmp_path / "old")]) == 0
    (found,), _ = evaluate(
        f"nq {ict_run} --index {tmp_path}/old --qa-data-dev {place}/dev.csv --evidence {place}/wiki.tsv",
        tmp_path,
        capsys,
    )
    (expected,), _ = evaluate(f"nq {ict_run} --index {place}/s --qa-data-dev {place}/dev.csv", tmp_path, capsys)
    assert found == expected


def in_layout(words):
    return main(shlex.split(words))


@pytest.mark.slow
def test_a_split_model_finds_the_same(place, ict_run, tmp_path, capsys):
    (expected,), _ = evaluate(f"nq {ict_run} --index {place}/s --qa-data-dev {place}/dev.csv", tmp_path, capsys)
    layout = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    words = f"evaluate nq {ict_run} --index {place}/s --qa-data-dev {place}/dev.csv {layout} --json {tmp_path}/4 {CPU}"
    assert run_ranks(in_layout, 4, words) == [0] * 4
    (record,) = read_records(str(tmp_path / "4"))
    assert {name: each["value"] for name, each in record["metrics"].items()} == expected


def test_evidence_beside_an_index_of_blocks_is_an_error(place, ict_run, sentences, tmp_path, capsys):
    assert main(shlex.split(f"index build --load {ict_run} --data-path {sentences} --output {tmp_path}/b {CPU}")) == 0
    words = f"evaluate nq --index {tmp_path}/b --evidence {place}/wiki.tsv --qa-data-dev {place}/dev.csv {CPU}"
    assert main(shlex.split(words)) == 1
    assert "must not be given, as" in capsys.readouterr().err


MISTAKES = {
    "--index {0}/s": "--qa-data-dev must name files of questions",
    "--qa-data-dev {0}/dev.csv": "--index must name the folder of the index",
    "--index {0}/s --qa-data-dev {0}/dev.csv --faiss-match words": "--faiss-match must be string or regex",
    "--index {0}/s --qa-data-dev {0}/dev.csv --faiss-topk-retrievals 0": "--faiss-topk-retrievals must be at least 1",
    "--index {0}/absent --qa-data-dev {0}/dev.csv": "must be the folder of a store",
    "--index {0}/s --qa-data-dev {0}/wiki.tsv": "must have a question and a list of answers",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_named(place, capsys, words):
    assert main(shlex.split(f"evaluate nq {words.format(place)} {CPU}")) in (1, 2)
    assert MISTAKES[words] in capsys.readouterr().err


def test_flags_of_another_task_are_named(place, ict_run, capsys):
    words = f"nq {ict_run} --index {place}/s --qa-data-dev {place}/dev.csv --strict-lambada {CPU}"
    assert main(shlex.split(f"evaluate {words}")) == 0
    assert "no effect: --strict-lambada" in capsys.readouterr().err
