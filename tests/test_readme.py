"""Every command in README.md runs as typed, block by block in one folder.

Those up to training by several processes in each change, all in the slow tests: 200 processor seconds.
"""

import json
import pathlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterable

import pytest

from tests.checkpoint import megatron_files
from tests.toy import ROOT, make_corpus, run

README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(README)
FIRST_BLOCKS = BLOCK.findall(README[: README.index("## Weights from elsewhere")])
# `make` only says what it would do here; test_fresh_clone does it. A server must not outlive a command that failed.
PRELUDE = (
    "set -euo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n"
    f"make() {{ command make --dry-run --directory '{ROOT}' \"$@\"; }}\n"
)


@pytest.fixture
def folder(tmp_path_factory) -> pathlib.Path:
    """What a reader has: a clone, a corpus of their own and vocabularies."""
    folder = tmp_path_factory.mktemp("readme")
    make_corpus(folder)
    (folder / "tokenizer.json").unlink()  # the README makes it
    megatron_files.release(folder / "megatron_lm_345m_v0.0.zip", words=512, padded=512)
    for name in ("examples", "megalith"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def test_every_block_says_what_it_is() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "yaml", "text"}
    assert "$ " not in "".join(body for _, body in BLOCKS)


def run_blocks(blocks: Iterable[tuple[str, str]], folder: pathlib.Path) -> None:
    """Run commands and programs, and write files; what training by several processes gives is that of one."""
    for language, body in blocks:
        if language == "sh":
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port = listener.getsockname()[1]
            # Port 5000 may be another test's.
            body = re.sub(r"\b5000\b", str(port), body)
            run(["bash", "-c", PRELUDE + body], folder)
        elif language == "python":
            run([sys.executable, "-c", body], folder)
        elif language == "yaml":
            (folder / body.split()[1]).write_text(body)
    losses = [losses_of(folder / "runs" / name) for name in ("first", "two", "sharded", "tensor", "pipeline")]
    assert [len(each) for each in losses] == [40, 40, 40, 40, 45]  # the last is gone on with, in one process
    for other in losses[1:]:
        assert other[:40] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 1
    assert {"config.yaml", "metrics.jsonl", "loss.png", "checkpoints"} <= {
        path.name for path in (folder / "runs/first").iterdir()
    }


@pytest.mark.timeout(900)
def test_the_first_commands_run(folder: pathlib.Path) -> None:
    run_blocks(FIRST_BLOCKS, folder)


@pytest.mark.slow
def test_every_command_runs(folder: pathlib.Path) -> None:
    run_blocks(BLOCKS, folder)
    assert transformers_text(folder / "gpt-hf")


def transformers_text(exported: pathlib.Path) -> str:
    """What transformers' pipeline writes from an exported folder."""
    import transformers

    write = transformers.pipeline("text-generation", model=str(exported), device="cpu")
    return write("import os", max_new_tokens=4, do_sample=False)[0]["generated_text"].removeprefix("import os")


def losses_of(run_folder: pathlib.Path) -> list[float]:
    """Training loss of every step."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_map_is_the_tree() -> None:
    (tree,) = (body for language, body in BLOCKS if language == "text" and body.startswith("megalith/"))
    lines = tree.splitlines()
    folders = {line.split("/")[0].strip() for line in lines if line.startswith("  ")}
    top = {line.split("/")[0] for line in lines if not line.startswith("  ")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert folders == {path.split("/")[1] for path in tracked if path.startswith("megalith/") and path.count("/") > 1}
    assert top == {path.split("/")[0] for path in tracked if "/" in path and not path.startswith(".")}


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert links and not missing


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fresh_clone(tmp_path: pathlib.Path) -> None:
    """The two commands, from nothing; the loss falls by a third, the picture is there, the text is printed.

    Of the tests a part; CI runs all of them from a fresh clone.
    """
    run(["git", "clone", "--quiet", str(ROOT), "clone"], tmp_path)
    output = run(["make", "demo"], tmp_path / "clone", PYTHONPATH="")
    lines = [json.loads(line) for line in (tmp_path / "clone/runs/demo/run/metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[-1] < losses[0] * 2 / 3
    assert (tmp_path / "clone/runs/demo/run/loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "import" in output
    part = "tests/common tests/checkpoint/formats tests/serving/openai"
    assert " passed" in run(["make", "test", f"PYTEST_ARGS={part}"], tmp_path / "clone", PYTHONPATH="")
