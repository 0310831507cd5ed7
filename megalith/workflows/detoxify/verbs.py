"""The other verbs of the command, as `megalith detoxify` calls them."""

from __future__ import annotations

import functools
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence

from megalith.common.errors import MegalithError
from megalith.common.orphans import end_with_parent

Main = Callable[[Sequence[str]], int]  # words -> exit status: megalith.cli.main.main
ALONE = ("data",)  # verbs that start their own workers
INTERRUPTED = 130


class Verbs:
    """Prints a command as one would type it, and runs it: in this process, or in several by torchrun."""

    def __init__(self, main: Main, processes: int = 1):
        self.main, self.processes = main, processes

    def __call__(self, *words: object) -> None:
        """Raises MegalithError where the command fails, KeyboardInterrupt where it was interrupted."""
        typed = list(map(str, words))
        several = self.processes > 1 and typed[0] not in ALONE
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(self.processes), "-m"] if several else []
        print("$ " + shlex.join([*launcher, "megalith", *typed]), flush=True)
        if several:
            command = [sys.executable, "-m", "torch.distributed.run", *launcher[1:], "megalith", *typed]
            ends = functools.partial(end_with_parent, signal.SIGTERM)
            status = subprocess.run(command, preexec_fn=ends).returncode
        else:
            status = self.main(typed)
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            raise MegalithError(
                f"The command above ended with status {status}, and its message says why. "
                f"Cure that, and give the same command again: what was finished is kept."
            )
