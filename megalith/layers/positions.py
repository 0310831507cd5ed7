"""How attention knows where tokens are: rotary embedding and ALiBi slopes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
            first, last = math.floor(self.channel(self.fast, len(turned), base)), math.ceil(self.channel(self.slow, len(turned), base))
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
