"""The preflight names the node that differs: each mistake is made on one of two nodes, which talk over a socket."""

import concurrent.futures
import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from megalith.common.errors import ConfigError
from megalith.launcher import facts, preflight
from megalith.launcher.facts import Wanted
from tests.launcher.cluster.standins import environment
from tests.tiny import write_corpus


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def compare(monkeypatch, tmp_path):
    """`compare(wanted, {fact: value of node 1})`: the table and what is wrong, as both nodes are told."""
    gather = facts.gather

    def two(wanted, changes=lambda report: {}, number=1, others=None):
        def changed(wanted, number, host, token):
            report = gather(wanted, number, host, token)
            return (
                report
                | {"host": f"n{number}"}
                | (changes(report) if threading.current_thread().name != "first" else {})
            )

        monkeypatch.setattr(facts, "gather", changed)
        meeting = ("127.0.0.1", free_port())
        answers = {}

        def run(name, wanted, number):
            threading.current_thread().name = name
            answers[name] = preflight.exchange(wanted, number, 2, meeting, 20)

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            started = [pool.submit(run, "first", wanted, 0), pool.submit(run, "second", others or wanted, number)]
            for each in started:
                each.result(60)
        assert answers["first"][1] == answers["second"][1]
        return answers["first"]

    return two


@pytest.fixture
def wanted(tmp_path):
    (tmp_path / "data.bin").write_bytes(b"12345")
    return Wanted(
        folders=[str(tmp_path / "runs" / "new")], files=[str(tmp_path / "data.bin")], words=["pretrain", "gpt"],
        processes=2, nodes=2,
    )  # fmt: skip


def test_equal_nodes(compare, wanted, tmp_path):
    rows, wrong = compare(wanted)
    assert wrong == [] and {row.check for row in rows} == {
        "nodes", "processes", "command", "versions", "environment", "packages", "devices", "memory", "clock", "names",
        "folders", "files",
    }  # fmt: skip
    text = preflight.table(rows)
    assert "WRONG" not in text and "2 on each, 4 together" in text and "torch 2." in text
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]  # no probe is left
    preflight.check(wrong)


