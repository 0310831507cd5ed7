"""ids, shuffle, sample, stats; a YAML of steps; workers, kills, compressed output, standard output."""

import gzip
import io
import itertools
import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zstandard

from megalith.cli.main import main
from megalith.common.errors import ConfigError, DataError
from megalith.curation.pipeline import read_pipeline, run_pipeline
from megalith.curation.sample import choose
from megalith.curation.shuffle import random_keys


def rows(count=50):
    draw = random.Random(1)
    return [{"text": f"document {i} " + "x" * draw.randrange(200), "source": f"s{i % 3}"} for i in range(count)]


def test_ids(write, step):
    records, _ = step("ids", write("a.jsonl", rows()), {"id_prefix": "owt"}, partitions=7)
    assert [record["adlr_id"] for record in records] == [f"owt-{i:010d}" for i in range(1, 51)]
    with pytest.raises(DataError, match="--id-key must be a key that documents do not have yet"):
        step("ids", write("b.jsonl", records), output="b.out")
    again, _ = step("ids", write("b.jsonl", records), {"replace": True, "first": 0}, "c.out")
    assert again[0]["adlr_id"] == "0000000000"


def test_shuffle(write, step, monkeypatch, tmp_path):
    from megalith.curation import shuffle

    path = write("a.jsonl", rows(400))
    once, _ = step("shuffle", path, {"seed": 3}, "a.out", partitions=5)
    assert once != rows(400) and sorted(record["text"] for record in once) == sorted(row["text"] for row in rows(400))
    other, _ = step("shuffle", path, {"seed": 4}, "b.out", partitions=5)
    assert other != once
    monkeypatch.setattr(shuffle, "RANGE_BYTES", 4000)
    step("shuffle", path, {"seed": 3}, "c.out", partitions=5)
    assert (tmp_path / "c.out").read_bytes() == (tmp_path / "a.out").read_bytes()


