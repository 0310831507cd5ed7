"""The preflight: the nodes of a run compare what they are before any of them waits in a collective.

Node 0 listens where the run will meet; the others send it their facts (facts.py), and all get the verdict. That tries
the name, the port and the network on the way.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megalith.common.errors import ConfigError, problem
from megalith.config.environment import cannot_listen
from megalith.config.flags.text import fail
from megalith.launcher import facts
from megalith.launcher.facts import Wanted

CLOCK = 5.0  # seconds that two clocks may differ; files and logs of nodes that differ more cannot be put in order
RETRY = 0.2  # seconds between two attempts to reach node 0


class Row(NamedTuple):
    """A line of the table: a check, what most nodes have, and what is wrong, which names the node."""

    check: str
    value: str
    wrong: list[str]


def exchange(
    wanted: Wanted, number: int, count: int, meeting: tuple[str, int], timeout: float
) -> tuple[list[Row], list[str]]:
    """The table and what is wrong, the same on all nodes. number: of this node among `count`.

    Raises ConfigError where the nodes do not find each other within `timeout` seconds.
    """
    if number == 0:
        return _as_first(wanted, count, meeting, timeout)
    try:
        with _reach(meeting, timeout) as connection, connection.makefile("rw", encoding="utf-8") as stream:
            connection.settimeout(2 * timeout)  # node 0 may have come later, and waits for the last node
            token = json.loads(stream.readline())["token"]
            _send(stream, facts.gather(wanted, number, meeting[0], token))
            verdict = json.loads(stream.readline())
            return [Row(*row) for row in verdict["rows"]], verdict["wrong"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found, rule = "{}:{}".format(*meeting), f"must answer with what the nodes are ({error or 'no answer'})"
        cure = "Read what node 0 says, and see that nothing else listens at --rdzv-endpoint"
        raise ConfigError(problem("The preflight of node 0", found, rule, cure)) from error


def _send(stream: Any, content: Mapping[str, Any]) -> None:
    stream.write(json.dumps(content) + "\n")
    stream.flush()


def _reach(meeting: tuple[str, int], timeout: float) -> socket.socket:
    deadline, why = time.monotonic() + timeout, "no answer"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(meeting, timeout=max(1.0, deadline - time.monotonic()))
            return connection
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(RETRY)
    found, rule = "{}:{}".format(*meeting), f"must be reached from {socket.gethostname()} within {timeout:g} s ({why})"
    cure = "Start node 0 too, correct --rdzv-endpoint, or open the port in the firewall"
    raise ConfigError(problem("Node 0", found, rule, cure))


def _as_first(
    wanted: Wanted, count: int, meeting: tuple[str, int], timeout: float
) -> tuple[list[Row], list[str]]:  # fmt: skip
    token, port = os.urandom(8).hex(), meeting[1]
    if reason := cannot_listen(port):
        rule = f"must be a port at which node 0 can listen ({reason})"
        raise ConfigError(problem("The port of --rdzv-endpoint", port, rule, "Give another one to all nodes"))
    probes = [facts.nearest_folder(path) / f"{facts.PROBE}{token}" for path in wanted.folders]
    for probe in probes:
        with contextlib.suppress(OSError):  # `writable` says why
            probe.write_bytes(b"x")
    try:
        with contextlib.ExitStack() as open_streams:
            streams, reports = [], [facts.gather(wanted, 0, meeting[0], token) | {"late": 0.0}]
            answers = queue.SimpleQueue[tuple[Any, dict[str, Any]]]()
            with socket.create_server(("", port), backlog=max(count, 16)) as server:
                deadline = time.monotonic() + timeout
                server.settimeout(RETRY)
                while len(reports) < count and time.monotonic() < deadline:
                    with contextlib.suppress(TimeoutError):
                        connection, _ = server.accept()
                        connection.settimeout(max(1.0, deadline - time.monotonic()))
                        open_streams.callback(_end, connection)
                        # In a thread, so that neither a slow node nor a silent program keeps the others waiting.
                        threading.Thread(target=_receive, args=(connection, token, answers), daemon=True).start()
                    while not answers.empty():
                        stream, report = answers.get()
                        open_streams.callback(stream.close)
                        streams.append(stream)
                        reports.append(report)
            # The port is free again when the others learn the verdict: torchrun listens there next.
            rows = list(compare(reports, wanted, count))
            wrong = [text for row in rows for text in row.wrong]
            for stream in streams:
                with contextlib.suppress(OSError):
                    _send(stream, {"rows": rows, "wrong": wrong})
        return rows, wrong
    finally:
        for probe in probes:
            with contextlib.suppress(OSError):
                probe.unlink()


def _receive(connection: socket.socket, token: str, answers: queue.SimpleQueue[tuple[Any, dict[str, Any]]]) -> None:
    stream = connection.makefile("rw", encoding="utf-8")
    if (report := _report(stream, token)) is not None:
        answers.put((stream, report))


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # close alone would leave a thread waiting that reads
    connection.close()


def _report(stream: Any, token: str) -> dict[str, Any] | None:
    """The facts of a node that has connected, and how far its clock is behind; None for anything else at the port."""
    try:
        _send(stream, {"token": token})
        report = json.loads(stream.readline())
        return report | {"late": facts.now() - report["clock"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _at(*keys: str) -> Callable[[Mapping[str, Any]], Any]:
    """What a report has under these keys, each below the one before."""
    return lambda report: functools.reduce(lambda found, key: found.get(key), keys, report)


def compare(reports: Sequence[Mapping[str, Any]], wanted: Wanted, count: int) -> Iterator[Row]:
    """The rows of the table. wanted: of node 0. count: nodes that there should be."""
    names = [f"{report['host']} (node {report['number']})" for report in reports]

    def differing(value: Callable[[Mapping[str, Any]], Any], what: str) -> tuple[Any, list[str]]:
        """(what most nodes have, a line for each other); of equally many, what node 0 has."""
        values = [value(report) for report in reports]
        texts = [json.dumps(each, sort_keys=True) for each in values]
        usual = max(collections.Counter(texts).items(), key=lambda item: (item[1], item[0] == texts[0]))[0]
        lines = [
            f"{what} on {name} is {values[at]}, and {json.loads(usual)} on others"
            for at, name in enumerate(names)
            if texts[at] != usual
        ]
        return json.loads(usual), lines

    def of_paths(key: str, is_wrong: Callable[[Any], str | None]) -> list[str]:
        return [
            f"{path} on {name} {text}"
            for name, report in zip(names, reports)
            for path, value in report[key].items()
            if (text := is_wrong(value)) is not None
        ]

    ranks = collections.Counter(report["number"] for report in reports)
    missing = [str(number) for number in range(count) if number not in ranks]
    wrong = [
        f"node {number} came {times} times: each has its own --node-rank"
        for number, times in ranks.items()
        if times > 1
    ]
    if missing:
        wrong.append(f"{len(reports)} of {count} nodes came ({', '.join(names)}); missing: {', '.join(missing)}")
    _, other_nodes = differing(_at("nodes"), "--nnodes")
    yield Row("nodes", f"{len(reports)} of {count}", [*wrong, *other_nodes])
    processes, lines = differing(_at("processes"), "the number of processes")
    world = sum(report["processes"] for report in reports)
    yield Row("processes", f"{processes} on each, {world} together", lines)
    words, lines = differing(_at("words"), "the command")
    yield Row("command", " ".join(words[:3]) + (" ..." if len(words) > 3 else ""), lines)
    shown = []
    lines = []
    for name in sorted({name for report in reports for name in report["versions"]}):
        usual, more = differing(_at("versions", name), f"the version of {name}")
        shown.append(f"{name} {usual}")
        lines += more
    yield Row("versions", ", ".join(shown), lines)
    for key in ("prefix", "packages"):
        what = "the Python environment" if key == "prefix" else "the list of installed packages (a fingerprint)"
        usual, lines = differing(_at("environment", key), what)
        yield Row("environment" if key == "prefix" else "packages", str(usual), lines)
    usual, lines = differing(_at("devices"), "devices: what")
    yield Row("devices", usual, lines)
    least = min(report["memory"] for report in reports)
    most = max(report["memory"] for report in reports)
    short = [
        f"memory on {name}: {report['memory'] / 2**30:.1f} GiB are free, "
        f"less than half of the {most / 2**30:.1f} elsewhere"
        for name, report in zip(names, reports)
        if 2 * report["memory"] < most
    ]
    yield Row("memory", f"at least {least / 2**30:.1f} GiB free", short)
    late = [
        f"the clock of {name} is {abs(report['late']):.0f} s {'behind' if report['late'] > 0 else 'ahead of'} node 0's"
        for name, report in zip(names, reports)
        if abs(report["late"]) > CLOCK
    ]
    yield Row("clock", f"within {max(abs(report['late']) for report in reports):.1f} s", late)
    lost = [
        f"{name} cannot resolve the name of node 0: {report['names']}"
        for name, report in zip(names, reports)
        if report["names"]
    ]
    yield Row("names", "node 0 is resolved", lost)
    lines = of_paths("folders", lambda why: None if why is None else f"cannot be written: {why}")
    lines += of_paths("same", lambda seen: None if seen else "is not the folder that node 0 has there")
    yield Row("folders", ", ".join(wanted.folders) or "none", lines)
    lines = of_paths("files", lambda size: "is missing" if size is None else None)
    for path in wanted.files:
        if all(report["files"].get(path) is not None for report in reports):
            lines += differing(_at("files", path), f"the size of {path} in bytes")[1]
    yield Row("files", f"{len(wanted.files)} files", lines)


def table(rows: Sequence[Row]) -> str:
    """The table as text; what is wrong stands below its check."""
    width = max(len(row.check) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"  {row.check:{width}}  {'WRONG' if row.wrong else 'ok':5}  {row.value}")
        lines += [f"  {'':{width}}         {text}" for text in row.wrong]
    return "\n".join(lines)


def check(wrong: Sequence[str]) -> None:
    """Raise ConfigError where something is wrong."""
    fail(f"preflight: {text}. Mend it, or add --preflight never." for text in wrong)
