"""How attention knows where tokens are: rotary embedding and ALiBi slopes."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, *, base: float, percent: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles, float32 [b, 1, s, r/2] for positions [b, s] (Su et al., 2021, section 3.4).

    r is the even number of channels of a head that are rotated: percent x head_dim.
    """
    rotated = int(head_dim * percent) // 2 * 2
    exponent = torch.arange(0, rotated, 2, device=positions.device, dtype=torch.float32) / rotated
    angles = positions[:, None, :, None].float() * (base**-exponent)
    return angles.cos(), angles.sin()


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
