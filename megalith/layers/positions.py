"""How attention knows where tokens are: rotary embedding, ALiBi slopes, T5's relative bias."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Stretch(NamedTuple):
    """How a rotary embedding is stretched to sequences `factor` times as long as those it was trained for.

    kind: linear (Chen et al., 2023), llama3 (Dubey et al., 2024) or yarn (Peng et al., 2023).
    length: the longest sequence before. slow, fast: channels that turn less often than `slow` in that length turn `factor` times
    slower, those that turn more often than `fast` stay, those between get something between.
    """

    kind: str
    factor: float
    length: int = 8192
    slow: float = 1.0
    fast: float = 4.0

    def frequencies(self, turned: Tensor, base: float) -> Tensor:
        """The stretched frequencies of `turned`, radians for each place, float32 [r/2]."""
        if self.kind == "linear":
            return turned / self.factor
        if self.kind == "llama3":  # by turns
            turns = self.length * turned / (2 * math.pi)
            kept = ((turns - self.slow) / (self.fast - self.slow)).clamp(0, 1)
        else:  # by the number of the channel, as those between are found from whole numbers
            first, last = (
                math.floor(self.channel(self.fast, len(turned), base)),
                math.ceil(self.channel(self.slow, len(turned), base)),
            )
            first, last = max(first, 0), min(last, 2 * len(turned) - 1)
            ramp = (torch.arange(len(turned), device=turned.device) - first) / max(last - first, 0.001)
            kept = 1 - ramp.clamp(0, 1)
        return turned * (kept + (1 - kept) / self.factor)

    def channel(self, turns: float, pairs: int, base: float) -> float:
        """Number of the channel pair that turns so often in `length` places."""
        return pairs * math.log(self.length / (turns * 2 * math.pi)) / math.log(base)

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied with: yarn sharpens attention over longer sequences."""
        return 0.1 * math.log(self.factor) + 1.0 if self.kind == "yarn" else 1.0


def rotary_table(
    positions: Tensor, head_dim: int, *, base: float, percent: float = 1.0, stretch: Stretch | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles, float32 [b, 1, s, r/2] for positions [b, s] (Su et al., 2021, section 3.4).

    r is the even number of channels of a head that are rotated: percent x head_dim.
    """
    rotated = int(head_dim * percent) // 2 * 2
    exponent = torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated
    frequencies = base**-exponent
    if stretch is not None:
        frequencies = stretch.frequencies(frequencies, base)
    angles = positions[:, None, :, None].float() * frequencies
    if stretch is None or stretch.amplitude == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * stretch.amplitude, angles.sin() * stretch.amplitude


def rotate(x: Tensor, table: tuple[Tensor, Tensor], interleaved: bool = False) -> Tensor:
    """Rotate the first channels of every head of x [b, heads, s, d] by the table of `rotary_table`.

    interleaved: channel pairs are (0, 1), (2, 3), ... as in GPT-J and Meta's Llama files; otherwise (0, r/2), (1, r/2 + 1),
    ... as in GPT-NeoX and Hugging Face. Weights of one kind give nonsense under the other.
    """
    cos, sin = table
    width = 2 * cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    if interleaved:
        first, second = head[..., 0::2], head[..., 1::2]
    else:
        first, second = head.chunk(2, dim=-1)
    wide = torch.promote_types(x.dtype, cos.dtype)
    first, second = first.to(wide), second.to(wide)
    turned = first * cos - second * sin, second * cos + first * sin
    out = (torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def alibi_slopes(num_heads: int) -> Tensor:
    """Slope of each head, float32 [num_heads] (Press et al., 2022, section 3; other than powers of two as in their code)."""
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)


class RelativeBias(nn.Embedding):
    """What is added to a head's scores by the distance from query to key, learned by bucket: weight [buckets, heads].

    One table for all layers of a stack (Raffel et al., 2020, arXiv 1910.10683, section 2.1).
    """

    def __init__(self, buckets: int, heads: int, max_distance: int, both_ways: bool):
        """both_ways: half of the buckets are for keys after the query; without, those share the bucket of distance 0."""
        super().__init__(buckets, heads)
        self.buckets = functools.partial(
            distance_buckets, number=buckets, max_distance=max_distance, both_ways=both_ways
        )
        self.parts = 1  # equal ones into which a sequence is split, where a process holds one of them

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        """[heads, 2 n - 1] for distances 1 - n to n - 1 (layers/mask.py, `relative`) in a sequence of n places, `length` of them here."""
        return F.embedding(self.buckets(length * self.parts, self.weight.device), self.weight).t()


def distance_buckets(length: int, device: torch.device, *, number: int, max_distance: int, both_ways: bool) -> Tensor:
    """The bucket of each distance 1 - length to length - 1: int64 [2 length - 1].

    Half of the buckets of a direction are for one distance each, the others for ranges that grow by a factor, up to max_distance.
    """
    distance = torch.arange(1 - length, length, device=device)
    first = torch.zeros_like(distance)
    if both_ways:
        number //= 2
        first, distance = torch.where(distance > 0, number, 0), distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = number // 2
    # Float32 and this order of operations, as in the original: a range's first distance could else fall into the bucket before.
    steps = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (number - exact)
    return first + torch.where(distance < exact, distance, (exact + steps.long()).clamp(max=number - 1))
