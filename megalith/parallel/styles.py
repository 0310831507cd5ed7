"""Styles: what a plan may say of a module. Each takes (module, its parent, axis) and returns the replacement."""

from __future__ import annotations

from torch import nn

from megalith.common.errors import ConfigError
from megalith.parallel.collectives import Axis
from megalith.parallel.embedding import ParallelRelativeBias, SequenceParallelEmbedding, VocabParallelEmbedding
from megalith.parallel.linear import (
    ColumnParallelLinear,
    CopyToTensorParallelRegion,
    KeyValueParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    SharedInput,
    SharedInputInRegion,
)
from megalith.parallel.norm import LayerNorm, RMSNorm
from megalith.parallel.sequence import FirstToken, SequenceParallelDropout
from megalith.parallel.sharding import distribute
from megalith.parallel.vocabulary import ParallelLMHead, ParallelVocabulary


def _distribute_linear(module: nn.Linear, axis: Axis, weight: int | None, bias: int | None) -> None:
    module.weight = distribute(module.weight, axis, weight)
    if module.bias is not None:
        module.bias = distribute(module.bias, axis, bias)


def column(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split a linear layer by outputs."""
    _distribute_linear(module, axis, 0, 0)
    return ColumnParallelLinear(module, axis)


def heads(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split q, k or v by heads of `parent.head_dim` channels; key/value heads fewer than ranks are replicated."""
    number = module.out_features // parent.head_dim
    if number % axis.size == 0:
        return column(module, parent, axis)
    if module is parent.q or axis.size % number:
        queries = module is parent.q
        kind, rule = ("attention", "by") if queries else ("key/value", "by, or a divisor of,")
        raise ConfigError(
            f"The number of {kind} heads must be divisible {rule} the {axis.size} tensor-parallel ranks; "
            f"found {number}. Change --tensor-model-parallel-size or the number of heads."
        )
    _distribute_linear(module, axis, None, None)
    return KeyValueParallelLinear(module, axis, parent.head_dim)


def row(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split a linear layer by inputs; its output is summed."""
    _distribute_linear(module, axis, 1, None)
    return RowParallelLinear(module, axis)


def vocab_parallel_embedding(module: nn.Embedding, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split an embedding by ids."""
    module.weight = distribute(module.weight, axis, 0)
    return VocabParallelEmbedding(module, axis)


def lm_head(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split the output layer by vocabulary and replicate its bias.

    A split bias has no second dimension, along which fully_shard could split it where the vocabulary does not divide.
    """
    _distribute_linear(module, axis, 0, None)
    return ParallelLMHead(module, axis)


def vocab_parallel_loss(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Compute the loss from a split vocabulary; the same module, with another `vocabulary`."""
    if parent.head is not None:
        module.vocabulary = ParallelVocabulary(axis, parent.head.out_features)
    return module


def sequence_parallel_embedding(module: nn.Embedding, parent: nn.Module, axis: Axis) -> nn.Module:
    """A replicated embedding, of which each rank looks up its shard of the sequence."""
    module.weight = distribute(module.weight, axis, None)
    return SequenceParallelEmbedding(module, axis)


def sequence_parallel_linear(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """A replicated linear layer of sequence shards: under sequence parallelism its gradients are summed."""
    return _replicated_linear(module, axis, axis.sequence_parallel)


def replicated_linear(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """A replicated linear layer of an input that is the same on all ranks."""
    return _replicated_linear(module, axis, False)


def _replicated_linear(module: nn.Linear, axis: Axis, partial: bool) -> nn.Module:
    _distribute_linear(module, axis, None, None)
    return ReplicatedLinear(module, axis, partial)


def first_token(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """The sequence's first token on every rank."""
    return FirstToken(axis) if axis.sequence_parallel else module


def sequence_parallel_dropout(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Dropout of a shard of the sequence."""
    return SequenceParallelDropout(module, axis) if axis.sequence_parallel else module


def shared_input(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """One gather for several linear layers that are split by outputs."""
    return SharedInput(axis)


def shared_input_in_region(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Several linear layers, split by outputs, of an input that `copy_to_region` has gathered."""
    return SharedInputInRegion(axis)


def copy_to_region(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """One gather, and one sum of gradients, for the input of many layers."""
    return CopyToTensorParallelRegion(axis)


def relative_bias(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split a table with a column for each head."""
    module.weight = distribute(module.weight, axis, 1)
    return ParallelRelativeBias(module, axis)


def core_attention(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Set which of the query heads core attention has on this rank; the same module."""
    module.first_head = axis.rank * (parent.q.out_features // parent.head_dim // axis.size)
    return module


def replicated_norm(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """A replicated norm. Under sequence parallelism its gradients are summed, as the ranks see different tokens."""
    return _norm(module, axis, axis.sequence_parallel)


def per_head_norm(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """A replicated norm of each head. Its gradients are summed, as each rank sees some of the heads."""
    return _norm(module, axis, True)


def _norm(module: nn.Module, axis: Axis, partial: bool) -> nn.Module:
    names = tuple(name for name, _ in module.named_parameters())
    for name in names:
        setattr(module, name, distribute(getattr(module, name), axis, None))
    replacement = LayerNorm if isinstance(module, nn.LayerNorm) else RMSNorm
    return replacement(module, axis, names if partial else ())
