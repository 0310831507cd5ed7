"""Signs of life between the processes of a server: a dead or stopped one is found in seconds, whatever the others do.

A collective in which a process is missing fails at once at best, and never ends at worst; an idle server makes none. So
each process but the first counts, once a second and from a thread, in a store (torch's TCPStore) that the first hosts.
The first reads the counts. The others end when the store is gone, for then the first has ended.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megalith.common import environment

INTERVAL = 1.0  # seconds between two signs
# Readings without a new sign after which a process counts as lost. Signs are late on a busy machine, but clients are to
# get their 503 within 10 s. Not seconds: where this process itself was stopped, it has not looked.
SILENCE = 5
FOREVER = datetime.timedelta(days=365)  # a server whose first process is stopped for a while (Ctrl-Z) is not lost
LAST_WORDS = 5.0  # seconds that the first process waits for the others, when all end


class Ranks:
    """The processes of a server. As a context it gives signs on all but the first, which calls `watch` in it."""

    def __init__(self, device: torch.device):
        """Connect all processes; a collective call. device: of this process's collectives."""
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        on_one_machine = environment.local_world_size() in (None, self.size)
        host = "127.0.0.1" if on_one_machine else environment.main_address() or "127.0.0.1"
        options: dict[str, Any] = {"world_size": None, "wait_for_workers": False}
        port = torch.zeros((), dtype=torch.int64, device=device)
        if self.rank == 0:  # of one machine: for nobody else to reach
            listener = socket.create_server((host if on_one_machine else "", 0))
            number = listener.getsockname()[1]
            options |= {"is_master": True, "master_listen_fd": listener.detach()}
            self.store = dist.TCPStore(host, number, **options)
            port += number
        dist.broadcast(port, 0)
        if self.rank:
            self.store = dist.TCPStore(host, int(port), **options)
            self.store.set(f"name {self.rank}", f"process {os.getpid()} on {socket.gethostname()}")
        self.store.set_timeout(FOREVER)
        self.others = range(1, self.size)
        self.counts, self.unread = dict.fromkeys(self.others, 0), dict.fromkeys(self.others, 0)
        self.seen = dict.fromkeys(self.others, time.monotonic())  # when each gave its last sign
        self.done = threading.Event()

    def __enter__(self) -> Ranks:
        if self.rank:
            threading.Thread(target=self._give_signs, name="megalith-ranks", daemon=True).start()
        return self

    def watch(self, on_loss: Callable[[str], None]) -> None:
        """Read the others' signs from now on. on_loss: called once, in another thread, with what `lost` says."""
        threading.Thread(target=self._watch, args=(on_loss,), name="megalith-ranks", daemon=True).start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:  # fmt: skip
        """Say goodbye, or why not; the first process waits for the others, which need its store for that."""
        self.done.set()
        if self.rank:
            with contextlib.suppress(RuntimeError):  # the first may be gone
                if error is not None:
                    self.store.set(f"error {self.rank}", f"{type(error).__name__}: {first_line(error)}")
                self.store.add("ended", 1)
            return
        deadline = time.monotonic() + LAST_WORDS
        while error is None and time.monotonic() < deadline and self.store.add("ended", 0) < len(self.others):
            time.sleep(0.05)

    def lost(self, named: bool = False) -> str | None:
        """What is known of processes that are lost, as a sentence's beginning; None where all live.

        named: with process and machine, which are not for every client to know.
        """
        if silent := self.silent():
            names = [f"rank {rank} of {self.size}" for rank in silent]
            if named:
                names = [f"{name} ({self._read(f'name {rank}')})" for name, rank in zip(names, silent)]
            seconds = SILENCE * INTERVAL
            return f"{' and '.join(names)} gave no sign of life for {seconds:g} s: killed, stopped, or cut off"
        reports = [(rank, text) for rank in self.others if (text := self._read(f"error {rank}")) is not None]
        return "; ".join(f"rank {rank} of {self.size} has failed: {text}" for rank, text in reports) or None

    def silent(self) -> list[int]:
        """The processes that were lost without a word.

        They are the cause where others report errors: contact with them is what these have lost.
        """
        silent = [rank for rank, readings in self.unread.items() if readings >= SILENCE]
        return [rank for rank in silent if self._read(f"error {rank}") is None]

    def all_seen_since(self, moment: float) -> bool:
        """Whether each of the others has given a sign since then (of time.monotonic)."""
        return all(seen > moment for seen in self.seen.values())

    def _read(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _watch(self, on_loss: Callable[[str], None]) -> None:
        reported = False
        while not self.done.wait(INTERVAL):
            for rank in self.others:
                count = self.store.add(f"signs {rank}", 0)
                if count > self.counts[rank]:
                    self.counts[rank], self.unread[rank], self.seen[rank] = count, 0, time.monotonic()
                else:
                    self.unread[rank] += 1
            if not reported and (why := self.lost()) is not None:
                reported = True
                on_loss(why)

    def _give_signs(self) -> None:
        while not self.done.wait(INTERVAL):
            try:
                self.store.add(f"signs {self.rank}", 1)
            except RuntimeError:
                if self.done.is_set():
                    return
                text = f"rank {self.rank} of {self.size}: the first process has ended; this one ends too"
                print(f"megalith: {text}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread may wait in a collective


def first_line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop; torch adds stacks."""
    return str(error).strip().partition("\n")[0].rstrip(".")
