"""Twins of layers whose parameters lie on the tensor-parallel axis. State is DTensor, compute is on local tensors.

Every parameter, replicated ones too, is a DTensor on the one axis: optimizers and clipping then see one kind, and a checkpoint
sees true shapes. A dimension that does not divide is split as DTensor does, the first ranks holding one share more; nothing is
padded. `summed` of a twin names the parameters of which each rank computes a part of the gradient; `sum_gradients` adds them up.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from megalith.common.errors import ConfigError, problem
from megalith.parallel import pipeline_deferred as deferred
from megalith.parallel.collectives import (
    Axis,
    Columns,
    Enter,
    Leave,
    finish_gather,
    gather_columns,
    start_gather,
    start_maximum,
    start_sum,
    wait,
)

BUCKET = 1 << 24  # elements of gradients that are summed in one call


def local(parameter: Tensor | None) -> Tensor | None:
    """The plain tensor that this rank holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def share(size: int, axis: Axis) -> tuple[int, int]:
    """(first, number) of this rank's rows of `size` rows."""
    step = -(-size // axis.size)
    first = min(step * axis.rank, size)
    return first, min(step, size - first)


def spread(parameter: Tensor, axis: Axis, dim: int | None) -> nn.Parameter:
    """The parameter as a DTensor on the axis: split along `dim`, or a copy on each rank where None."""
    part, data = parameter.detach(), parameter.detach()
    if dim is not None:
        part = data.narrow(dim, *share(data.shape[dim], axis)).contiguous()
    placement = Replicate() if dim is None else Shard(dim)
    spread = DTensor.from_local(part, axis.mesh, [placement], run_check=False, shape=data.shape, stride=data.stride())
    return nn.Parameter(spread, requires_grad=parameter.requires_grad)


class Linear(nn.Linear):
    """What the split linear layers share. in_features and out_features are those of the whole layer."""

    summed: tuple[str, ...] = ()
    queue: deferred.Queue | None = None  # where gradients of weights are put off

    def __init__(self, old: nn.Linear, axis: Axis):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.axis = old.in_features, old.out_features, axis
        self.weight, self.bias = old.weight, old.bias

    def locals(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias as plain tensors."""
        return local(self.weight), local(self.bias)


class ColumnLinear(Linear):
    """Split by outputs: the input whole (gathered under sequence parallelism), the output this rank's columns."""

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h], under sequence parallelism [b, s/t, h] -> [b, s, out/t]."""
        return columns(x, self.axis, [self])[0]


class KeyValueLinear(ColumnLinear):
    """Keys or values with fewer heads than ranks: the weight is whole on every rank, which computes the one head it needs."""

    summed = ("weight", "bias")

    def __init__(self, old: nn.Linear, axis: Axis, head_dim: int):
        super().__init__(old, axis)
        heads = old.out_features // head_dim
        self.rows = (axis.rank * heads // axis.size * head_dim, head_dim)

    def locals(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows of one head."""
        weight, bias = super().locals()
        return weight.narrow(0, *self.rows), None if bias is None else bias.narrow(0, *self.rows)


class RowLinear(Linear):
    """Split by inputs: the input this rank's columns, the output summed (and split along the sequence)."""

    def __init__(self, old: nn.Linear, axis: Axis):
        super().__init__(old, axis)
        self.summed = ("bias",) if axis.sequence else ()

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, in/t] -> [b, s, out], under sequence parallelism [b, s/t, out]."""
        weight, bias = self.locals()
        y = F.linear(x, weight) if self.queue is None else deferred.linear(x, weight, None, self.queue)
        y = Leave.apply(y, self.axis.size, self.axis.group, self.axis.sequence)
        return y if bias is None else y + bias


class CopiedLinear(Linear):
    """Whole on every rank."""

    def __init__(self, old: nn.Linear, axis: Axis, partial: bool):
        """partial: whether the ranks see different tokens, so that each computes a part of the gradients."""
        super().__init__(old, axis)
        self.summed = ("weight", "bias") if partial else ()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        weight, bias = self.locals()
        return F.linear(x, weight, bias) if self.queue is None else deferred.linear(x, weight, bias, self.queue)


class FirstToken(nn.Module):
    """The first token of sequences of which each rank holds a part. What follows is the same on all ranks."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s/t, h] -> [b, h], that of the first rank."""
        if not self.axis.sequence:  # inside whole_sequences
            return x[:, 0]
        return Fetch.apply(x[:, 0], self.axis.rank == 0, self.axis.group)


