"""Nodes by ssh: the hostfile, the command for each host, and what becomes of a failure or a signal on one of them."""

import pathlib
import signal
import subprocess
import sys

import pytest

from megalith.cli.main import main
from megalith.common.errors import ConfigError
from megalith.launcher.hosts import Host, read_hostfile
from tests.launcher.cluster.scheduler import install
from tests.launcher.cluster.standins import environment


def test_hostfile(tmp_path):
    file = tmp_path / "hosts"
    file.write_text("# nodes\nnode1 slots=4\n\nnode2   slots = 2 # small\nnode3\n")
    assert read_hostfile(file) == [Host("node1", 4), Host("node2", 2), Host("node3", None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name one at least"),
        ("a slots=x\nb gpus=2\n-oProxyCommand=x", "3 problems"),
        ("a slots=0", "must be a host, and its processes"),
        ("a slots=1\na slots=2", "must name another host"),
    ],
)
def test_wrong_hostfiles(text, message, tmp_path):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hostfile(tmp_path / "hosts")
    with pytest.raises(ConfigError, match="must name a readable file"):
        read_hostfile(tmp_path / "gone")


def test_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("hosts").write_text("me@n1 slots=4\nn2 slots=4\n")
    words = [
        "launch",
        "--dry-run",
        "--hostfile",
        "hosts",
        "--max-restarts",
        "2",
        "--env-file",
        "my env",
        "pretrain",
        "gpt",
    ]
    assert main(words) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("ssh -o BatchMode=yes me@n1 ") and second.startswith("ssh -o BatchMode=yes n2 ")
    assert f"{sys.executable} -m megalith launch --nnodes 2 --node-rank 1 --rdzv-endpoint n1:29500" in second
    assert "--nproc-per-node 4" in second and "--max-restarts 2 --stop-with-stdin pretrain gpt" in second
    assert main(["launch", "--nnodes", "2", *words[1:]]) == 2
    assert "the lines of --hostfile are the nodes" in capsys.readouterr().err


def start(tmp_path, code, nodes="a slots=1\nb slots=1\n", port="29811"):
    """A launch over two hosts, whose ssh is a stand-in, of a script that runs as one process on each."""
    (tmp_path / "hosts").write_text(nodes)
    (tmp_path / "s.py").write_text("import os, signal, sys, time\n" + code)
    # As on a node: a launch that runs the script by itself. torchrun would take a minute here, and is another test's.
    launcher = tmp_path / "megalith_node.py"
    launcher.write_text(
        "import pathlib, subprocess, sys\nwords = sys.argv[sys.argv.index('--stop-with-stdin') + 1:]\n"
        "process = subprocess.Popen([sys.executable, *words])\nsys.stdin.read(1)\nprocess.terminate()\n"
        "sys.exit(process.wait())\n"
    )
    main_code = (
        "import pathlib, sys\nfrom megalith.launcher import hosts\n"
        "from megalith.launcher.local import LaunchOptions\n"
        "from megalith.launcher.options import NodeOptions\n"
        "found = hosts.read_hostfile(pathlib.Path('hosts'))\n"
        "commands = hosts.commands(found, NodeOptions(), LaunchOptions(), ['s.py'], pathlib.Path.cwd())\n"
        "commands = [[*each[:-1], each[-1].replace('-m megalith launch', 'megalith_node.py')] for each in commands]\n"
        "sys.exit(hosts.run(found, commands))\n"
    )
    variables = environment() | install(tmp_path, tmp_path / "none")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", main_code], cwd=tmp_path, env=variables, **pipes)


def test_a_signal_lets_all_nodes_save(tmp_path):
    code = "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), sys.exit(0)))\n"
    process = start(tmp_path, code + "os.write(1, b'ready\\n')\ntime.sleep(200)")
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=250)
    assert process.returncode == 0 and out == "saved\nsaved\n" and err == ""
    assert sorted((tmp_path / "state/hosts").read_text().split()) == ["a", "b"]
