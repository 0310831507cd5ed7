"""Styles: what a plan may say of a module. Each takes (module, its parent, axis) and returns what takes its place."""

from __future__ import annotations

from torch import nn

from megalith.common.errors import ConfigError
from megalith.parallel.collectives import Axis
from megalith.parallel.embedding import ParallelRelativeBias, SequenceParallelEmbedding, VocabParallelEmbedding
from megalith.parallel.linear import (
    ColumnParallelLinear,
    CopyToRegion,
    KeyValueParallelLinear,
    RegionInput,
    ReplicatedLinear,
    RowParallelLinear,
    SharedInput,
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
    """Split q, k or v by heads of `parent.head_dim` channels; fewer key/value heads than ranks are held by all of them."""
    number = module.out_features // parent.head_dim
    if number % axis.size == 0:
        return column(module, parent, axis)
    if module is parent.q or axis.size % number:
        kind, rule = (
            ("attention", "divisible by") if module is parent.q else ("key/value", "divisible by, or a divisor of,")
        )
        raise ConfigError(
            f"{kind} heads: found {number}; their number must be {rule} the {axis.size} tensor-parallel ranks. "
            f"Change --tensor-model-parallel-size or the number of heads."
        )
    _distribute_linear(module, axis, None, None)
    return KeyValueParallelLinear(module, axis, parent.head_dim)


def row(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split a linear layer by inputs; its output is summed."""
    _distribute_linear(module, axis, 1, None)
    return RowParallelLinear(module, axis)


def vocabulary(module: nn.Embedding, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split an embedding by ids."""
    module.weight = distribute(module.weight, axis, 0)
    return VocabParallelEmbedding(module, axis)


def head(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split the output layer by vocabulary, its bias apart: a row without columns could not be split once more by fully_shard."""
    _distribute_linear(module, axis, 0, None)
    return ParallelLMHead(module, axis)


def vocabulary_loss(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Compute the loss from parts of the vocabulary; the same module, with another `vocabulary`."""
    if parent.head is not None:
        module.vocabulary = ParallelVocabulary(axis, parent.head.out_features)
    return module


def part_embedding(module: nn.Embedding, parent: nn.Module, axis: Axis) -> nn.Module:
    """A whole embedding on each rank, looked up for its part of the sequence."""
    module.weight = distribute(module.weight, axis, None)
    return SequenceParallelEmbedding(module, axis)


def part_linear(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """A whole linear layer on each rank. Under sequence parallelism its gradient is summed, as each rank sees a part of the tokens."""
    return _replicated_linear(module, axis, axis.sequence)


def whole_linear(module: nn.Linear, parent: nn.Module, axis: Axis) -> nn.Module:
    """A whole linear layer on each rank, of an input that all ranks have whole."""
    return _replicated_linear(module, axis, False)


def _replicated_linear(module: nn.Linear, axis: Axis, partial: bool) -> nn.Module:
    _distribute_linear(module, axis, None, None)
    return ReplicatedLinear(module, axis, partial)


def first_token(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """The first token of the whole sequence on each rank."""
    return FirstToken(axis) if axis.sequence else module


def part_dropout(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Dropout of a part of the sequence."""
    return SequenceParallelDropout(module, axis) if axis.sequence else module


def shared_input(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """One gather for several linear layers that are split by outputs."""
    return SharedInput(axis)


def whole_input(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Several linear layers, split by outputs, of what `whole` has fetched."""
    return RegionInput(axis)


def whole(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """One gather, and one sum of gradients, for the inputs of many layers."""
    return CopyToRegion(axis)


def head_table(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Split a table with a column for each head."""
    module.weight = distribute(module.weight, axis, 1)
    return ParallelRelativeBias(module, axis)


def core(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """Tell core attention which of the query heads are here; the same module."""
    module.first_head = axis.rank * (parent.q.out_features // parent.head_dim // axis.size)
    return module


def copy(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """A whole norm on each rank. Under sequence parallelism its gradient is summed, as each rank sees a part of the tokens."""
    return _norm(module, axis, axis.sequence)


def head_norm(module: nn.Module, parent: nn.Module, axis: Axis) -> nn.Module:
    """A norm of single heads, whole on each rank. Its gradient is summed, as each rank sees a part of the heads."""
    return _norm(module, axis, True)


def _norm(module: nn.Module, axis: Axis, partial: bool) -> nn.Module:
    names = tuple(name for name, _ in module.named_parameters())
    for name in names:
        setattr(module, name, distribute(getattr(module, name), axis, None))
    twin = LayerNorm if isinstance(module, nn.LayerNorm) else RMSNorm
    return twin(module, axis, names if partial else ())