class Fetch(torch.autograd.Function):
    """One rank's tensor on all; as all compute the same with it, its gradient is that of its owner."""

    @staticmethod
    def forward(ctx, x: Tensor, mine: bool, group: str) -> Tensor:
        ctx.mine = mine
        return wait(start_sum(x if mine else torch.zeros_like(x), group))

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient if ctx.mine else torch.zeros_like(gradient), None, None


class Head(ColumnLinear):
    """The output layer, split by vocabulary, its bias whole on every rank. Called (for generation), it returns all logits."""

    summed = ("bias",)

    def locals(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows of this rank's part of the vocabulary."""
        weight, bias = super().locals()
        return weight, None if bias is None else bias.narrow(0, *share(self.out_features, self.axis))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h] -> logits [b, s, V]."""
        y, step = super().forward(x), -(-self.out_features // self.axis.size)
        return GatherColumns.apply(F.pad(y, (0, step - y.shape[-1])), self.axis.size, self.axis.rank, self.axis.group)[
            ..., : self.out_features
        ]


class GatherColumns(torch.autograd.Function):
    """Joins the last dimension; what follows is the same on all ranks, so each keeps its part of the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, size: int, rank: int, group: str) -> Tensor:
        ctx.first, ctx.number = x.shape[-1] * rank, x.shape[-1]
        return gather_columns(x, size, group)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[override]
        return gradient.narrow(-1, ctx.first, ctx.number).contiguous(), None, None, None


class VocabularyEmbedding(nn.Embedding):
    """Split by vocabulary: each rank looks up the ids it holds, and the sum over the ranks has them all."""

    summed: tuple[str, ...] = ()

    def __init__(self, old: nn.Embedding, axis: Axis):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.axis, self.weight = old.num_embeddings, old.embedding_dim, axis, old.weight
        self.first, self.number = share(old.num_embeddings, axis)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b, s] -> [b, s, h], under sequence parallelism [b, s/t, h]."""
        self.axis.check(ids.shape[1])
        row = ids - self.first
        here = (row >= 0) & (row < self.number)
        x = F.embedding(torch.where(here, row, 0), local(self.weight))
        x = torch.where(here[..., None], x, 0.0)
        return Leave.apply(x, self.axis.size, self.axis.group, self.axis.sequence)


class PartEmbedding(nn.Embedding):
    """An embedding that every rank holds whole; under sequence parallelism it looks up its part of the sequence."""

    def __init__(self, old: nn.Embedding, axis: Axis):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim, self.axis, self.weight = old.num_embeddings, old.embedding_dim, axis, old.weight
        self.summed = ("weight",) if axis.sequence else ()

    def forward(self, ids: Tensor) -> Tensor:
        """ids [b, s] -> [b, s, h] or [b, s/t, h]."""
        return F.embedding(self.axis.part(ids), local(self.weight))


class LayerNorm(nn.LayerNorm):
    """A norm that every rank holds whole."""

    def __init__(self, old: nn.LayerNorm, axis: Axis, summed: tuple[str, ...]):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = old.normalized_shape, old.eps, old.elementwise_affine
        self.weight, self.bias, self.axis, self.summed = old.weight, old.bias, axis, summed

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        return F.layer_norm(x, self.normalized_shape, local(self.weight), local(self.bias), self.eps)


class RMSNorm(nn.RMSNorm):
    """A norm that every rank holds whole; one with a formula of its own has it as `compute` (layers/norm.py)."""

    def __init__(self, old: nn.RMSNorm, axis: Axis, summed: tuple[str, ...]):
        nn.Module.__init__(self)
        self.normalized_shape, self.eps, self.elementwise_affine = old.normalized_shape, old.eps, old.elementwise_affine
        self.weight, self.axis, self.summed = old.weight, axis, summed
        self.compute = getattr(old, "compute", F.rms_norm)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., h] -> [..., h]."""
        return self.compute(x, self.normalized_shape, local(self.weight), self.eps)