MISTAKES = {  # what is another on node 1 -> (its changed facts, what the message says)
    "torch": (
        lambda report: {"versions": report["versions"] | {"torch": "2.11.0"}},
        r"the version of torch on n1 \(node 1\) is 2.11.0, and 2\.\d",
    ),
    "a package": (lambda report: {"environment": report["environment"] | {"packages": "0"}}, "installed packages.*n1"),
    "another venv": (
        lambda report: {"environment": report["environment"] | {"prefix": "/v"}},
        "environment on n1.* is /v",
    ),
    "a clock": (lambda report: {"clock": report["clock"] - 3600}, "the clock of n1 .* is 3600 s behind node 0's"),
    "a clock ahead": (lambda report: {"clock": report["clock"] + 3600}, "the clock of n1 .* is 3[56].. s ahead of"),
    "devices": (lambda report: {"devices": "7 x H200"}, "devices: what on n1 .* is 7 x H200, and none on others"),
    "memory": (lambda report: {"memory": 2**20}, "memory on n1 .*: 0.0 GiB are free"),
    "a name": (lambda report: {"names": "unknown host"}, "n1 .* cannot resolve the name of node 0: unknown host"),
    "a file": (
        lambda report: {"files": dict.fromkeys(report["files"])},
        r"data.bin on n1 \(node 1\) is missing",
    ),
    "another file": (
        lambda report: {"files": dict.fromkeys(report["files"], 7)},
        "size of .*data.bin in bytes on n1 .* is 7",
    ),
    "no right": (
        lambda report: {"folders": dict.fromkeys(report["folders"], "Permission denied")},
        "new on n1 .* cannot be written: Permission denied",
    ),
    "another folder": (lambda report: {"same": dict.fromkeys(report["same"], False)}, "new on n1 .* is not the folder"),
    "processes": (lambda report: {"processes": 1}, "the number of processes on n1 .* is 1, and 2 on others"),
    "nodes": (lambda report: {"nodes": 3}, "--nnodes on n1 .* is 3, and 2 on others"),
    "the command": (lambda report: {"words": ["pretrain", "t5"]}, "the command on n1 .* is .*'t5'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_named(mistake, compare, wanted):
    changes, message = MISTAKES[mistake]
    rows, wrong = compare(wanted, changes)
    with pytest.raises(ConfigError, match=message):
        preflight.check(wrong)
    assert preflight.table(rows).count("WRONG") == 1 == len(wrong)


def test_real_paths(compare, tmp_path):
    """Not injected: node 1 looks at a file that is not there, and at a folder below a file."""
    for name in ("there", "file"):
        (tmp_path / name).touch()
    first = Wanted(folders=[str(tmp_path)], files=[str(tmp_path / "there")], nodes=2)
    second = Wanted(folders=[str(tmp_path / "file" / "below")], files=[str(tmp_path / "gone")], nodes=2)
    _, wrong = compare(first, others=second)
    text = "\n".join(wrong)
    assert "gone on n1 (node 1) is missing" in text and "file/below on n1 (node 1) cannot be written: Not a dir" in text


def test_two_nodes_of_one_number(wanted):
    reports = [facts.gather(wanted, 0, "127.0.0.1", "x") | {"late": 0.0, "same": {}} for _ in range(2)]
    wrong = [text for row in preflight.compare(reports, wanted, 2) for text in row.wrong]
    assert any("node 0 came 2 times" in text for text in wrong) and any("missing: 1" in text for text in wrong)


def test_a_node_that_does_not_come(wanted):
    _, wrong = preflight.exchange(wanted, 0, 2, ("127.0.0.1", free_port()), 1.0)
    assert "1 of 2 nodes came" in wrong[0] and "missing: 1" in wrong[0]


def test_node_0_that_is_not_there(wanted):
    with pytest.raises(ConfigError, match=r"Node 0 must be reached from .* within 1 s \(Connection refused\)"):
        preflight.exchange(wanted, 1, 2, ("127.0.0.1", free_port()), 1.0)


def test_a_port_in_use(wanted):
    with (
        socket.create_server(("", 0)) as other,
        pytest.raises(ConfigError, match="another process of this machine listens"),
    ):
        preflight.exchange(wanted, 0, 2, ("127.0.0.1", other.getsockname()[1]), 1.0)


def test_what_is_no_node_at_the_port_is_passed_over(wanted):
    meeting = ("127.0.0.1", free_port())
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(preflight.exchange, wanted, 0, 2, meeting, 10)
        while True:
            try:
                with socket.create_connection(meeting) as scanner:
                    scanner.sendall(b"GET / HTTP/1.0\r\n\r\n")
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        preflight.exchange(wanted, 1, 2, meeting, 10)
        assert first.result(20)[1] == []


def test_another_program_that_is_silent_keeps_nobody_waiting(wanted):
    meeting = ("127.0.0.1", free_port())
    with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as others:
        first = pool.submit(preflight.exchange, wanted, 0, 2, meeting, 100)
        while True:
            try:
                others.enter_context(socket.create_connection(meeting))
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        preflight.exchange(wanted, 1, 2, meeting, 100)
        assert first.result(20)[1] == []


def test_something_else_where_node_0_should_be(wanted):
    with socket.create_server(("127.0.0.1", 0)) as other, concurrent.futures.ThreadPoolExecutor(1) as pool:
        node = pool.submit(preflight.exchange, wanted, 1, 2, other.getsockname(), 5.0)
        connection, _ = other.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
        with pytest.raises(ConfigError, match=r"must answer with what the nodes are .* nothing else listens"):
            node.result(30)


CLOCK = (
    "import sys, time\nfrom megalith.launcher import facts\nfacts.now = lambda: time.time() + 3600\n"
    "from megalith.cli.main import main\nsys.exit(main(sys.argv[1:]))"
)


def preflights(folder, *words, second=("-m", "megalith"), nodes=2):
    """`megalith launch --preflight only` on node 0 and node 1 with these words; statuses and what they print."""
    port = free_port()
    started = []
    for number, start in ((0, ("-m", "megalith")), (1, second))[:nodes]:
        words_of_node = ["launch", "--nnodes", "2", "--node-rank", str(number), "--rdzv-endpoint", f"127.0.0.1:{port}"]
        words_of_node += ["--nproc-per-node", "1", "--preflight", "only", "--preflight-timeout", "60", *words]
        started.append(
            subprocess.Popen(
                [sys.executable, *start, *words_of_node],
                cwd=folder,
                env=environment(),
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return [(process.communicate(timeout=300), process.returncode) for process in started]


def test_a_clock_an_hour_off_among_two_commands(tmp_path):
    prefix = write_corpus(str(tmp_path / "tiny"))
    words = ["pretrain", "gpt", "--recipe", "cpu-tiny", "--data-path", prefix, "--tokenizer-type", "NullTokenizer"]
    words += ["--vocab-size", "50"]
    for (out, err), status in preflights(tmp_path, *words, second=("-c", CLOCK)):
        assert status == 2 and "s ahead of node 0's. Mend it" in err, out + err


def test_a_wrong_world_size(tmp_path):
    words = ["pretrain", "gpt", "--recipe", "cpu-tiny", "--tensor-model-parallel-size", "4", "--data-path", "a"]
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "50"]
    for (_, err), status in preflights(tmp_path, *words, nodes=1):
        assert status == 2 and "The number of processes must be a multiple of tensor 4" in err


@pytest.mark.slow
def test_equal_nodes_and_their_all_reduce(tmp_path):
    began = time.monotonic()
    prefix = write_corpus(str(tmp_path / "tiny"))
    words = ["pretrain", "gpt", "--recipe", "cpu-tiny", "--data-path", prefix, "--tokenizer-type", "NullTokenizer"]
    ((out, err), status), ((_, other), second) = preflights(tmp_path, *words, "--vocab-size", "50")
    assert (status, second) == (0, 0), err + other
    assert "WRONG" not in out, out
    assert "preflight of 2 nodes" in out and "all-reduce over 2 processes (gloo): " in out, out
    print(f"preflight: {time.monotonic() - began:.1f} s")
