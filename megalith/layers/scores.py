"""How well a model predicts given tokens: their losses, and whether each is the likeliest; for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalith.layers.loss import TokenLoss, Vocabulary, logit_blocks, logit_chunks


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
                rows[tokens] = score(block, targets[tokens], vocabulary)
        return scores.index_put((labelled,), rows)


def score(logits: Tensor, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
    """[t, 2]: the loss of each of the labels [t], and whether it is the likeliest; two collectives over the ranks.

    logits: [t, V / ranks], which are overwritten.
    """
    row, local = vocabulary.local_labels(labels, logits.shape[1])
    at_label = torch.where(local, logits.gather(1, row[:, None])[:, 0], 0.0)
    maximum = vocabulary.all_reduce_max(logits.amax(dim=1))
    before = torch.arange(logits.shape[1], device=logits.device) < (labels - vocabulary.first)[:, None]
    earlier = (before & (logits == maximum[:, None])).sum(dim=1).to(logits.dtype)  # as likely, lower numbers
    total = logits.sub_(maximum[:, None]).exp_().sum(dim=1)
    total, at_label, earlier = vocabulary.all_reduce_sum(torch.stack((total, at_label, earlier)))
    likeliest = (at_label == maximum) & (earlier == 0)
    return torch.stack((total.log() + maximum - at_label, likeliest.to(logits.dtype)), dim=1)
