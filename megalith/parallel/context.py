"""Context parallelism: each process holds a shard of every sequence, and gathers the keys and values of the others.

A sequence is cut into 2c chunks, of which process r of c holds r and 2c-1-r: the early one sees few keys, the late one
many, and their sum is the same on every process (Dubey et al., 2024, arXiv 2407.21783, section 3.3.2). As a process has
all keys up to its queries, attention of each chunk is one causal call, and no softmax is combined from parts.
Where attention is not causal, as in encoders, every chunk sees all keys and both chunks are one call, except with a
bias by distance, which differs between the chunks. A decoder's cross attention is such a call too, to the gathered keys
of the encoder's output.
Cost: each layer gathers keys and values [b, s, m, 2d] of the whole sequence; grouped-query attention makes them small.
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

# Endings of the names of tensors that are not sharded: attention needs them for keys too, and a process sees all keys.
UNSHARDED = ("documents", "padding_mask")
BIASES = ("encoder_bias", "decoder_bias")  # a model's tables of biases by distance


def token_positions(length: int, axis: Axis, device: torch.device | None = None) -> Tensor:
    """Positions of this process's tokens in a sequence of `length`: int64 [length / c].

    Raises ConfigError where 2c does not divide the length.
    """
    unit = 2 * axis.size
    if length % unit:
        nearest = sorted({max(1, length // unit) * unit, -(-length // unit) * unit})
        rule = f"must be divisible by {unit}, the chunks into which --context-parallel-size {axis.size} cuts it"
        raise ConfigError(problem("The sequence length", length, rule, f"Use {' or '.join(map(str, nearest))}"))
    chunks = torch.arange(length, device=device).view(unit, -1)
    return torch.cat((chunks[axis.rank], chunks[-1 - axis.rank]))


def shard_batch(batch: Mapping[str, Tensor], axis: Axis, sequences: Mapping[str, str]) -> dict[str, Tensor]:
    """This process's tokens of a batch: tensors [b, s, ...], s as long as one of the `sequences`, become [b, s/c, ...].

    sequences: the names of ids, [b, s] or [b, choices, s], to the names under which the positions of their tokens,
        [s/c], are added to the batch.
    Tensors of other shapes, documents and padding masks stay whole.
    """
    ids = {key: batch[name] for name, key in sequences.items() if name in batch}
    positions: dict[tuple[int, int], Tensor] = {}  # by the dimension and the length of a sequence
    for tensor in ids.values():
        length = tensor.shape[-1]
        positions[tensor.dim() - 1, length] = token_positions(length, axis, tensor.device)

    def shard(name: str, value: Tensor) -> Tensor:
        for (dim, length), local in positions.items():
            if value.dim() > dim and value.shape[dim] == length and not name.endswith(UNSHARDED):
                return value.index_select(dim, local)
        return value

    shards = {name: shard(name, value) for name, value in batch.items()}
    return shards | {key: positions[tensor.dim() - 1, tensor.shape[-1]] for key, tensor in ids.items()}


def apply(model: nn.Module, axis: Axis) -> None:
    """Make all core attentions in `model.layers` work on sharded sequences; the tables `BIASES` cover all of them."""
    for layer in model.layers.values():
        for attention in attentions(layer):
            attention.core = ContextAttention(attention.core, axis)
    for table in (getattr(model, name, None) for name in BIASES):
        if table is not None:
            table.sequence_shards = axis.size


class ContextAttention(nn.Module):
    """Core attention of this process's two chunks of queries to all keys, if causal to those before them.

    Queries and keys may be of different sequences where it is not causal.
    """

    def __init__(self, core: nn.Module, axis: Axis):
        """core: attention that takes its queries for the last of its keys (layers/attention.py)."""
        super().__init__()
        self.core, self.axis = core, axis

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, cache: Any = None) -> Tensor:
        """q [b, n, s/c, d], k and v [b, m, t/c, d] -> [b, n, s/c, d].

        mask: see layers/mask.py; its `dropout_keys` are those of this process's queries.
        cache: each process generates text with whole sequences, so with a cache this is just the core.
        """
        if cache is not None:
            return self.core(q, k, v, mask, cache)
        chunk, (k, v) = q.shape[2] // 2, gather_keys_values(k, v, self.axis)
        if not mask.causal:
            # These three need the position of a query.
            if mask.documents is not None or mask.slopes is not None or mask.window is not None:
                rule = "must be 1 where attention is not causal and has more than a padding mask or a relative bias"
                raise ConfigError(problem("--context-parallel-size", self.axis.size, rule, "Use 1"))
            if mask.relative is None:
                return self.core(q, k, v, mask)
        ends = chunk * (self.axis.rank + 1), chunk * (2 * self.axis.size - self.axis.rank)
        dropout_keys = (None, None) if mask.dropout_keys is None else mask.dropout_keys.chunk(2, dim=1)
        outputs = []
        for queries, end, keys in zip(q.chunk(2, dim=2), ends, dropout_keys, strict=True):
            chunk_mask = mask._replace(dropout_keys=keys)
            if mask.causal:
                outputs.append(self.core(queries, k[:, :, :end], v[:, :, :end], chunk_mask))
            else:
                relative = shift_relative_bias(mask.relative, end, k.shape[2])
                outputs.append(self.core(queries, k, v, chunk_mask._replace(relative=relative)))
        return torch.cat(outputs, dim=2)


def shift_relative_bias(relative: Tensor, end: int, length: int) -> Tensor:
    """The table of biases by distance (layers/mask.py) for queries that end at position `end` of `length` keys.

    Core attention takes the queries for the last ones, and so reads the table `length - end` columns too far left;
    the columns are moved there. Those that wrap around the edge are of distances that none of these queries has.
    """
    return relative.roll(end - length, dims=1)


def gather_keys_values(k: Tensor, v: Tensor, axis: Axis) -> tuple[Tensor, ...]:
    """Gather keys and values [b, m, s/c, d] of all processes, in one collective: [b, m, s, d] in sequence order."""
    local = torch.cat((k.transpose(1, 2), v.transpose(1, 2)), dim=-1)
    chunks = gather_from_sequence_parallel_region(local, axis).unflatten(1, (axis.size, 2, -1))
    early, late = chunks.unbind(2)
    keys_values = torch.cat((early, late.flip(1)), dim=1).flatten(1, 2).transpose(1, 2)
    return keys_values.split((k.shape[-1], v.shape[-1]), dim=-1)
