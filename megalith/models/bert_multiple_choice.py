"""BERT with a multiple-choice head: a score for each of several sequences, of which one is right.

The task of RACE (Lai et al., 2017).

As transformers' BertForMultipleChoice and Megatron's MultipleChoice: pooler, dropout, a linear layer to one number.
Shapes: b batch, c choices, s sequence, h hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.models.bert import sequence_loss
from megalith.models.bert_classification import BertClassification
from megalith.models.components import build_dropout_keys


class BertMultipleChoice(BertClassification):
    """The encoder, run on every choice, with a classifier to one number over the first token."""

    classes = 1

    def forward(
        self, inputs: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None,
        padding_mask: Tensor | None = None, labels: Tensor | None = None, loss_weights: Tensor | None = None,
        samples: Tensor | None = None, step: Tensor | None = None, coordinates: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """The forward pass.

        inputs: ids [b, c, s] int64, or hidden states [b, c, s, h] on a pipeline stage without the embedding.
        positions, token_types, padding_mask: [b, c, s], as in BERT. samples, step, coordinates: as in BERT.
        labels: [b], the right choice. loss_weights: [b], factors of their losses.
        Returns hidden states on a stage without the head; else logits [b, c], or with labels (float32 losses [b],
        logits).
        """
        if coordinates is None:
            coordinates = torch.arange(inputs.shape[2], device=inputs.device)
        shape = b, c = inputs.shape[:2]
        if samples is not None:  # each choice counts as a sample, with its own dropout masks
            samples = (samples[:, None] * c + torch.arange(c, device=samples.device)).flatten()
        dropout_keys = build_dropout_keys(self, samples, step, coordinates)
        tensors = positions, token_types, padding_mask
        positions, token_types, padding_mask = (None if each is None else each.flatten(0, 1) for each in tensors)
        x = self.encode(inputs.flatten(0, 1), positions, token_types, padding_mask, dropout_keys, coordinates)
        if self.classifier is None:
            return x.unflatten(0, shape)
        logits = self.classify(x, dropout_keys).view(b, c)
        return logits if labels is None else (sequence_loss(logits, labels, loss_weights, coordinates), logits)
