"""docs/serving.md: its commands run as typed, against its servers, and its tables are those of the code."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from unittest.mock import MagicMock

import pytest

from megalith.config.flags.text import flag, value_text
from megalith.serving.errors import ServingError
from megalith.serving.metrics import Metrics
from megalith.serving.options import ServeOptions
from tests.test_continue_llama import make_llama
from tests.toy import ROOT, run

DOCS = (ROOT / "docs/serving.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"
SERVER = re.compile(r"^(?=megalith serve |torchrun )", re.MULTILINE)


def rows(heading: str) -> list[list[str]]:
    """The cells of the rows of the table under a heading."""
    section = DOCS.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def test_the_options_are_those_of_the_server():
    listed = {name.strip("`"): (help, default) for name, help, default in rows("Options")}
    for each in dataclasses.fields(ServeOptions):
        help, default = listed.pop(flag(each.name))
        words, told = re.fullmatch(r"(.*?)(?: \(default: (.*)\))?", each.metadata["help"]).groups()
        plain = "none" if each.default in (None, ()) else "off" if each.default is False else value_text(each.default)
        assert (help, default) == (words, told or plain)
    assert not listed


def test_every_status_is_explained():
    classes, statuses = [ServingError], set[int]()
    while classes:
        found = classes.pop()
        statuses.add(found.status)
        classes += found.__subclasses__()
    assert statuses <= {int(status) for status, *_ in rows("Limits, and what each status means")}


def test_the_metrics_are_those_of_the_server():
    metrics = Metrics()
    metrics.watch(MagicMock())
    named = re.findall(r"megalith_[a-z_]+", " ".join(row[0] for row in rows("Watching it")))
    assert {name.removesuffix("_total") for name in named} == {each.name for each in metrics.registry.collect()}


def test_links_lead_somewhere():
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lower()).strip().replace(" ", "-")
                for line in DOCS.splitlines() if line.startswith("## ")}  # fmt: skip
    for path, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", DOCS):
        assert (ROOT / "docs" / path).exists() if path else anchor in headings, (path, anchor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A model with a chat template, and a run's checkpoint."""
    from megalith.workflows import conversion  # imports torch, which the tables do not need

    folder = tmp_path_factory.mktemp("serving")
    make_llama(folder)
    (folder / "llama").rename(folder / "Qwen3-0.6B")
    (folder / "Qwen3-0.6B/chat_template.jinja").write_text(TEMPLATE)
    conversion.convert(folder / "Qwen3-0.6B", folder / "runs/first", to="megalith")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands(folder: pathlib.Path) -> None:
    """Each block with a server runs until the next one; the blocks between them use it."""
    said = list[str]()
    with contextlib.ExitStack() as stack:
        for language, body in BLOCKS:
            if language == "text":
                continue
            if SERVER.search(body):
                stack.close()
                port = stack.enter_context(server(body, folder))
                if body.startswith("torchrun"):  # what would use it is the same as for one process
                    body = re.search(r"^curl http://localhost:5000/v1/completions.*?\}'$", DOCS, re.M | re.S)[0]
                    said.append(run(["bash", "-c", body.replace("5000", port)], folder))
                continue
            body = body.replace("5000", port)
            command = (
                [sys.executable, "-c", body] if language == "python" else ["bash", "-c", f"set -euo pipefail\n{body}"]
            )
            said.append(run(command, folder))
    first, client, chat, secret, split, watched, _ = said
    assert first.count('"object":"text_completion"') > 1 and "data: [DONE]" in first
    assert '"text":["The value of' in first.replace('": ', '":')
    assert client.split()[0]
    assert "chat.completion" in chat and '"object":"list"' in secret.replace('": ', '":')
    assert json.loads(split[split.index("{") :])["usage"]["completion_tokens"] <= 16
    assert "megalith_up 1.0" in watched and '"status":"ok"' in watched.replace('": ', '":')
    assert (folder / "first-hf/config.json").is_file()


@contextlib.contextmanager
def server(block: str, folder: pathlib.Path) -> Iterator[str]:
    """A server as a block starts it, on a free port of loopback, which this gives; ended by SIGTERM, in order."""
    port = free_port()
    block = SERVER.sub("exec ", block.strip().replace("0.0.0.0", "127.0.0.1")) + f" --port {port}"
    paths = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    variables = os.environ | {"PATH": paths, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "server.log", "w+") as log:
        process = subprocess.Popen(
            ["bash", "-c", block], cwd=folder, env=variables, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            said = process.stdout.readline()
            assert port in said, said + (folder / "server.log").read_text()
            yield port
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
        assert status == 0 or block.startswith("exec torchrun"), (folder / "server.log").read_text()


def free_port() -> str:
    """A port of loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])
