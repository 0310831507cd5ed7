"""`megalith index` as it is typed: blocks of one's own, whole models on every process, what is damaged."""

import json
import pathlib
import shlex

import numpy as np
import pytest

from megalith.cli.main import main
from megalith.data.indexed import IndexedDataset
from megalith.retrieval.store import Store
from megalith.testing import run_ranks
from tests.retrieval import blocks

CPU = "--device cpu"


def command(words, capsys):
    """(status, output, errors)."""
    status = main(shlex.split(f"index {words}"))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_blocks_of_ones_own(ict_run, sentences, tmp_path, capsys, monkeypatch):
    build = f"build --load {ict_run} --data-path {sentences} --output {tmp_path}/s {CPU}"
    own = f"{build} --block-samples-mapping tests.retrieval.blocks:documents"
    status, out, err = command(own, capsys)
    data, found = IndexedDataset(sentences), Store(tmp_path / "s")
    assert status == 0 and f"{data.num_documents} vectors of 16" in out, err
    firsts = np.asarray(data.document_indices)
    for number in (0, 7, data.num_documents - 1):
        row = found.row(number)
        assert (row["first"], row["last"]) == (firsts[number], firsts[number + 1])
    status, out, err = command(f"search {tmp_path}/s 'w3 w3 w4' --top-k 2 --json {CPU}", capsys)
    results = json.loads(out)["results"]
    assert status == 0 and len(results) == 2 and results[0]["score"] >= results[1]["score"], err
    status, _, err = command(build, capsys)
    assert status == 1 and "must be built with one" in err
    monkeypatch.setattr(blocks, "documents", blocks.beginnings)
    for words in (own, f"search {tmp_path}/s w3 {CPU}"):
        status, _, err = command(words, capsys)
        assert status == 1 and ("must be built with one source" in err or "cut into the blocks, that were" in err), err
    status, _, err = command(f"{build} --block-samples-mapping tests.retrieval.blocks:absent", capsys)
    assert status == 2 and "define 'absent'" in err


def build(words):
    return main(shlex.split(words))


def test_no_process_waits_for_the_shards_of_another(ict_run, sentences, tmp_path):
    """Of an odd number of shards one process embeds one more: with sharded parameters it would wait for ever."""
    words = f"index build --load {ict_run} --data-path {sentences} --use-one-sent-docs --shard-rows 35 {CPU}"
    assert build(f"{words} --output {tmp_path}/1") == 0
    assert Store(tmp_path / "1").plan.shards % 2
    shared = f"{words} --output {tmp_path}/2 --data-parallel-sharding full"
    assert run_ranks(build, 2, shared) == [0, 0]
    names = [path.name for path in sorted((tmp_path / "1").glob("0*"))]
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


def test_what_is_damaged_is_named(ict_run, sentences, tmp_path, capsys):
    build = f"build --load {ict_run} --data-path {sentences} --output {tmp_path}/s {CPU} --index-string Flat"
    status, out, _ = command(build, capsys)
    assert status == 0 and "recall of the 20 nearest 1.000" in out
    assert command(f"verify {tmp_path}/s", capsys)[0] == 0
    path = pathlib.Path(tmp_path / "s/00000.vectors.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    status, _, err = command(f"verify {tmp_path}/s", capsys)
    assert status == 1 and "00000.vectors.npy has another checksum" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("build", "--load must name the bi-encoder"),
        ("build --load RUN --output x --data-path a --evidence b", "--evidence must not be given beside --data-path"),
        ("build --load RUN --output x --data-path SENTENCES --seq-length 500", "must be at most the model's"),
        ("build --load RUN --output x --data-path SENTENCES --num-layers 9", "--num-layers must be 2, that of"),
        ("search RUN w1 --top-k 0", "--top-k must be above 0"),
        ("search RUN w1", "must be the folder of a store"),
    ],
)
def test_mistakes_are_named(ict_run, sentences, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(f"{words.replace('RUN', ict_run).replace('SENTENCES', sentences)} {CPU}", capsys)
    assert status in (1, 2) and message in err