def test_orders_are_uniform():
    """Each of 6 orders of 3 documents comes up as often as any other: chi-square with 5 degrees of freedom."""
    counts = np.zeros(6)
    for seed in range(3000):
        order = tuple(np.argsort(random_keys(seed, 0, 0, 3)).tolist())
        counts[[(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)].index(order)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # p = 0.001
    assert len(np.unique(np.concatenate([random_keys(1, part, 0, 1000) for part in range(100)]))) == 100_000


def test_sample(write, step):
    path = write("a.jsonl", rows(100))
    records, report = step("sample", path, {"documents": 7, "by": "source"}, partitions=4)
    assert report["strata"] == {"s0": 7, "s1": 7, "s2": 7}
    positions = [int(record["text"].split()[1]) for record in records]
    assert positions == sorted(positions)
    assert len(step("sample", path, {"rate": 0.1}, "b.out")[0]) == 10
    with pytest.raises(ConfigError, match="must be a share of at most 1, or --documents"):
        step("sample", path, {"rate": 0.1, "documents": 3}, "c.out")


def test_choice_takes_the_smallest_keys_of_each_stratum():
    strata, keys = np.array([0, 1, 0, 0, 1]), np.array([5, 9, 1, 3, 2], np.uint64)
    assert choose(strata, keys, 0.5, 0).tolist() == [False, False, True, True, True]
    assert choose(strata, keys, 0, 9).all()


def test_stats(write, tmp_path, step):
    texts = ["one two three", "é" * 10, ""]
    path = write("a.jsonl", [{"text": text, "source": "web" if text else "book"} for text in texts])
    _, report = _stats(tmp_path, path)
    table = json.loads((tmp_path / "stats.json").read_text())
    assert table == report["stats"] == {
        "documents": 3, "characters": 23, "utf8_bytes": 33, "words": 4, "sources": {"web": 2, "book": 1},
        "lengths": {"1": 1, "8": 1, "11": 1},
    }  # fmt: skip
    assert (tmp_path / "stats.json.lengths.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png;base64," in (tmp_path / "stats.json.report.html").read_text()


def _stats(tmp_path, path):
    words = ["data", "stats", "--input", path, "--output", str(tmp_path / "stats.json"), "--source-key", "source"]
    assert main([*words, "--engine", "inline"]) == 0
    return None, json.loads((tmp_path / "stats.json.report.json").read_text())["steps"][0]


PIPELINE = """
input: [{folder}/a.jsonl]
output: {folder}/out.jsonl
steps:
  - clean: {{rules: [newlines, min_characters], min_characters: 30}}
  - dedup: {{over_budget: warn, threshold: 0.8}}
  - ids
  - shuffle: {{seed: 7}}
"""


def test_a_pipeline_is_its_steps(write, step, tmp_path, capsys):
    corpus = rows(60) + rows(20)
    path = write("a.jsonl", corpus)
    (tmp_path / "steps.yaml").write_text(PIPELINE.format(folder=tmp_path))
    assert main(["data", "pipeline", str(tmp_path / "steps.yaml"), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    assert main(["data", "pipeline", str(tmp_path / "steps.yaml"), "--engine", "inline"]) == 0
    step("clean", path, {"rules": ("newlines", "min_characters"), "min_characters": 30}, "1.jsonl")
    step("dedup", str(tmp_path / "1.jsonl"), {"over_budget": "warn", "threshold": 0.8}, "2.jsonl")
    step("ids", str(tmp_path / "2.jsonl"), {}, "3.jsonl")
    step("shuffle", str(tmp_path / "3.jsonl"), {"seed": 7}, "4.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "4.jsonl").read_bytes()
    steps = json.loads((tmp_path / "out.jsonl.report.json").read_text())["steps"]
    assert [each["step"] for each in steps] == ["clean", "dedup", "ids", "shuffle"]
    assert all(a["kept"] == b["documents"] for a, b in itertools.pairwise(steps))
    assert not (tmp_path / "out.jsonl.steps").exists()
    evidence = tmp_path / "out.jsonl.1-dedup.removed.jsonl"  # as that of the step alone, of other names
    alone = [json.loads(line) for line in (tmp_path / "2.jsonl.removed.jsonl").read_text().splitlines()]
    together = [json.loads(line) for line in evidence.read_text().splitlines()]
    assert steps[1]["evidence"] == str(evidence) and len(together) == len(alone) > 0
    assert [line["similarity"] for line in together] == [line["similarity"] for line in alone]
    (tmp_path / "out.jsonl").unlink()
    assert main(["data", "pipeline", str(tmp_path / "steps.yaml"), "--engine", "inline"]) == 1
    assert "evidence of removals is there already" in capsys.readouterr().err and evidence.exists()


def test_a_pipeline_resumes_with_the_step_that_is_missing(write, tmp_path, monkeypatch):
    from megalith.curation import shuffle

    write("a.jsonl", rows(60))
    (tmp_path / "steps.yaml").write_text(PIPELINE.format(folder=tmp_path))
    steps = read_pipeline(str(tmp_path / "steps.yaml"))
    with monkeypatch.context() as patch:
        patch.setattr(shuffle.Scatter, "process", lambda self, documents, out: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(run_pipeline(steps, {"engine": "inline"}))
    notices = []
    list(run_pipeline(steps, {"engine": "inline"}, notice=notices.append))
    assert sum("already made" in line for line in notices) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("input: a\n", "must have input, output and a list of steps"),
        ("input: a\noutput: b\nsteps: [{cleen: {}}]\n", "did you mean 'clean'"),
        ("input: a\noutput: b\nsteps: [{clean: {langage: en}}]\n", "unknown setting langage: did you mean language"),
        ("input: a\noutput: b\nsteps: [{dedup: {threshold: high}}]\n", "--threshold must be a number"),
        ("input: a\noutput: b\nstep: 1\nsteps: [ids]\n", "unknown key step: did you mean steps"),
        ("input: [a\n", "must be YAML"),
    ],
)
def test_pipelines_that_cannot_work(text, message, tmp_path):
    (tmp_path / "steps.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_pipeline(str(tmp_path / "steps.yaml"))


@pytest.mark.parametrize("end", [".gz", ".zst"])
def test_compressed_output(end, write, step, tmp_path):
    from megalith.curation.pipeline import build_command
    from megalith.curation.run import RunOptions, execute

    output = tmp_path / f"out.jsonl{end}"
    execute(
        build_command("ids", {}),
        RunOptions(input=[write("a.jsonl", rows())], output=str(output), engine="inline", partitions=3),
    )
    plain = (
        gzip.decompress(output.read_bytes())
        if end == ".gz"
        else zstandard.ZstdDecompressor().stream_reader(io.BytesIO(output.read_bytes()), read_across_frames=True).read()
    )
    assert len(plain.splitlines()) == 50
    assert len(step("ids", str(output), {"id_key": "n"})[0]) == 50


def test_workers_give_the_same_bytes_and_a_pipe(write, step, tmp_path):
    path = write("a.jsonl", rows(300))
    step("shuffle", path, {}, "one.out", partitions=6)
    command = [
        sys.executable,
        "-m",
        "megalith",
        "data",
        "shuffle",
        "--input",
        path,
        "--output",
        "-",
        "--workers",
        "2",
        "--partitions",
        "6",
    ]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == (tmp_path / "one.out").read_bytes() and b"shuffle: 300 of 300 documents" in done.stderr


@pytest.mark.slow
def test_killed_while_it_works(write, step, tmp_path):
    """kill -9 of the whole group; then the same command gives the bytes of an undisturbed run."""
    path = write("a.jsonl", rows(20_000))
    step("dedup", path, {"over_budget": "warn"}, "whole.jsonl", partitions=30)
    words = ["data", "dedup", "--input", path, "--output", str(tmp_path / "out.jsonl"), "--over-budget", "warn"]
    command = [sys.executable, "-m", "megalith", *words, "--partitions", "30", "--workers", "2"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(pathlib.Path(f"{tmp_path}/out.jsonl.parts").glob("*/*record*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out.jsonl").exists()
    assert main([*words, "--partitions", "30", "--engine", "inline"]) == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_outputs_are_safe(write, step, tmp_path):
    path = write("a.jsonl", rows())
    step("ids", path)
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(DataError, match="which only --overwrite replaces"):
        step("ids", path, {"id_prefix": "other"})
    with pytest.raises(DataError, match="must not be the input"):
        step("ids", path, {"id_prefix": "other"}, "a.jsonl", overwrite=True)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    notices = []
    from megalith.curation.pipeline import build_command
    from megalith.curation.run import RunOptions, execute

    options = RunOptions(input=[path], output=str(tmp_path / "out.jsonl"), engine="inline")
    execute(build_command("ids", {}), options, notice=notices.append)
    assert any("already made" in line for line in notices)
    (tmp_path / "out.jsonl").write_text("changed\n")
    with pytest.raises(DataError, match="which only --overwrite replaces"):
        execute(build_command("ids", {}), options)


@pytest.mark.parametrize("verb", ["ids", "dedup", "stats"])
def test_an_input_that_changes_meanwhile_leaves_no_output(verb, write, step, tmp_path, monkeypatch):
    from megalith.curation.parts import PartRunner

    path = pathlib.Path(write("a.jsonl", rows()))
    original = PartRunner.__call__

    def changing(self, part):
        record = original(self, part)
        with open(path, "a") as file:
            file.write("\n")
        return record

    monkeypatch.setattr(PartRunner, "__call__", changing)
    with pytest.raises(DataError, match="must not change meanwhile"):
        step(verb, str(path))
    assert sorted(each.name for each in tmp_path.iterdir() if each.suffix != ".lock") == ["a.jsonl", "out.jsonl.parts"]
