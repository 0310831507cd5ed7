"""Cross entropy of a large vocabulary without its logits: chunk by chunk, the gradient made in the forward pass.

The logits of a whole batch are often the largest tensor of a training step. Here only those of one chunk of tokens exist,
and they are turned into the gradients of the hidden states and of the weight while they are there, which also saves the
backward pass from computing them again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Vocabulary:
    """Which rows of the head's weight this process holds: all of them. A plan gives `TokenLoss` one that holds a part."""

    block: int | None = 16  # tokens that pass from logits to gradients at one time, None: the chunk (see `_blocks`)

    def hidden(self, hidden: Tensor) -> Tensor:
        """The hidden states of all tokens; their gradient is summed over the parts."""
        return hidden

    def rows(self, weight: Tensor) -> Tensor:
        """The rows of `weight` that are here, as a plain tensor."""
        return weight

    def find(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Of each label the number of its row here, and whether it is here at all (0 where not; nowhere for negative labels)."""
        return labels.clamp(min=0), labels >= 0

    def maximum(self, values: Tensor) -> Tensor:
        """Largest of each value over all parts."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """Sum of each value over all parts."""
        return values


class TokenLoss(nn.Module):
    """Per-token cross entropy of `hidden @ weight.T` against labels; a plan that splits the vocabulary replaces `vocabulary`.

    chunk: tokens whose float32 logits exist at one time. z_loss: weight of log(Z)^2 added to each token's loss
    (Chowdhery et al., 2022, PaLM, section 5). few_labels: pass over tokens without a label, as most of BERT's are, before any logits
    are made; finding them waits for the device once, so it does not pay where nearly all tokens have one.
    """

    def __init__(self, chunk: int = 1024, z_loss: float = 0.0, few_labels: bool = False):
        super().__init__()
        self.chunk, self.z_loss, self.few_labels, self.vocabulary = chunk, z_loss, few_labels, Vocabulary()

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """hidden [b, s, h], weight [V, h], labels [b, s] int64; returns float32 losses [b, s].

        With loss_weights [b, s] each loss is multiplied by its weight, and the gradient is that of their SUM: take no other
        function of them than a sum and a scalar factor, or the gradients become NaN. Labels below 0 count as no loss.
        Without loss_weights any function of the losses may follow, at the price of computing the logits twice.
        """
        vocabulary = self.vocabulary
        hidden, weight, bias = (
            vocabulary.hidden(hidden),
            vocabulary.rows(weight),
            None if bias is None else vocabulary.rows(bias),
        )
        if loss_weights is not None and self.few_labels and bool((seen := labels >= 0).any()):
            found = (hidden[seen][None], weight, bias, labels[seen][None], loss_weights[seen][None])
            losses = _Weighted.apply(*found, self.chunk, self.z_loss, vocabulary)
            return losses.new_zeros(labels.shape).index_put((seen,), losses[0])
        if loss_weights is not None:
            return _Weighted.apply(hidden, weight, bias, labels, loss_weights, self.chunk, self.z_loss, vocabulary)
        return _Free.apply(hidden, weight, bias, labels, self.chunk, self.z_loss, vocabulary)


def chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, spare: Tensor | None = None) -> Tensor:
    """Logits [t, V] of a chunk, float32 (float64 for float64 input); in `spare` [t or more, V], the last chunk's, where that can be.

    A new buffer for each chunk would cost a page fault for every 4 KiB of it: on a CPU some 5 % of the whole step.
    """
    if spare is not None and spare.dtype == hidden.dtype:
        logits = torch.mm(hidden, weight.t(), out=spare[: len(hidden)])
    elif hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Which tokens a chunk has, and their logits, which last until the next chunk."""
    logits = None
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        logits = chunk_logits(hidden[rows], weight, bias, logits)
        yield rows, logits


def _blocks(rows: slice, logits: Tensor, vocabulary: Vocabulary) -> Iterator[tuple[slice, Tensor]]:
    """The tokens of a chunk and their logits, block by block.

    From logits to gradients is some eight passes over them. A block of a few rows stays in a CPU's cache meanwhile, where the
    chunk would come from memory each time: that was 8 % of a training step. Accelerators and parts of a vocabulary, whose every
    block is a collective, take the chunk at once.
    """
    size = vocabulary.block if vocabulary.block and logits.device.type == "cpu" else len(logits)
    for first in range(0, len(logits), size):
        block = logits[first : first + size]
        yield slice(rows.start + first, rows.start + first + len(block)), block


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _block_loss(logits, labels, z_loss, vocabulary):
    """Losses [t] and, in the place of the logits [t, V], the softmax's numerators with their sums [t] and log Z [t]."""
    row, here = vocabulary.find(labels, logits.shape[1])
    at_label = torch.where(here, logits.gather(1, row[:, None])[:, 0], 0.0)
    peak = vocabulary.maximum(logits.amax(dim=1))
    powers = logits.sub_(peak[:, None]).exp_()
    total, at_label = vocabulary.total(torch.stack((powers.sum(dim=1), at_label)))
    log_z = total.log() + peak
    losses = log_z - at_label
    if z_loss:
        losses = losses + z_loss * log_z.square()
    return torch.where(labels >= 0, losses, 0.0), powers, total, log_z


def _block_gradient(powers, total, log_z, labels, upstream, z_loss, vocabulary):
    """Turn `powers` [t, V] into the gradient of sum(upstream x losses) by the logits, in its place."""
    upstream = torch.where(labels >= 0, upstream, 0.0).to(powers.dtype)
    slope = upstream * (1.0 + 2.0 * z_loss * log_z) if z_loss else upstream
    powers.mul_((slope / total)[:, None])
    row, here = vocabulary.find(labels, powers.shape[1])
    powers.scatter_add_(1, row[:, None], torch.where(here, -upstream, 0.0)[:, None])


class _Gradients:
    """Collects the gradients of hidden states, weight and bias from one chunk after another."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]):
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        wide = _wide(weight)
        self.wide, self.needs_weight, self.weight = wide, needs[1], None
        self.bias = torch.zeros(bias.shape, dtype=wide, device=bias.device) if bias is not None and needs[2] else None

    def add(self, rows: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        narrow = gradient.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(narrow, weight, out=self.hidden[rows])
        if self.needs_weight:
            fused = narrow.is_cuda and narrow.dtype != self.wide  # narrow factors, wide sum
            if self.weight is None:
                product = (
                    torch.mm(narrow.t(), hidden[rows], out_dtype=self.wide) if fused else narrow.t() @ hidden[rows]
                )
                self.weight = product.to(self.wide)
            elif fused:
                self.weight = torch.addmm(self.weight, narrow.t(), hidden[rows], out_dtype=self.wide)
            elif narrow.dtype == self.wide:
                self.weight.addmm_(narrow.t(), hidden[rows])
            else:
                self.weight += narrow.t() @ hidden[rows]
        if self.bias is not None:
            self.bias += gradient.sum(dim=0)


class _Weighted(torch.autograd.Function):
    """Losses x weights, with the gradient of their sum made in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, loss_weights, chunk, z_loss, vocabulary):
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        scale = loss_weights.flatten().float()
        losses = torch.empty(targets.shape, device=flat.device, dtype=_wide(flat))
        gradients = _Gradients(flat, weight, bias, ctx.needs_input_grad)
        for rows, logits in _chunks(flat, weight, bias, chunk):
            for few, block in _blocks(rows, logits, vocabulary):
                losses[few], powers, total, log_z = _block_loss(block, targets[few], z_loss, vocabulary)
                if any(ctx.needs_input_grad):
                    _block_gradient(powers, total, log_z, targets[few], scale[few], z_loss, vocabulary)
            if any(ctx.needs_input_grad):
                gradients.add(rows, logits, flat, weight)
        ctx.gradients, ctx.shape, ctx.dtypes = (
            gradients,
            hidden.shape,
            (weight.dtype, None if bias is None else bias.dtype),
        )
        return losses.view(labels.shape) * scale.view(
            labels.shape
        )  # a product, no view: fully_shard cannot hold a view

    @staticmethod
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of weighted token losses are kept for one backward pass; use losses without loss_weights for more"
            )
        made, ctx.gradients = ctx.gradients, None
        factor = torch.where(
            upstream.min() == upstream.max(), upstream.flatten()[0], float("nan")
        )  # NaN: not a plain sum
        # A factor of one is the usual case; knowing it costs a synchronisation, free on the CPU alone.
        scaled = [
            g if g is None or (not factor.is_cuda and factor.item() == 1.0) else g.mul_(factor)
            for g in (made.hidden, made.weight, made.bias)
        ]
        hidden, weight, bias = scaled
        return (
            None if hidden is None else hidden.view(ctx.shape),
            None if weight is None else weight.to(ctx.dtypes[0]),
            None if bias is None else bias.to(ctx.dtypes[1]),
            None, None, None, None, None,
        )  # fmt: skip


