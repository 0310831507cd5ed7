"""A model that several processes hold together, called like one that is whole.

Every process runs the same engine on the same requests, so that inputs need not be sent. Hidden states go from pipeline
stage to pipeline stage; what is computed from logits, above all the tokens drawn, goes from the last stage to the
others. Along the tensor-parallel axis nothing is sent besides the model's own collectives: `ParallelLMHead` gathers the
logits, so that all of its ranks hold the same bits and draw the same from them.
"""

from __future__ import annotations

import functools
import math
import random
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalith.common import errors
from megalith.common.errors import ConfigError, MegalithError, problem
from megalith.config.flags.text import Words
from megalith.generation.cache import KVCache
from megalith.generation.model import TextModel
from megalith.generation.retrieval.runner import RetrievalRunner, Retrieving
from megalith.generation.retrieval.texts import warn_without_retriever
from megalith.generation.runner import ModelRunner
from megalith.runtime.build import Mesh, Runtime


def cache_of(model: TextModel, rows: int, length: int, source_length: int = 0) -> KVCache:
    """A cache of this process's stages and key/value heads; see KVCache."""
    runtime = model.runtime
    if runtime is None:
        return KVCache(model.model, rows, length, source_length)
    heads = max(1, model.config.num_kv_heads // runtime.mesh.size("tp"))  # fewer heads than ranks are replicated
    stages = [stage.model for stage in runtime.stages]
    return KVCache(stages, rows, length, source_length, heads, runtime.stages[0].compute_dtype)


def bytes_per_row(model: TextModel, length: int, source_length: int = 0) -> int:
    """Memory of one row of such a cache, on the process that needs the most; every process of a model calls it."""
    number = cache_of(model, 0, length, source_length).bytes_per_row
    return number if model.runtime is None else model.runtime.mesh.maximum(number, "pp")


def runner_of(
    model: TextModel, rows: int, length: int, source_length: int = 0, *, batch_invariant: bool = True,
    compile: bool = False,
) -> ModelRunner:  # fmt: skip
    """The runner of a model, with a cache: see KVCache and ModelRunner. Every process of a model makes one."""
    runtime, cache = model.runtime, cache_of(model, rows, length, source_length)
    warn_without_retriever(model, "writes")
    if model.retriever is not None:
        if compile:
            rule = "must be left out with a retriever, whose chunks change the shapes of a step"
            raise ConfigError(problem("--compile", True, rule, "Leave it out"))
        if runtime is None:
            return RetrievalRunner(model.model, cache, model.retriever, [model.model])
        stages = [stage.model for stage in runtime.stages]
        return ParallelRetrievalRunner(runtime, cache, model.retriever, stages)
    if runtime is None:
        return ModelRunner(model.model, cache, batch_invariant=batch_invariant, compile=compile)
    return ParallelRunner(runtime, cache, batch_invariant=batch_invariant, compile=compile)


class ParallelRunner(ModelRunner):
    """A ModelRunner of a Runtime, on each process of its model-parallel group."""

    def __init__(self, runtime: Runtime, cache: KVCache, *, batch_invariant: bool = True, compile: bool = False):
        super().__init__(runtime.stages[0].model, cache, batch_invariant=batch_invariant, compile=compile)
        self.runtime, self.run = runtime, self._decode
        # Compiled stage by stage: what is sent between stages would break the graph.
        self.models: list[Callable] | None = None
        if compile:
            tensor_parallel = runtime.mesh.size("tp") > 1
            self.models = [self.compiled(stage.model, collectives=tensor_parallel) for stage in runtime.stages]
        self.seeds = Seeds(runtime.mesh, ("tp", "pp"))

    def forward(self, inputs: Tensor | None, **arguments) -> Tensor | None:
        """Run this process's stages, and return logits [b, n, V] where the last one is, None elsewhere."""
        if self.model.training:
            rule = "must be in evaluation mode to generate text"
            cure = "Generate inside `with model.evaluating():`, as `complete` and its like do"
            raise ConfigError(problem("The model", Words("training mode"), rule, cure))
        models = self.models if arguments["cache"] is self.decoding else None
        return self.runtime.forward(inputs, models, **arguments)

    def broadcast(self, compute: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """See ModelRunner. An error of `compute` is raised on all processes.

        One collective along the pipeline, and none without one.
        """
        runtime = self.runtime
        if runtime.pipeline is None:
            return compute()
        message, text = torch.zeros(1 + math.prod(shape), dtype=torch.float64, device=self.cache.device), b""
        if runtime.has_last_stage:
            try:
                message[1:] = compute().flatten()
            except Exception as error:  # the others wait, also where it is a bug
                text = as_text(error).encode()
                message[0] = len(text)
        message = runtime.from_last_stage(message).cpu()
        if length := int(message[0]):
            data = torch.frombuffer(bytearray(text or bytes(length)), dtype=torch.uint8).to(self.cache.device)
            raise as_error(runtime.from_last_stage(data).cpu().numpy().tobytes().decode())
        return message[1:].view(shape)

    def weights_version(self) -> tuple:
        """See ModelRunner."""
        return (self.runtime.weights_version,)

    def draw_seed(self) -> int:
        """A seed at random, the same on all processes of a model."""
        return self.seeds.draw()


class ParallelRetrievalRunner(Retrieving, ParallelRunner):
    """A ParallelRunner that retrieves."""


class Seeds:
    """Seeds at random, the same on all processes along some axes of a mesh, which draw them in the same order."""

    def __init__(self, mesh: Mesh, axes: Sequence[str]):
        self.mesh, self.axes = mesh, axes

    @functools.cached_property
    def generator(self) -> random.Random:
        """Seeded by the first process; the first draw is a collective call."""
        first = torch.tensor(secrets.randbits(63), device=self.mesh.device)
        for axis in self.axes:
            self.mesh.broadcast(first, axis, 0)
        return random.Random(int(first))

    def draw(self) -> int:
        """The next seed."""
        return self.generator.getrandbits(63)


def as_text(error: Exception) -> str:
    """An error for other processes; see as_error."""
    return f"{type(error).__name__}\n{error}"


def as_error(text: str) -> Exception:
    """The error of another process, from the name of its class and, after a line break, its message."""
    name, _, message = text.partition("\n")
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MegalithError):
        return kind(message)
    return RuntimeError(f"{name}: {message}")
