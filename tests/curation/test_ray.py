"""Two nodes of a Ray cluster write the bytes of one process."""

import json
import pathlib
import random

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_two_ray_nodes(tmp_path, step, write, monkeypatch):
    import ray
    from ray.cluster_utils import Cluster

    draw = random.Random(1)
    texts = [" ".join(f"w{draw.randrange(3000)}" for _ in range(100)) for _ in range(200)]
    path = write("a.jsonl", [{"text": text} for text in texts + texts[:30]])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    for verb in ("dedup", "shuffle"):
        settings = {"over_budget": "warn"} if verb == "dedup" else {}
        step(verb, path, settings, f"{verb}.one", partitions=12)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20})
    try:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        # Each node has one core and each actor takes one: two actors are on two nodes.
        for verb in ("dedup", "shuffle"):
            settings = {"over_budget": "warn"} if verb == "dedup" else {}
            step(verb, path, settings, f"{verb}.ray", partitions=12, engine="ray", workers=2)
            assert (tmp_path / f"{verb}.ray").read_bytes() == (tmp_path / f"{verb}.one").read_bytes()
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert len((tmp_path / "dedup.ray").read_text().splitlines()) == 200
    assert json.loads((tmp_path / "dedup.ray.report.json").read_text())["steps"][0]["rules"]["exact"]["documents"] == 30
