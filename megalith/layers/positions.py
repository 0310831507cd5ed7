"""Positions in attention: rotary embedding, ALiBi slopes, T5's relative bias."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RopeScaling(NamedTuple):
    """How a rotary embedding is scaled to sequences `factor` times as long as those it was trained for.

    kind: linear (Chen et al., 2023), llama3 (Dubey et al., 2024) or yarn (Peng et al., 2023).
    length: the longest sequence before scaling.
    slow, fast: channels with fewer than `slow` turns in that length turn `factor` times slower, those with more than
        `fast` turns stay as they are, those between are interpolated.
    """

    kind: str
    factor: float
    length: int = 8192
    slow: float = 1.0
    fast: float = 4.0

    def scale(self, frequencies: Tensor, base: float) -> Tensor:
        """The scaled frequencies, in radians per position, float32 [r/2]."""
        if self.kind == "linear":
            return frequencies / self.factor
        if self.kind == "llama3":  # interpolated by turns
            turns = self.length * frequencies / (2 * math.pi)
            unscaled = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        else:  # yarn, interpolated by the number of the channel pair, between whole numbers
            pairs = len(frequencies)
            first = math.floor(self.channel_pair(self.fast, pairs, base))
            last = math.ceil(self.channel_pair(self.slow, pairs, base))
            first, last = max(first, 0), min(last, 2 * pairs - 1)
            ramp = (torch.arange(pairs, device=frequencies.device) - first) / max(last - first, 0.001)
            unscaled = 1 - ramp.clamp(0, 1)
        return frequencies * (unscaled + (1 - unscaled) / self.factor)

    def channel_pair(self, turns: float, pairs: int, base: float) -> float:
        """Number of the channel pair that makes so many turns in `length` positions."""
        return pairs * math.log(self.length / (turns * 2 * math.pi)) / math.log(base)

    @property
    def attention_factor(self) -> float:
        """The factor of queries and keys, by which yarn sharpens attention over longer sequences."""
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0


def rotary_table(
    positions: Tensor, head_dim: int, *, base: float, percent: float = 1.0, rope_scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles (Su et al., 2021, section 3.4): float32 [b, 1, s, r/2], positions [b, s].

    r is the even number of channels of a head that are rotated: percent x head_dim.
    """
    rotated = int(head_dim * percent) // 2 * 2
    exponent = torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated
    frequencies = base**-exponent
    if rope_scaling is not None:
        frequencies = rope_scaling.scale(frequencies, base)
    angles = positions[:, None, :, None].float() * frequencies
    if rope_scaling is None or rope_scaling.attention_factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * rope_scaling.attention_factor, angles.sin() * rope_scaling.attention_factor


def rotate(x: Tensor, table: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Rotate the first channels of every head of x [b, heads, s, d] by the table of `rotary_table`.

    interleaved: channel pairs are (0, 1), (2, 3), ... as in GPT-J and Meta's Llama files; otherwise (0, r/2),
        (1, r/2 + 1), ... as in GPT-NeoX and Hugging Face. Weights of one kind give nonsense under the other.
    """
    cos, sin = table
    width = 2 * cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head.chunk(2, dim=-1)
    dtype = torch.promote_types(x.dtype, cos.dtype)
    first, second = first.to(dtype), second.to(dtype)
    rotated = first * cos - second * sin, second * cos + first * sin
    out = (torch.stack(rotated, dim=-1).flatten(-2) if interleaved else torch.cat(rotated, dim=-1)).to(x.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head, float32 [num_heads] (Press et al., 2022, section 3; not powers of two as in their code)."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


class RelativeBias(nn.Embedding):
    """A learned bias of each head's scores, by the bucket of the distance from query to key: weight [buckets, heads].

    One table for all layers of a stack (Raffel et al., 2020, arXiv 1910.10683, section 2.1).
    """

    def __init__(self, buckets: int, heads: int, max_distance: int, bidirectional: bool):
        """bidirectional: half of the buckets are for keys after the query; else these have the bucket of distance 0."""
        super().__init__(buckets, heads)
        self.buckets = functools.partial(
            distance_buckets, number=buckets, max_distance=max_distance, bidirectional=bidirectional
        )
        self.sequence_shards = 1  # equal ones, of which this process holds one

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        """[heads, 2 n - 1] for distances 1 - n to n - 1 (layers/mask.py, `relative`) in a sequence of n positions.

        length: of this process's shard of the sequence.
        """
        return F.embedding(self.buckets(length * self.sequence_shards, self.weight.device), self.weight).t()


def distance_buckets(
    length: int, device: torch.device, *, number: int, max_distance: int, bidirectional: bool
) -> Tensor:  # fmt: skip
    """The bucket of each distance 1 - length to length - 1: int64 [2 length - 1].

    Half of the buckets of a direction are for one distance each, the others for ranges that grow by a constant factor
    up to max_distance.
    """
    distance = torch.arange(1 - length, length, device=device)
    first = torch.zeros_like(distance)
    if bidirectional:
        number //= 2
        first, distance = torch.where(distance > 0, number, 0), distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = number // 2
    # In float32 and in this order of operations, as in the original: else the first distance of a range could fall into
    # the bucket before.
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (number - exact)
    return first + torch.where(distance < exact, distance, (exact + steps.long()).clamp(max=number - 1))
