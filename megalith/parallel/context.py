"""Context parallelism: each process holds a part of every sequence, and gathers the keys and values of the others.

A sequence is cut into 2c chunks, of which process r of c holds r and 2c-1-r: the early one sees few keys, the late one many, and
their sum is the same on every process (Dubey et al., 2024, arXiv 2407.21783, section 3.3.2). As a process has all keys up to its
queries, attention of each chunk is one causal call, and no softmax has to be put together from parts.
Where attention is not causal, as in encoders, every chunk sees all keys and the two are one call; but with a bias by distance,
which differs between the chunks. A decoder's cross attention is such a call too, to the gathered keys of the encoder's output.
Price: each layer gathers keys and values [b, s, m, 2d] of the whole sequence, which are few where many heads share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.parallel.collectives import Axis
from megalith.parallel.mappings import gather_from_sequence_parallel_region
from megalith.parallel.plan import attentions

WHOLE = (
    "documents",
    "padding_mask",
)  # endings of names: attention asks them of keys too, and every process sees all keys
BIASES = ("encoder_bias", "decoder_bias")  # a model's tables of biases by distance


def places(length: int, axis: Axis, device: torch.device | None = None) -> Tensor:
    """Where this process's tokens stand in a sequence of `length`: int64 [length / c]. Raises ConfigError where it does not divide."""
    unit = 2 * axis.size
    if length % unit:
        near = sorted({max(1, length // unit) * unit, -(-length // unit) * unit})
        rule = f"--context-parallel-size {axis.size} cuts it into {unit} equal chunks"
        raise ConfigError(problem("sequence length", length, rule, f"Use {' or '.join(map(str, near))}"))
    chunks = torch.arange(length, device=device).view(unit, -1)
    return torch.cat((chunks[axis.rank], chunks[-1 - axis.rank]))


def part(batch: Mapping[str, Tensor], axis: Axis, sequences: Mapping[str, str]) -> dict[str, Tensor]:
    """This process's tokens of a batch: its tensors [b, s, ...], s as of one of the sequences' ids, become [b, s/c, ...].

    sequences: names of ids [b, s], or [b, choices, s], -> what the places of their tokens are called, which are
        added: [s/c].
    Tensors of other shapes, documents and padding masks stay whole.
    """
    ids = {where: batch[name] for name, where in sequences.items() if name in batch}
    here = {(each.dim() - 1, each.shape[-1]): places(each.shape[-1], axis, each.device) for each in ids.values()}

    def own(name: str, value: Tensor) -> Tensor:
        for (dim, length), chosen in here.items():
            if value.dim() > dim and value.shape[dim] == length and not name.endswith(WHOLE):
                return value.index_select(dim, chosen)
        return value

    taken = {name: own(name, value) for name, value in batch.items()}
    return taken | {where: here[each.dim() - 1, each.shape[-1]] for where, each in ids.items()}


def apply(model: nn.Module, axis: Axis) -> None:
    """Make the core attention of all attentions in `model.layers` one of part sequences; `BIASES` cover the whole."""
    for layer in model.layers.values():
        for attention in attentions(layer):
            attention.core = ContextAttention(attention.core, axis)
    for table in (getattr(model, name, None) for name in BIASES):
        if table is not None:
            table.parts = axis.size


class ContextAttention(nn.Module):
    """Core attention of this process's two chunks of queries to all keys, or where it is causal to all keys before them.

    Queries and keys may be of different sequences where it is not causal.
    """

    def __init__(self, core: nn.Module, axis: Axis):
        """core: attention whose queries are the last of its keys (layers/attention.py)."""
        super().__init__()
        self.core, self.axis = core, axis

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, cache: Any = None) -> Tensor:
        """q [b, n, s/c, d], k and v [b, m, t/c, d] -> [b, n, s/c, d]. mask: of layers/mask.py; its `rows` are those of the queries.

        cache: text is written by each process with whole sequences, so this is the core inside.
        """
        if cache is not None:
            return self.core(q, k, v, mask, cache)
        chunk, (k, v) = q.shape[2] // 2, join(k, v, self.axis)
        if not mask.causal:
            if (
                mask.documents is not None or mask.slopes is not None or mask.window is not None
            ):  # they ask where a query stands
                rule = "attention that is not causal is split with a padding mask or a relative bias alone"
                raise ConfigError(problem("--context-parallel-size", self.axis.size, rule, "Use 1"))
            if mask.relative is None:
                return self.core(q, k, v, mask)
        ends = chunk * (self.axis.rank + 1), chunk * (2 * self.axis.size - self.axis.rank)
        rows = (None, None) if mask.rows is None else mask.rows.chunk(2, dim=1)
        parts = []
        for queries, end, keys in zip(q.chunk(2, dim=2), ends, rows, strict=True):
            if mask.causal:
                parts.append(self.core(queries, k[:, :, :end], v[:, :, :end], mask._replace(rows=keys)))
            else:
                parts.append(
                    self.core(
                        queries, k, v, mask._replace(rows=keys, relative=seen_from(mask.relative, end, k.shape[2]))
                    )
                )
        return torch.cat(parts, dim=2)


def seen_from(relative: Tensor, end: int, length: int) -> Tensor:
    """The table of biases by distance (layers/mask.py) for queries that end at place `end`, where core attention takes them for the last.

    It reads the table `length - end` columns too far left, so the columns move there. What comes round the edge is of distances that
    none of these queries has.
    """
    return relative.roll(end - length, dims=1)


def join(k: Tensor, v: Tensor, axis: Axis) -> tuple[Tensor, ...]:
    """Keys and values [b, m, s/c, d] of all processes, in one collective: [b, m, s, d], in the order of the sequence."""
    held = torch.cat((k.transpose(1, 2), v.transpose(1, 2)), dim=-1)
    chunks = gather_from_sequence_parallel_region(held, axis).unflatten(1, (axis.size, 2, -1))
    early, late = chunks.unbind(2)
    whole = torch.cat((early, late.flip(1)), dim=1).flatten(1, 2).transpose(1, 2)
    return whole.split((k.shape[-1], v.shape[-1]), dim=-1)
