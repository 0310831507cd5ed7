"""BERT with a multiple-choice head: which of several sequences is the right one, a number for each (RACE: Lai et
al., 2017).

As transformers' BertForMultipleChoice and Megatron's MultipleChoice: pooler, dropout, a linear layer to one number.
Shapes: b batch, c choices, s sequence, h hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.models.bert import sequence_loss
from megalith.models.bert_classification import BertClassification
from megalith.models.parts import dropout_rows


class BertMultipleChoice(BertClassification):
    """The encoder, run on every choice, with a classifier to one number over the first token."""

    classes = 1

    def forward(
        self, inputs: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None,
        padding_mask: Tensor | None = None, labels: Tensor | None = None, loss_weights: Tensor | None = None,
        samples: Tensor | None = None, step: Tensor | None = None, coordinates: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """One pass.

        inputs: ids [b, c, s] int64, or hidden states [b, c, s, h] where this part has no embedding.
        positions, token_types, padding_mask: [b, c, s], as in BERT. samples, step, coordinates: as in BERT.
        labels: [b], the right choice. loss_weights: [b], their losses' factors.
        Returns hidden states where this part has no head; logits [b, c]; or with labels (float32 losses [b], logits).
        """
        if coordinates is None:
            coordinates = torch.arange(inputs.shape[2], device=inputs.device)
        shape = b, c = inputs.shape[:2]
        if samples is not None:  # each choice is a sample of its own, with masks of its own
            samples = (samples[:, None] * c + torch.arange(c, device=samples.device)).flatten()
        rows = dropout_rows(self, samples, step, coordinates)
        of_tokens = positions, token_types, padding_mask
        positions, token_types, padding_mask = (None if each is None else each.flatten(0, 1) for each in of_tokens)
        x = self.encode(inputs.flatten(0, 1), positions, token_types, padding_mask, rows, coordinates)
        if self.classifier is None:
            return x.unflatten(0, shape)
        logits = self.classify(x, rows).view(b, c)
        return logits if labels is None else (sequence_loss(logits, labels, loss_weights, coordinates), logits)
