"""Cross entropy of a large vocabulary without all of its logits: chunk by chunk, the gradient made in the forward pass.

The logits of a whole batch are often the largest tensor of a training step. Here only those of one chunk of tokens
exist at a time. The gradients of the hidden states and of the weight are computed from them at once, so that the
backward pass need not compute the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Vocabulary:
    """The rows of the head's weight on this process: all of them. A plan gives `TokenLoss` one that holds a part."""

    first: int = 0  # the token of the first local row
    block: int | None = 16  # tokens of which gradients are computed at a time; None: the whole chunk (`logit_blocks`)

    def copy_hidden(self, hidden: Tensor) -> Tensor:
        """The hidden states of all tokens; their gradient is summed over the ranks."""
        return hidden

    def local_rows(self, weight: Tensor) -> Tensor:
        """The local rows of `weight`, as a tensor and no DTensor."""
        return weight

    def local_labels(self, labels: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """The local row of each label (0 where it has none), and whether it has one; negative labels have none."""
        return labels.clamp(min=0), labels >= 0

    def all_reduce_max(self, values: Tensor) -> Tensor:
        """Maximum of each value over the ranks."""
        return values

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum of each value over the ranks."""
        return values


class TokenLoss(nn.Module):
    """Per-token cross entropy of `hidden @ weight.T` against labels.

    A plan that splits the vocabulary replaces `vocabulary`.
    chunk: tokens whose float32 logits exist at one time.
    z_loss: weight of log(Z)^2, which is added to each token's loss (Chowdhery et al., 2022, PaLM, section 5).
    sparse_labels: skip tokens without a label, as most of BERT's are, before any logits are computed. Finding them
        waits for the device once, so it does not pay where nearly all tokens have one.
    """

    def __init__(self, chunk: int = 1024, z_loss: float = 0.0, sparse_labels: bool = False):
        super().__init__()
        self.chunk, self.z_loss, self.sparse_labels, self.vocabulary = chunk, z_loss, sparse_labels, Vocabulary()

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None, bias: Tensor | None = None
    ) -> Tensor:
        """hidden [b, s, h], weight [V, h], labels [b, s] int64; returns float32 losses [b, s].

        With loss_weights [b, s] each loss is multiplied by its weight, and the gradient is that of their SUM: take no
        other function of them than a sum and a scalar factor, or the gradients become NaN. Labels below 0 have no loss.
        Without loss_weights any function of the losses may follow, at the cost of computing the logits twice.
        """
        vocabulary = self.vocabulary
        hidden = vocabulary.copy_hidden(hidden)
        weight, bias = vocabulary.local_rows(weight), None if bias is None else vocabulary.local_rows(bias)
        if loss_weights is not None and self.sparse_labels and bool((labelled := labels >= 0).any()):
            tokens = (hidden[labelled][None], weight, bias, labels[labelled][None], loss_weights[labelled][None])
            losses = _WeightedLoss.apply(*tokens, self.chunk, self.z_loss, vocabulary)
            return losses.new_zeros(labels.shape).index_put((labelled,), losses[0])
        if loss_weights is not None:
            return _WeightedLoss.apply(hidden, weight, bias, labels, loss_weights, self.chunk, self.z_loss, vocabulary)
        return _UnweightedLoss.apply(hidden, weight, bias, labels, self.chunk, self.z_loss, vocabulary)


def chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, spare: Tensor | None = None) -> Tensor:
    """Logits [t, V] of a chunk, float32 (float64 for float64 input).

    spare: the buffer [t or more, V] of the last chunk's logits, used again where the dtype allows it. A new buffer for
        each chunk would cost a page fault for every 4 KiB of it: on a CPU some 5 % of the whole step.
    """
    if spare is not None and spare.dtype == hidden.dtype:
        logits = torch.mm(hidden, weight.t(), out=spare[: len(hidden)])
    elif hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = hidden @ weight.t()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if bias is None else logits.add_(bias.to(logits.dtype))


def logit_chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, size: int) -> Iterator[tuple[slice, Tensor]]:
    """The tokens of each chunk and their logits, which are overwritten by the next chunk's."""
    logits = None
    for start in range(0, len(hidden), size):
        rows = slice(start, min(start + size, len(hidden)))
        logits = chunk_logits(hidden[rows], weight, bias, logits)
        yield rows, logits


def logit_blocks(rows: slice, logits: Tensor, vocabulary: Vocabulary) -> Iterator[tuple[slice, Tensor]]:
    """The tokens of a chunk and their logits, block by block.

    From logits to gradients takes some eight passes. Meanwhile a block of a few rows stays in a CPU's cache, whereas
    the chunk would come from memory each time: that was 8 % of a training step. Accelerators, and split vocabularies,
    where every block costs collectives, take the chunk at once.
    """
    size = vocabulary.block if vocabulary.block and logits.device.type == "cpu" else len(logits)
    for first in range(0, len(logits), size):
        block = logits[first : first + size]
        yield slice(rows.start + first, rows.start + first + len(block)), block


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _block_loss(logits, labels, z_loss, vocabulary):
    """Losses [t], and overwriting the logits [t, V] the softmax's numerators, with their sums [t] and log Z [t]."""
    row, local = vocabulary.local_labels(labels, logits.shape[1])
    at_label = torch.where(local, logits.gather(1, row[:, None])[:, 0], 0.0)
    maximum = vocabulary.all_reduce_max(logits.amax(dim=1))
    exponentials = logits.sub_(maximum[:, None]).exp_()
    total, at_label = vocabulary.all_reduce_sum(torch.stack((exponentials.sum(dim=1), at_label)))
    log_z = total.log() + maximum
    losses = log_z - at_label
    if z_loss:
        losses = losses + z_loss * log_z.square()
    return torch.where(labels >= 0, losses, 0.0), exponentials, total, log_z


def _block_gradient(exponentials, total, log_z, labels, upstream, z_loss, vocabulary):
    """Turn `exponentials` [t, V], in place, into the gradient of sum(upstream x losses) by the logits."""
    upstream = torch.where(labels >= 0, upstream, 0.0).to(exponentials.dtype)
    slope = upstream * (1.0 + 2.0 * z_loss * log_z) if z_loss else upstream
    exponentials.mul_((slope / total)[:, None])
    row, local = vocabulary.local_labels(labels, exponentials.shape[1])
    exponentials.scatter_add_(1, row[:, None], torch.where(local, -upstream, 0.0)[:, None])


class _Gradients:
    """Collects the gradients of hidden states, weight and bias from one chunk after another."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]):
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        dtype = _at_least_float32(weight)
        self.sum_dtype, self.needs_weight, self.weight = dtype, needs[1], None
        self.bias = torch.zeros(bias.shape, dtype=dtype, device=bias.device) if bias is not None and needs[2] else None

    def add(self, rows: slice, gradient: Tensor, hidden: Tensor, weight: Tensor) -> None:
        narrow = gradient.to(weight.dtype)
        if self.hidden is not None:
            torch.mm(narrow, weight, out=self.hidden[rows])
        if self.needs_weight:
            fused = narrow.is_cuda and narrow.dtype != self.sum_dtype  # 16-bit factors, float32 sum
            if self.weight is None and fused:
                self.weight = torch.mm(narrow.t(), hidden[rows], out_dtype=self.sum_dtype)
            elif self.weight is None:
                self.weight = (narrow.t() @ hidden[rows]).to(self.sum_dtype)
            elif fused:
                self.weight = torch.addmm(self.weight, narrow.t(), hidden[rows], out_dtype=self.sum_dtype)
            elif narrow.dtype == self.sum_dtype:
                self.weight.addmm_(narrow.t(), hidden[rows])
            else:
                self.weight += narrow.t() @ hidden[rows]
        if self.bias is not None:
            self.bias += gradient.sum(dim=0)


class _WeightedLoss(torch.autograd.Function):
    """Losses x weights, with the gradient of their sum computed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, loss_weights, chunk, z_loss, vocabulary):
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        scale = loss_weights.flatten().float()
        losses = torch.empty(targets.shape, device=flat.device, dtype=_at_least_float32(flat))
        gradients = _Gradients(flat, weight, bias, ctx.needs_input_grad)
        for rows, logits in logit_chunks(flat, weight, bias, chunk):
            for tokens, block in logit_blocks(rows, logits, vocabulary):
                losses[tokens], exponentials, total, log_z = _block_loss(block, targets[tokens], z_loss, vocabulary)
                if any(ctx.needs_input_grad):
                    _block_gradient(exponentials, total, log_z, targets[tokens], scale[tokens], z_loss, vocabulary)
            if any(ctx.needs_input_grad):
                gradients.add(rows, logits, flat, weight)
        ctx.gradients, ctx.shape = gradients, hidden.shape
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        # This product is no view, which matters: fully_shard cannot handle an output that is a view.
        return losses.view(labels.shape) * scale.view(labels.shape)

    @staticmethod
    def backward(ctx, upstream):
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of weighted token losses are kept for one backward pass; "
                "use losses without loss_weights for more"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # NaN where the losses were not simply summed.
        factor = torch.where(upstream.min() == upstream.max(), upstream.flatten()[0], float("nan"))
        # The factor is usually one; on a device other than the CPU finding that out would cost a synchronization.
        scaled = [
            g if g is None or (not factor.is_cuda and factor.item() == 1.0) else g.mul_(factor)
            for g in (gradients.hidden, gradients.weight, gradients.bias)
        ]
        hidden, weight, bias = scaled
        return (
            None if hidden is None else hidden.view(ctx.shape),
            None if weight is None else weight.to(ctx.dtypes[0]),
            None if bias is None else bias.to(ctx.dtypes[1]),
            None, None, None, None, None,
        )  # fmt: skip