class _Free(torch.autograd.Function):
    """Losses whose gradient any function may ask for: the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk, z_loss, vocabulary):
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.chunk, ctx.z_loss, ctx.vocabulary = chunk, z_loss, vocabulary
        losses = torch.empty(targets.shape, device=flat.device, dtype=_wide(flat))
        for rows, logits in _chunks(flat, weight, bias, chunk):
            for few, block in _blocks(rows, logits, vocabulary):
                losses[few] = _block_loss(block, targets[few], z_loss, vocabulary)[0]
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, bias, labels = ctx.saved_tensors
        flat, targets, scale = hidden.flatten(0, 1), labels.flatten(), upstream.flatten()
        gradients = _Gradients(flat, weight, bias, ctx.needs_input_grad)
        for rows, logits in _chunks(flat, weight, bias, ctx.chunk):
            for few, block in _blocks(rows, logits, ctx.vocabulary):
                _, powers, total, log_z = _block_loss(block, targets[few], ctx.z_loss, ctx.vocabulary)
                _block_gradient(powers, total, log_z, targets[few], scale[few], ctx.z_loss, ctx.vocabulary)
            gradients.add(rows, logits, flat, weight)
        return (
            None if gradients.hidden is None else gradients.hidden.view(hidden.shape),
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip
