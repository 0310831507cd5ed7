"""The preflight of `megalith launch`: what a run needs of its nodes, their comparison, and an all-reduce over all."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence

from megalith import recipes
from megalith.common.errors import ConfigError, problem
from megalith.config.flags import verbs
from megalith.config.flags.loading import resolve
from megalith.config.flags.text import Words
from megalith.launcher import preflight, processes
from megalith.launcher.facts import Wanted
from megalith.launcher.local import LaunchOptions
from megalith.launcher.processes import Plan
from megalith.workflows import dry_run, run_config

ALL_REDUCE_TIMEOUT = 180.0  # seconds in which the processes import torch, meet and measure
MODULE = "megalith.runtime.all_reduce"


def wanted(plan: Plan, words: Sequence[str]) -> Wanted:
    """What the verb needs of every node; a run that trains is checked for its number of processes too.

    Raises ConfigError with every problem of the config.
    """
    count = plan.task.size if plan.task else plan.nodes[1]
    each = 1 if plan.task else plan.processes
    if words[0] not in verbs.READERS:
        return Wanted(words=words, processes=each, nodes=count)
    config, _ = resolve(
        verbs.READERS[words[0]](words[1:]), read_recipe=recipes.text, read_checkpoint=run_config.checkpoint_config,
        read_tokenizer=run_config.checkpoint_tokenizer, world_size=plan.world_size,
    )  # fmt: skip
    return Wanted(
        folders=dry_run.written_folders(config), files=dry_run.named_files(config), words=words, processes=each,
        nodes=count,
    )  # fmt: skip


def run(
    plan: Plan, launch: LaunchOptions, words: Sequence[str], added: Mapping[str, str], timeout: float, on_cpu: bool,
    show: Callable[[str], None],
) -> None:  # fmt: skip
    """Compare the nodes, print the table on node 0, and measure an all-reduce.

    Raises ConfigError where a node differs.
    """
    number, count = (plan.task.rank, plan.task.size) if plan.task else (plan.node_rank or 0, plan.nodes[1])
    host, port = plan.meeting or ("127.0.0.1", _free_port())
    rows, wrong = preflight.exchange(wanted(plan, words), number, count, (host, port), timeout)
    if number == 0:
        show(f"preflight of {count} {'processes' if plan.task else f'node{chr(115) * (count > 1)}'}")
        show(preflight.table(rows))
    preflight.check(wrong)
    if plan.world_size > 1:
        _all_reduce(plan, launch, added, (host, port + 1), on_cpu)


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def _all_reduce(
    plan: Plan, launch: LaunchOptions, added: Mapping[str, str], meeting: tuple[str, int], on_cpu: bool
) -> None:  # fmt: skip
    """One, over the processes that the run will have. It meets at the next port: the last node leaves late."""
    words = [sys.executable, "-m", MODULE, *(["--device", "cpu"] if on_cpu else [])]
    plan = dataclasses.replace(plan, meeting=meeting)
    if plan.task:
        added = {**added, **processes.variables_of_task(plan)}
    with tempfile.TemporaryDirectory(prefix="megalith-preflight-") as folder:
        quiet = LaunchOptions(**{**vars(launch), "max_restarts": None, "log_dir": None, "tee": None})
        command = words if plan.task else processes.torchrun(plan, quiet, words, "preflight", folder)
        try:
            done = subprocess.run(command, env=os.environ | added, timeout=ALL_REDUCE_TIMEOUT, check=False)
            why = f"status {done.returncode}; its messages are above" if done.returncode else ""
        except subprocess.TimeoutExpired:
            why = f"no end within {ALL_REDUCE_TIMEOUT:g} s"
    if why:
        cure = "Mend the network or the collective library, or add --preflight never"
        raise ConfigError(problem("preflight: an all-reduce over all processes", Words(why), "must give the sum", cure))
