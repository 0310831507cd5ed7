"""One transformer layer: attention and MLP, each with its norm, dropout and residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from megalith.layers.attention import CrossAttention, SelfAttention
from megalith.layers.cache import Cache
from megalith.layers.dropout import Dropout
from megalith.layers.mask import AttentionMask
from megalith.layers.mlp import MLP
from megalith.layers.norm import NORMS


class Block(nn.Module):
    """x + drop(attention(norm(x))), then x + drop(mlp(norm(x))).

    In a decoder x + drop(cross_attention(norm(x), memory)) comes between the two. With an `encoder` the block makes the
    memory itself: encoder(what it is given as memory, norm(x)), and returns it too (Retro).

    normed_residual takes the residual after the norm instead of before it
    (Megatron's --apply-residual-connection-post-layernorm).
    norm_after: norm(x + drop(attention(x))), then norm(x + drop(mlp(x))), as Vaswani et al. (2017) and Google's BERT.
    parallel: x + drop(attention(norm(x))) + drop(mlp(norm(x))), with one norm, or one for each with two_norms (Falcon).
    """

    def __init__(
        self, hidden: int, norm: str, epsilon: float, attention: SelfAttention, mlp: MLP, *, dropout: float, site: str,
        normed_residual: bool = False, norm_after: bool = False, parallel: bool = False, two_norms: bool = True,
        cross: CrossAttention | None = None, encoder: nn.Module | None = None,
    ):  # fmt: skip
        super().__init__()
        self.normed_residual, self.norm_after, self.parallel = normed_residual, norm_after, parallel
        self.attention_norm = NORMS[norm](hidden, epsilon)
        self.attention = attention
        self.attention_dropout = Dropout(dropout, f"{site}.attention")
        self.encoder = encoder
        self.cross_norm = NORMS[norm](hidden, epsilon) if cross is not None else None
        self.cross_attention = cross
        self.cross_dropout = Dropout(dropout, f"{site}.cross_attention") if cross is not None else None
        self.mlp_norm = NORMS[norm](hidden, epsilon) if two_norms else None
        self.mlp = mlp
        self.mlp_dropout = Dropout(dropout, f"{site}.mlp")

    def forward(
        self, x: Tensor, mask: AttentionMask, rotary: tuple[Tensor, Tensor] | None, dropout_keys: Tensor | None,
        memory: Any = None, memory_mask: AttentionMask | None = None, cache: Cache | None = None,
    ) -> Any:  # fmt: skip
        """x [b, s, hidden] -> [b, s, hidden], with an encoder (that, the memory).

        dropout_keys: int32 [b, s] (layers/dropout.py), None where nothing is dropped.
        memory: [b, t, hidden], the encoder's output, to which a decoder's cross attention attends where memory_mask
            allows it; None where the cache has its keys and values, and where there is nothing to attend to. With an
            encoder: what that makes the memory from.
        cache: keys and values of earlier calls (layers/cache.py), passed on to core attention.
        """
        if self.norm_after:
            x = self.attention_norm(x + self.attention_dropout(self.attention(x, mask, rotary, cache), dropout_keys))
            return self.mlp_norm(x + self.mlp_dropout(self.mlp(x), dropout_keys))
        normed = self.attention_norm(x)
        residual, before = normed if self.normed_residual else x, x
        x = residual + self.attention_dropout(self.attention(normed, mask, rotary, cache), dropout_keys)
        if self.cross_attention is not None:
            normed = self.cross_norm(x)
            residual = normed if self.normed_residual else x
            if self.encoder is not None and memory is not None:
                memory = self.encoder(memory, normed)
            x = residual + self.cross_dropout(self.cross_attention(normed, memory, memory_mask, cache), dropout_keys)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(before if self.parallel else x)
        residual = normed if self.normed_residual else x
        x = residual + self.mlp_dropout(self.mlp(normed), dropout_keys)
        return x if self.encoder is None else (x, memory)


def run_in_order(layers: Sequence[nn.Module], x: Tensor, *arguments) -> Tensor:
    """Run `layers` one after another; a model calls this through an attribute, which recomputation replaces."""
    for layer in layers:
        x = layer(x, *arguments)
    return x
