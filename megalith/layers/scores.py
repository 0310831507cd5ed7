"""How well a model predicts given tokens: their losses, and whether each is the likeliest; for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalith.layers.loss import TokenLoss, Vocabulary, block_losses, logit_blocks, logit_chunks


class TokenScores(nn.Module):
    """In the place of a model's `TokenLoss`, of the same weight and vocabulary. No gradients.

    Hidden states without a label are left out before any logits are computed: of overlapping windows few tokens count,
    and the logits of all of them would be the largest tensor by far. What regularises training (z-loss) is left out.
    """

    def __init__(self, token_loss: TokenLoss):
        super().__init__()
        self.chunk, self.vocabulary = token_loss.chunk, token_loss.vocabulary

    def forward(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, loss_weights: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """hidden [b, s, h], weight [V, h], labels [b, s] int64; returns scores [b, s, 2], float32 or wider.

        scores[..., 0]: cross entropy of the label, in nats. scores[..., 1]: 1 where the label is the likeliest token,
        of equally likely ones the first, else 0. Both are 0 where the label is negative. loss_weights: not used.
        """
        vocabulary, labelled = self.vocabulary, labels >= 0
        weight = vocabulary.local_rows(weight)
        bias = None if bias is None else vocabulary.local_rows(bias)
        flat, targets = hidden[labelled], labels[labelled]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        scores = torch.zeros(*labels.shape, 2, dtype=dtype, device=hidden.device)
        rows = scores.new_empty(len(targets), 2)
        for chunk, logits in logit_chunks(flat, weight, bias, self.chunk):
            for tokens, block in logit_blocks(chunk, logits, vocabulary):
                rows[tokens, 1] = (likeliest(block, vocabulary) == targets[tokens]).to(rows.dtype)
                rows[tokens, 0] = block_losses(block, targets[tokens], 0.0, vocabulary)[0]  # overwrites the logits
        return scores.index_put((labelled,), rows)


def likeliest(logits: Tensor, vocabulary: Vocabulary) -> Tensor:
    """The token with the largest of the logits [t, V / ranks] of each row, int64 [t]; of equal ones the first."""
    values, columns = logits.max(dim=1)
    largest = vocabulary.all_reduce_max(values)
    none = torch.iinfo(torch.int64).max
    tokens = torch.where(values == largest, columns + vocabulary.first, none)
    return -vocabulary.all_reduce_max(-tokens)