class _UnweightedLoss(torch.autograd.Function):
    """Losses of which any function may follow: the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, chunk, z_loss, vocabulary):
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        ctx.save_for_backward(hidden, weight, bias, labels)
        ctx.chunk, ctx.z_loss, ctx.vocabulary = chunk, z_loss, vocabulary
        losses = torch.empty(targets.shape, device=flat.device, dtype=_at_least_float32(flat))
        for rows, logits in logit_chunks(flat, weight, bias, chunk):
            for tokens, block in logit_blocks(rows, logits, vocabulary):
                losses[tokens] = _block_loss(block, targets[tokens], z_loss, vocabulary)[0]
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, bias, labels = ctx.saved_tensors
        flat, targets, scale = hidden.flatten(0, 1), labels.flatten(), upstream.flatten()
        gradients = _Gradients(flat, weight, bias, ctx.needs_input_grad)
        for rows, logits in logit_chunks(flat, weight, bias, ctx.chunk):
            for tokens, block in logit_blocks(rows, logits, ctx.vocabulary):
                _, exponentials, total, log_z = _block_loss(block, targets[tokens], ctx.z_loss, ctx.vocabulary)
                _block_gradient(exponentials, total, log_z, targets[tokens], scale[tokens], ctx.z_loss, ctx.vocabulary)
            gradients.add(rows, logits, flat, weight)
        return (
            None if gradients.hidden is None else gradients.hidden.view(hidden.shape),
            None if gradients.weight is None else gradients.weight.to(weight.dtype),
            None if gradients.bias is None else gradients.bias.to(bias.dtype),
            None, None, None, None,
        )  # fmt: skip