class SharedInput(nn.Module):
    """Several split linear layers of one input: gathered once, one collective backward (layers/linear.py has the other)."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor, *linears: ColumnLinear) -> tuple[Tensor, ...]:
        """x [b, s, h] or [b, s/t, h] -> one [b, s, out/t] of each layer."""
        return columns(x, self.axis, linears)


def columns(x: Tensor, axis: Axis, linears) -> tuple[Tensor, ...]:
    """The outputs of several split linear layers of one input."""
    weights, biases = zip(*(linear.locals() for linear in linears))
    queue = linears[0].queue
    if queue is None:
        return Columns.apply(x, axis.size, axis.group, axis.sequence, *weights, *biases)
    outputs = Columns.apply(x, axis.size, axis.group, axis.sequence, *map(deferred.detach, (*weights, *biases)))
    kept = x.detach()
    whole = functools.cache(lambda: finish_gather(start_gather(kept, axis.size, axis.group), axis.size) if axis.sequence else kept)
    deferred.note(queue, whole, outputs, weights, biases)
    return outputs


class WholeInput(SharedInput):
    """Several split linear layers of an input that is whole on every rank already, and whose gradients `Whole` sums for all of them."""

    def forward(self, x: Tensor, *linears: ColumnLinear) -> tuple[Tensor, ...]:
        """x [b, s, h] -> one [b, s, out/t] of each layer."""
        queue = linears[0].queue
        each = [linear.locals() for linear in linears]
        if queue is None:
            return tuple(F.linear(x, weight, bias) for weight, bias in each)
        return tuple(deferred.linear(x, weight, bias, queue) for weight, bias in each)


class Whole(nn.Module):
    """What many `WholeInput`s share, gathered once forward and its gradient summed once backward: an encoder's output."""

    def __init__(self, axis: Axis):
        super().__init__()
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """x [b, s, h] or [b, s/t, h] -> [b, s, h]."""
        return Enter.apply(x, self.axis.size, self.axis.group, self.axis.sequence)


class HeadTable(nn.Module):
    """A relative bias, of which each rank holds its heads."""

    def __init__(self, old: nn.Module, axis: Axis):
        super().__init__()
        self.weight, self.buckets, self.parts, self.axis = old.weight, old.buckets, old.parts, axis

    def forward(self, length: int) -> Tensor:
        """As layers/positions.py, RelativeBias, for the heads here."""
        return F.embedding(self.buckets(length * self.parts, self.weight.device), local(self.weight)).t()


class PartRows(nn.Module):
    """Dropout of this rank's part of the sequence, keyed by that part of `rows`."""

    def __init__(self, dropout: nn.Module, axis: Axis):
        super().__init__()
        self.dropout, self.axis = dropout, axis

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """x [b, s/t, h], rows [b, s]."""
        return self.dropout(x, None if rows is None else self.axis.part(rows))


class VocabularyPart:
    """This rank's rows of the vocabulary, for the loss (layers/loss.py, Vocabulary, says what each function means)."""

    block = None  # each block would be two collectives

    def __init__(self, axis: Axis, size: int):
        self.axis, (self.first, self.number) = axis, share(size, axis)
        if self.number == 0:
            raise ConfigError(
                problem(
                    "vocab_size",
                    size,
                    f"it must leave each of {axis.size} tensor-parallel ranks a row",
                    "Lower --tensor-model-parallel-size",
                )
            )

    def hidden(self, hidden: Tensor) -> Tensor:
        return Enter.apply(hidden, self.axis.size, self.axis.group, self.axis.sequence)

    def rows(self, weight: Tensor) -> Tensor:
        part = local(weight)
        return part if len(part) == self.number else part.narrow(0, self.first, self.number)  # the bias is whole on every rank

    def find(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        row = labels - self.first
        here = (row >= 0) & (row < rows) & (labels >= 0)
        return torch.where(here, row, 0), here

    def maximum(self, values: Tensor) -> Tensor:
        return wait(start_maximum(values, self.axis.group))

    def total(self, values: Tensor) -> Tensor:
        return wait(start_sum(values, self.axis.group))


@torch.no_grad()
def sum_gradients(model: nn.Module) -> None:
    """Add up over the tensor-parallel ranks the gradients of which each computed a part; once a step, after all others' sums."""
    axis, seen, pending = None, set[int](), dict[torch.dtype, list[Tensor]]()
    for module in model.modules():
        for name in getattr(module, "summed", ()):
            parameter = getattr(module, name)
            if parameter is not None and parameter.grad is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                axis = axis or module.axis
                pending.setdefault(parameter.grad.dtype, []).append(local(parameter.grad))
    for gradients in pending.values():
        for bucket in buckets(gradients, BUCKET):
            flat = wait(start_sum(torch.cat([gradient.flatten() for gradient in bucket]), axis.group))
            parts = flat.split([gradient.numel() for gradient in bucket])
            torch._foreach_copy_(bucket, [part.view(gradient.shape) for part, gradient in zip(parts, bucket)])


def buckets(tensors: list[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The tensors in order, in lists of about `limit` elements."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(held.numel() for held in bucket) >= limit:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


@contextlib.contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Evaluate with sequences whole on every rank, so that any length works (generation). Not for training."""
    axes = {id(axis): axis for module in model.modules() if (axis := getattr(module, "axis", None)) is not None and axis.sequence}
    for axis in axes.values():
        axis.sequence = False
    try:
        yield
    finally:
        for axis in axes.values():
            axis.sequence = True
