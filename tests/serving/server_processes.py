"""`megalith serve` in processes of their own: one, or several of a torchrun."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from megalith import checkpoint
from megalith.config.flags.loading import to_yaml
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.runtime.state import weights
from tests.generation.parallel.layouts import config_of, model_of
from tests.serving.plain_http import call

REPOSITORY = pathlib.Path(__file__).parents[2]
TEXT = {"prompts": ["Once upon", "Z"], "tokens_to_generate": 8, "top_k": 1, "stop_at_eod": False}
LONG = {**TEXT, "tokens_to_generate": 30_000}  # minutes


def saved(tokenizer: Tokenizer, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint of a model without a longest text, whose heads two ranks can share."""
    config = config_of("alibi").replace(vocab_size=tokenizer.vocab_size)
    tokenizer.save(folder / "tokenizer")
    files = {f"tokenizer/{path.name}": path for path in (folder / "tokenizer").iterdir()}
    tensors = weights(model_of(config).model)
    checkpoint.save(folder / "run", 10, tensors, train_state={}, config_yaml=to_yaml(config), files=files)
    return folder / "run"


class Server:
    """A server, of one process or of those of a torchrun. url: where it answers. log: a file of what it says."""

    def __init__(self, process: subprocess.Popen, log: pathlib.Path):
        self.process, self.log, self.url = process, log, ""

    def await_url(self) -> None:
        """Wait until it answers."""
        timer = threading.Timer(120, self.process.kill)
        timer.start()
        self.url = self.process.stdout.readline().strip()
        timer.cancel()
        assert self.url.startswith("http://127.0.0.1:"), self.said()

    def said(self) -> str:
        """What it has printed on stderr."""
        return self.log.read_text()

    def put(self, body: dict[str, Any] = TEXT) -> tuple[int, Any, dict[str, Any]]:
        """Status, headers and body of an answer of PUT /api."""
        status, headers, answer = call(self.url, "PUT", "/api", body)
        return status, headers, json.loads(answer)

    def start(self, body: dict[str, Any]) -> "Pending":
        """A request that is being answered."""
        return Pending(self, body)

    def ranks(self) -> dict[int, int]:
        """The living processes of a torchrun: rank -> process."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
                rank = re.search(rb"\0RANK=(\d+)", (folder / "environ").read_bytes())
                if int(parent) == self.process.pid and state != "Z" and rank is not None:
                    found[int(rank[1])] = int(folder.name)
        return found

    def wait(self, seconds: float) -> int:
        """The exit status."""
        return self.process.wait(seconds)


class Pending(threading.Thread):
    """A request in a thread: what it got, and when."""

    def __init__(self, server: Server, body: dict[str, Any]):
        super().__init__(daemon=True)
        self.server, self.body, self.status, self.answer, self.ended = server, body, None, None, 0.0
        self.start()
        end = time.monotonic() + 20
        while json.loads(call(server.url, "GET", "/health")[2])["running"] == 0:
            assert time.monotonic() < end and self.is_alive(), (self.status, self.answer)
            time.sleep(0.02)

    def run(self) -> None:
        with contextlib.suppress(ConnectionError):  # status stays None
            self.status, _, self.answer = self.server.put(self.body)
        self.ended = time.monotonic()


@contextlib.contextmanager
def server(folder: pathlib.Path, log: pathlib.Path, *flags: str, ranks: int = 1, before: str = "") -> Iterator[Server]:
    """A server of a folder. before: Python that its process runs first."""
    start = f"import sys\n{before}\nfrom megalith.cli.main import main\nsys.exit(main())\n"
    script = log.parent / "serve.py"
    script.write_text(start)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    words = [str(script), "serve", str(folder), "--port=0", "--device=cpu", "--max-length=40000", *flags]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "lo"}
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [*launcher, *words], env=variables, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
    started = Server(process, log)
    try:
        started.await_url()
        yield started
    finally:
        for each in (*started.ranks().values(), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        process.wait()
        process.stdout.close()
