"""Asynchronous saving: the tensors are copied at once, and their files are written while training continues."""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import dcp as store
from megalith.checkpoint.store.saving import SaveRequest, State, merge_stages, write


class Saver:
    """Saves in a background thread, one checkpoint at a time.

        saver = Saver("checkpoints")
        saver.save(100, state, train_state=..., config_yaml=...)     # returns when the tensors are copied
        saver.wait()                                                 # returns when the files are durable

    It costs a copy of this rank's tensors in CPU memory (pinned beside an accelerator), allocated at the first save and
    reused. The thread has its own gloo group, so it meets neither the training's collectives nor their stream. An
    error of a save is raised by the next `save`, `wait` or `close`. `latest` moves only when everything is durable.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int = 3,
        keep_every: int | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        """All ranks of `group` create one together. The arguments are those of `save`."""
        self.folder, self.keep_last, self.keep_every = pathlib.Path(folder), keep_last, keep_every
        self.ranks = Ranks(group, new_group=True)
        self.thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.running: concurrent.futures.Future[pathlib.Path] | None = None
        self.buffers: dict[str, Tensor] = {}

    def save(
        self,
        iteration: int,
        state: State,
        *,
        train_state: Mapping[str, Any],
        config_yaml: str,
        files: Mapping[str, str | os.PathLike] | None = None,
    ) -> None:
        """Copy the tensors of `state` and write them in the background; waits for the previous save first.

        See saving.save.
        """
        self.wait()
        request = SaveRequest(
            self.folder, iteration, dict(train_state), config_yaml, files or {}, self.keep_last, self.keep_every
        )
        merged = merge_stages(state)
        parts = self._stage(merged)
        layout = {name: tensor.detach() for name, tensor in merged.items()}
        self.running = self.thread.submit(write, request, layout, parts, self.ranks)

    def wait(self) -> pathlib.Path | None:
        """Wait for the save that is running and return its path (None if there is none); raises what it raised."""
        running, self.running = self.running, None
        return running.result() if running else None

    def close(self) -> None:
        """Wait, end the thread, give the memory back."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()
            self.buffers.clear()

    def __enter__(self) -> Saver:
        """`with Saver(...) as saver:` closes it at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """See `close`."""
        self.close()

    def _stage(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU, complete when this returns."""
        parts, pinned = {}, torch.accelerator.is_available()
        for name, tensor in state.items():
            part, buffer = store.local(tensor), self.buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                buffer = torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=pinned)
            parts[name] = buffer.copy_(part, non_blocking=True)
        if pinned:
            torch.accelerator.synchronize()
        self.buffers = parts
        return parts
