"""Attention: projections with parameters, and core attention without, which a plan may replace.

Shapes: b batch, s queries, t keys, n query heads, m key/value heads, d channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from megalith.layers.cache import Cache
from megalith.layers.dropout import Dropout
from megalith.layers.linear import SharedInput
from megalith.layers.mask import AttentionMask
from megalith.layers.positions import rotate

QUERY_BLOCK = 256  # queries whose additive mask is in memory at one time


class CoreAttention(nn.Module):
    """softmax(scale q k^T + bias) v, by the fastest path that the mask and the device allow.

    Only causal: one fused call. With a bias: FlexAttention on accelerators; on the CPU, where that has no backward,
    fused calls on blocks of queries, each bias built for its block and again in the backward pass. Attention dropout
    takes the explicit path on the CPU, because the fused one has none there; on accelerators its masks come from the
    device's generator, and so differ between layouts (the one such exception besides in-batch negatives).
    """

    def __init__(self, dropout: float, site: str, backend: str = "auto", scale: float | None = None):
        """backend: auto, sdpa, flex or explicit. site: see Dropout; a cache knows the layer by it too.

        scale: None is 1 / sqrt(d).
        """
        super().__init__()
        self.site, self.backend, self.first_head, self.scale = site, backend, 0, scale
        self.dropout = Dropout(dropout, site)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, cache: Cache | None = None) -> Tensor:
        """q [b, n, s, d], k and v [b, m, t, d] with n a multiple of m -> [b, n, s, d].

        The queries are the last s of the t positions.
        cache: holds the keys and values of earlier calls and takes these (layers/cache.py); only it decides which
            queries see which keys.
        `first_head` is the global number of head 0, for a rank that holds some of the heads; mask.slopes are those of
        all heads, mask.relative those of the local heads.
        """
        if cache is not None:
            return cache.attend(self, q, k, v, mask)
        if mask.window is not None and mask.window >= k.shape[2]:
            mask = mask._replace(window=None)  # hides nothing
        if mask.slopes is not None:
            mask = mask._replace(slopes=self.local_slopes(mask.slopes, q.shape[1]))
        p = self.dropout.p if self.training and mask.dropout_keys is not None else 0.0
        on_cpu = q.device.type == "cpu"
        if self.backend == "explicit" or (p and on_cpu):
            return self.explicit(q, k, v, mask)
        if mask.needs_no_bias and self.backend != "flex" and (q.shape[2] == k.shape[2] or not mask.causal):
            if on_cpu:  # the CPU's fused kernel wants as many key heads as query heads
                k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
            grouped = k.shape[1] != q.shape[1]
            return scaled_dot_product_attention(
                q, k, v, dropout_p=p, is_causal=mask.causal, scale=self.scale, enable_gqa=grouped
            )
        lower_right = mask.needs_no_bias and mask.causal and not on_cpu and self.backend != "flex"
        if lower_right and not torch.compiler.is_compiling():
            # With this bias flash attention runs, but torch.compile (2.13) cannot trace it.
            bias = causal_lower_right(q.shape[2], k.shape[2])
            grouped = k.shape[1] != q.shape[1]
            return scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=p, scale=self.scale, enable_gqa=grouped
            )
        if self.backend == "flex" or (not on_cpu and self.backend == "auto" and not p):
            return flex(q, k, v, mask, self.scale)
        return self.blocks(q, k, v, mask, p)

    def local_slopes(self, slopes: Tensor, heads: int) -> Tensor:
        """Of the slopes of all heads, those of the `heads` local query heads."""
        return slopes[self.first_head : self.first_head + heads]

    def explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """The reference: scores, softmax in float32 at least, dropout by hash, product."""
        k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
        # Scaled before the product, which would overflow float16.
        scores = (q * (self.scale or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
        scores = scores.double() if scores.dtype == torch.float64 else scores.float()
        queries = slice(k.shape[2] - q.shape[2], k.shape[2])
        bias = mask.bias(queries, slice(0, k.shape[2]), q.device)
        blind = None  # queries that see no key, whose softmax would not be a number; fused kernels give 0 for them
        if mask.padding is not None:
            blind = (bias == float("-inf")).all(dim=-1, keepdim=True)
            bias = bias.masked_fill(blind, 0.0)
        weights = (scores + bias.to(scores.dtype)).softmax(dim=-1)
        if blind is not None:
            weights = weights.masked_fill(blind, 0.0)
        if mask.dropout_keys is not None:
            heads = torch.arange(self.first_head, self.first_head + q.shape[1], device=q.device, dtype=torch.int32)
            weights = self.dropout(weights, mask.dropout_keys[:, None, :] ^ heads[None, :, None])
        return weights.to(v.dtype) @ v

    def blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, p: float) -> Tensor:
        """Fused attention of one block of queries at a time; memory of the bias is heads x QUERY_BLOCK x s."""
        k, v = _expand(k, q.shape[1]), _expand(v, q.shape[1])
        run: Callable[..., Tensor] = _block
        # A compiler decides itself what to recompute, and torch's (2.13) fails with DTensors beside a checkpoint.
        if q.requires_grad and not torch.compiler.is_compiling():
            run = functools.partial(checkpoint, _block, use_reentrant=False, preserve_rng_state=p > 0)
        outputs, first = [], k.shape[2] - q.shape[2]
        for start in range(0, q.shape[2], QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, q.shape[2])
            end = first + stop if mask.causal else k.shape[2]
            begin = 0 if mask.window is None else max(0, first + start - mask.window + 1)
            keys = slice(begin, end)
            outputs.append(
                run(q[:, :, start:stop], k[:, :, keys], v[:, :, keys], mask, first + start, begin, p, self.scale)
            )
        return torch.cat(outputs, dim=2)


def _block(
    q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, start: int, begin: int, p: float, scale: float | None
) -> Tensor:
    bias = mask.bias(slice(start, start + q.shape[2]), slice(begin, begin + k.shape[2]), q.device)
    # Distances over 256 are rounded in bfloat16; the CPU's kernel takes them as float32.
    bias = bias.to(torch.promote_types(q.dtype, bias.dtype) if q.device.type == "cpu" else q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=scale)


def _expand(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float | None = None) -> Tensor:
    """FlexAttention with the mask as code (PyTorch: torch.nn.attention.flex_attention); compiled on accelerators."""
    from torch.nn.attention.flex_attention import create_block_mask

    documents, padding, slopes, relative = mask.documents, mask.padding, mask.slopes, mask.relative
    first = k.shape[2] - q.shape[2]

    def mask_mod(b, h, i, j):
        i = i + first
        keep = (j <= i) if mask.causal else (j >= 0)
        if mask.window is not None:
            keep = keep & (i - j < mask.window)
        if documents is not None:
            keep = keep & (documents[b, i] == documents[b, j])
        if padding is not None:
            keep = keep & padding[b, j]
        return keep

    def score_mod(value, b, h, i, j):
        if slopes is not None:
            value = value + slopes[h] * (j - i - first)
        return value if relative is None else value + relative[h, j - i - first + relative.shape[1] // 2]

    batch = q.shape[0] if documents is not None or padding is not None else None
    block_mask = create_block_mask(mask_mod, batch, None, q.shape[2], k.shape[2], device=q.device)
    call = _compiled_flex(q.device.type)
    biased, grouped = slopes is not None or relative is not None, k.shape[1] != q.shape[1]
    modification = score_mod if biased else None
    return call(q, k, v, score_mod=modification, block_mask=block_mask, scale=scale, enable_gqa=grouped)


@functools.cache
def _compiled_flex(device: str):
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention)


class SelfAttention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention with separate q, k, v projections.

    Separate, because the rows of a fused weight do not split by head, and some optimizers treat the three differently.
    """

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, qkv_bias: bool, core: CoreAttention,
        interleaved: bool = False, head_norm: float | None = None, window: int | None = None,
    ):  # fmt: skip
        """head_norm: epsilon of an RMSNorm of each query and key head (Qwen3), or None. window: see AttentionMask."""
        super().__init__()
        self.head_dim, self.interleaved, self.window = head_dim, interleaved, window
        self.shared_input = SharedInput()
        self.q = nn.Linear(hidden, heads * head_dim, bias=qkv_bias)
        self.k = nn.Linear(hidden, kv_heads * head_dim, bias=qkv_bias)
        self.v = nn.Linear(hidden, kv_heads * head_dim, bias=qkv_bias)
        self.out = nn.Linear(heads * head_dim, hidden, bias=bias)
        self.q_norm = nn.RMSNorm(head_dim, head_norm) if head_norm is not None else None
        self.k_norm = nn.RMSNorm(head_dim, head_norm) if head_norm is not None else None
        self.core = core

    def forward(
        self, x: Tensor, mask: AttentionMask, rotary: tuple[Tensor, Tensor] | None, cache: Cache | None = None
    ) -> Tensor:  # fmt: skip
        """x [b, s, hidden] -> [b, s, hidden]. cache: keys and values of earlier calls, see layers/cache.py."""
        q, k, v = (self.heads(y) for y in self.shared_input(x, self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary, self.interleaved), rotate(k, rotary, self.interleaved)
        if self.window is not None:
            mask = mask._replace(window=self.window)
        return self.out(self.core(q, k, v, mask, cache).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        """[b, s, heads x d] -> [b, heads, s, d], however many heads this process holds."""
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class CrossAttention(SelfAttention):
    """Attention with queries from a decoder, and keys and values from the encoder's output, called memory."""

    def __init__(
        self, hidden: int, heads: int, kv_heads: int, head_dim: int, *, bias: bool, qkv_bias: bool, core: CoreAttention
    ):
        super().__init__(hidden, heads, kv_heads, head_dim, bias=bias, qkv_bias=qkv_bias, core=core)
        self.memory_input = SharedInput()

    def forward(  # type: ignore[override]
        self, x: Tensor, memory: Tensor | None, mask: AttentionMask, cache: Cache | None = None
    ) -> Tensor:  # fmt: skip
        """x [b, s, hidden], memory [b, t, hidden] -> [b, s, hidden]. mask: which positions of the memory are seen.

        cache: keeps the keys and values of the memory, so that in later calls the memory is None.
        """
        (q,) = self.shared_input(x, self.q)
        k, v = (None, None) if memory is None else map(self.heads, self.memory_input(memory, self.k, self.v))
        return self.out(self.core(self.heads(q), k, v, mask, cache).transpose(1, 2).flatten(2))
