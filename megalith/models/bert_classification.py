"""BERT with a classification head: a class for each sequence, or pair of sequences (Devlin et al., 2019, section 4.1).

As transformers' BertForSequenceClassification and Megatron's Classification: pooler, dropout, one linear layer.
Shapes: b batch, s sequence, h hidden, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalith.config.sections.model import ModelConfig
from megalith.layers.dropout import Dropout
from megalith.models.bert import Encoder, FirstToken, sequence_loss
from megalith.models.components import build_dropout_keys


class BertClassification(Encoder):
    """The encoder with a classifier over the first token. On a pipeline stage some modules are None."""

    classes: int | None = None  # number of classes where it is not config.num_classes

    def __init__(self, config: ModelConfig, seed: int = 0):
        """config.vocab_size must be known. `seed` keys the dropout masks. Parameters are left as torch draws them."""
        super().__init__(config, seed)
        self.first_token = FirstToken()
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        self.classifier_dropout = Dropout(config.head_dropout, "classifier")
        self.classifier = nn.Linear(config.hidden_size, self.classes or config.num_classes)

    def forward(
        self, inputs: Tensor, positions: Tensor | None = None, token_types: Tensor | None = None,
        padding_mask: Tensor | None = None, labels: Tensor | None = None, loss_weights: Tensor | None = None,
        samples: Tensor | None = None, step: Tensor | None = None, coordinates: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """The forward pass.

        inputs: ids [b, s] int64, or hidden states [b, s, h] on a pipeline stage without the embedding.
        positions, token_types, padding_mask, samples, step, coordinates: as in BERT.
        labels: [b], classes from 0 on. loss_weights: [b], factors of their losses.
        Returns hidden states on a stage without the head; else logits [b, C], or with labels (float32 losses [b],
        logits). Losses with weights are 0 where the sequence's first token is not among these tokens.
        """
        if coordinates is None:
            coordinates = torch.arange(inputs.shape[1], device=inputs.device)
        dropout_keys = build_dropout_keys(self, samples, step, coordinates)
        x = self.encode(inputs, positions, token_types, padding_mask, dropout_keys, coordinates)
        if self.classifier is None:
            return x
        logits = self.classify(x, dropout_keys)
        return logits if labels is None else (sequence_loss(logits, labels, loss_weights, coordinates), logits)

    def classify(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        """[b, s, h], dropout keys [b, s] -> logits [b, C]."""
        pooled = torch.tanh(self.pooler(self.first_token(x)))
        return self.classifier(self.classifier_dropout(pooled, None if dropout_keys is None else dropout_keys[:, 0]))
