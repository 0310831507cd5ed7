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
from tests.toy import ROOT

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
        (
            "build --load RUN --output x --data-path SENTENCES --workers 2",
            "--workers is of --engine, which is not given",
        ),
        (
            "build --load RUN --output x --data-path SENTENCES --engine rays",
            "unknown engine 'rays'; did you mean 'ray'",
        ),
        (
            "build --load RUN --output x --data-path SENTENCES --engine ray --tensor-model-parallel-size 2",
            "--tensor-model-parallel-size must be 1 with --engine",
        ),
        ("search RUN w1 --top-k 0", "--top-k must be above 0"),
        ("search RUN w1", "must be the folder of a store"),
    ],
)
def test_mistakes_are_named(ict_run, sentences, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(f"{words.replace('RUN', ict_run).replace('SENTENCES', sentences)} {CPU}", capsys)
    assert status in (1, 2) and message in err


ENGINE = "--use-one-sent-docs --shard-rows 35 --indexer-batch-size 7 --seq-length 24"


def same_bytes(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether two stores have the same files, byte for byte."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir()) and len(names) > 9
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_workers_of_an_engine_write_the_same(ict_run, sentences, tmp_path, capsys):
    words = f"build --load {ict_run} --data-path {sentences} {ENGINE} {CPU}"
    assert command(f"{words} --output {tmp_path}/one", capsys)[0] == 0
    assert command(f"{words} --output {tmp_path}/two --engine inline", capsys)[0] == 0
    assert same_bytes(tmp_path / "one", tmp_path / "two")
    for name in ("00001.json", "00002.json"):  # as if it had been killed
        (tmp_path / "two" / name).unlink()
    status, _, err = command(f"{words} --output {tmp_path}/two --engine inline", capsys)
    assert (
        status == 0 and "shards are there, the others follow" in err and same_bytes(tmp_path / "one", tmp_path / "two")
    )


@pytest.mark.slow
def test_processes_of_this_machine_write_the_same(ict_run, sentences, tmp_path, capsys):
    """Their job is pickled, and each loads the model."""
    words = f"build --load {ict_run} --data-path {sentences} {ENGINE} {CPU}"
    assert command(f"{words} --output {tmp_path}/one", capsys)[0] == 0
    status, _, err = command(f"{words} --output {tmp_path}/two --engine processes --workers 2", capsys)
    assert status == 0 and same_bytes(tmp_path / "one", tmp_path / "two"), err


@pytest.mark.slow
def test_two_ray_nodes(ict_run, sentences, tmp_path, monkeypatch, capsys):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.chdir(tmp_path)
    words = f"build --load {ict_run} --data-path {sentences} {ENGINE}"
    assert command(f"{words} --output one {CPU}", capsys)[0] == 0
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    try:
        cluster.add_node(**node)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([each for each in ray.nodes() if each["Alive"]]) == 2
        # Each node has one core and each actor takes one: two actors are on two nodes.
        status, _, err = command(f"{words} --output two --engine ray --workers 2 {CPU}", capsys)
        assert status == 0 and same_bytes(tmp_path / "one", tmp_path / "two"), err
    finally:
        ray.shutdown()
        cluster.shutdown()
