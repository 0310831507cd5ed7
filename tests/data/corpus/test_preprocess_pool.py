"""Engines: a Ray cluster of two nodes writes the bytes of one process."""

import json
import pathlib
import random

import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.data.corpus.preprocess import PreprocessOptions, preprocess
from megalith.data.corpus.preprocess_pool import run_ray
from megalith.data.tokenizers.tokenizer import TokenizerOptions

ROOT = pathlib.Path(__file__).parents[3]


def content(prefix):
    return tuple(pathlib.Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx"))


def options(tmp_path, name, **changes):
    tokenizer = TokenizerOptions(tokenizer_type="NullTokenizer", vocab_size=5000)
    settings = {
        "input": [str(tmp_path / "a.jsonl")],
        "output_prefix": str(tmp_path / name),
        "tokenizer": tokenizer,
        "partitions": 12,
    }
    return PreprocessOptions(**settings | changes)


class WhichGpus:
    """A job for workers with GPUs: each part is answered with the numbers of those that Ray has given."""

    gpus = True

    def worker(self):
        import ray

        return lambda part: {"gpus": ray.get_gpu_ids()}


@pytest.fixture
def corpus(tmp_path):
    draw = random.Random(1)
    rows = [" ".join(str(draw.randrange(5000)) for _ in range(draw.randrange(1, 50))) for _ in range(500)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


def test_ray_absent(corpus, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"^--engine ray needs the package ray, which is not installed.*'\.\[ray\]'"):
        preprocess(options(corpus, "out", engine="ray"))
    assert [path.name for path in corpus.iterdir()] == ["a.jsonl"]


@pytest.mark.slow
def test_two_ray_nodes(corpus, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    expected = content(preprocess(options(corpus, "one", workers=1)).prefixes["text"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    try:
        cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=80 << 20)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        assert len([node for node in ray.nodes() if node["Alive"]]) == 2
        # Each node has one core and each actor takes one: two actors are on two nodes.
        result = preprocess(options(corpus, "ray", engine="ray", workers=2))
        assert content(result.prefixes["text"]) == expected
        # A GPU that Ray counts, on one of the nodes: the job that asks for GPUs has one actor, there, which sees it.
        assert {tuple(each["gpus"]) for each in run_ray(WhichGpus(), iter(range(3)), 2)} == {(0,)}
        with open(corpus / "a.jsonl", "a") as file:
            file.write("not JSON\n")
        with pytest.raises(DataError, match=r"a\.jsonl:501: malformed JSON"):
            preprocess(options(corpus, "fail", engine="ray", on_error="fail"))
    finally:
        ray.shutdown()
        cluster.shutdown()
