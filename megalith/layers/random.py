"""Random numbers by counter: element i is a function of (key, i) alone.

No stream is consumed, so any rank can draw any part of a tensor, in any order, on any device, and get the same values
(Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"; the mixers are SplitMix64 and a 32-bit relative).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements drawn at a time: bounds the float64 temporaries to a few MiB
_GOLDEN_RATIO = -0x61C8864680B583EB  # 2^64 / golden ratio, as a signed 64-bit number
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # SplitMix64's multipliers, signed


@torch.compiler.assume_constant_result  # a compiled model meets it in its forward pass and cannot trace hashing
def key(*words: object) -> int:
    """A 64-bit key from any values: key(seed, "layers.0.mlp.up.weight")."""
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def bits(key: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits for each element of `index` (int64, any shape). key: an int, or int64 with one per element.

    Where both are ints, they are the low 64 bits of an int.
    """
    x = index * _GOLDEN_RATIO + key
    x ^= (x >> 30) & 0x3FFFFFFFF
    x *= _MIX[0]
    x ^= (x >> 27) & 0x1FFFFFFFFF
    x *= _MIX[1]
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """Uniform in (0, 1), float64, for each element of `index`; 52 bits, because 53 and a half could round up to 1."""
    return (((bits(key, index) >> 12) & 0xFFFFFFFFFFFFF).double() + 0.5) * 2.0**-52


def uniform_float(key: int, index: int) -> float:
    """The element of `uniform` at one index: in 2 us, where its 18 kernels take 50 for a tensor of one element."""
    return (((bits(key, index) >> 12) & 0xFFFFFFFFFFFFF) + 0.5) * 2.0**-52


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal, float64, for each element of `index` (Box and Muller, 1958, from the two halves of 64 bits)."""
    x = bits(key, index)
    radius = (((x >> 32) & 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    angle = (x & 0xFFFFFFFF).double() * (2.0 * math.pi * 2.0**-32)
    return torch.sqrt(-2.0 * torch.log(radius)) * torch.cos(angle)


def mix32(x: Tensor) -> Tensor:
    """Mix the 32 bits of each element of an int32 tensor. Overwrites `x`: dropout calls this on large tensors."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= -0x7B935975  # 0x846CA68B
    x ^= (x >> 16) & 0xFFFF
    return x
