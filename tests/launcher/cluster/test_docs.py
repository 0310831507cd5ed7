"""The commands of docs/launch.md, slurm.md, pbs.md, two_machines.md and from_megatron.md, at the size of a toy."""

import pathlib
import re
import shlex
import shutil

import pytest

from megalith.cli.main import main
from megalith.config.flags.loading import from_yaml
from megalith.launcher import processes
from tests.launcher.cluster.standins import FOREIGN
from tests.toy import ROOT, run

PAGES = ("launch", "slurm", "pbs", "two_machines", "from_megatron")
LINKS = re.compile(r"\]\(([^)#]+)\)")


def blocks(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(page):
    """The `megalith launch` commands of a page, as words."""
    lines = "\n".join(blocks(page)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("megalith launch")]


@pytest.mark.parametrize("page", PAGES)
def test_launch_commands_can_start(page, tmp_path, monkeypatch, capsys):
    import os

    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "accelerators", lambda: 0)
    (tmp_path / "train.py").touch()
    (tmp_path / "hosts.txt").write_text("node0 slots=8\nnode1 slots=8\n")
    if "--hostfile" in str(commands(page)) and shutil.which("ssh") is None:
        monkeypatch.setattr(shutil, "which", lambda name: name)
    assert commands(page)
    for words in commands(page):
        assert main([words[0], "--dry-run", *words[1:]]) == 0, words
        shown = capsys.readouterr().out
        assert "megalith" in shown or "train.py" in shown


def test_configs_from_megatron(tmp_path):
    """The whole block, but for the training itself."""
    shutil.copy(ROOT / "examples" / "common.sh", tmp_path)
    (tmp_path / "pretrain_gpt_distributed.sh").write_text(
        "N=2\ntorchrun --nproc_per_node $N pretrain_gpt.py --num-layers 2 --hidden-size 32 --num-attention-heads 2 "
        "--seq-length 16 --micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-3 --vocab-file vocab.json "
        "--merge-file merges.txt --data-path my_text_document\n"
    )
    for block in blocks("from_megatron"):
        kept = "\n".join(
            line for line in block.splitlines() if "--dry-run" not in line and not line.startswith("megalith launch")
        )
        run(["bash", "-c", f"set -euo pipefail\n{kept}"], tmp_path)
    first, second = (from_yaml((tmp_path / name).read_text()) for name in ("run.yaml", "command.yaml"))
    assert first.model.num_layers == 2 and second.model.num_layers == 24 and second.batch.global_batch_size == 32


@pytest.mark.parametrize("page", [*PAGES, "troubleshooting"])
def test_links_lead_somewhere(page):
    links = LINKS.findall((ROOT / "docs" / f"{page}.md").read_text())
    assert not [link for link in links if "://" not in link and not (ROOT / "docs" / link).exists()]


def test_messages_of_troubleshooting_exist():
    """Those that megalith itself says are in its source."""
    source = "".join(path.read_text() for path in pathlib.Path(ROOT / "megalith").rglob("*.py"))
    texts = ["as the system does where memory is short", "contact with another rank was lost", "nodes came ("]
    texts += ["must be a port at which node 0", "is not the folder that node 0 has there", "the version of "]
    for text in texts:
        assert text in source, text
