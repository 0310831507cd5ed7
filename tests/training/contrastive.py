"""A task of in-batch negatives: samples 2i and 2i + 1 are a pair, all others of the global batch are negatives."""

import torch
import torch.nn.functional as F

from megalith.training.tasks import PooledTask


class Contrastive(PooledTask):
    """Cross entropy of each sample's partner among all others, by the dot product of mean logits; and its accuracy."""

    metric_names = ("accuracy",)

    def counts(self, batch):
        # With context parallelism, one process of a sequence counts its samples.
        here = "coordinates" not in batch or int(batch["coordinates"][0]) == 0
        return {"contrastive loss": torch.tensor(len(batch["input_ids"]) * here)}

    def inputs(self, batch, counts):
        return {"inputs": batch["input_ids"]}

    def pooled(self, output, batch):  # logits [b, s, V], of a part of the tokens with context parallelism
        return {"vectors": output.sum(dim=1) / 16, "numbers": batch["samples"]}

    def scores(self, pool):
        vectors, order = F.normalize(pool["vectors"], dim=-1), pool["numbers"] - pool["numbers"][0]
        return (vectors @ vectors.t() / 0.1).fill_diagonal_(-torch.inf), order ^ 1

    def losses(self, output, batch, counts):
        scores, partners = self.scores(output)
        return {"contrastive loss": F.cross_entropy(scores, partners, reduction="sum") / counts["contrastive loss"]}

    def metrics(self, output, batch):
        scores, partners = self.scores(output)
        return {"accuracy": ((scores.argmax(dim=1) == partners).sum(), len(scores))}
