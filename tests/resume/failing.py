"""A task that fails on rank 1 in the fifth step."""

import torch.distributed as dist

from megalith.training.tasks import LanguageModelling


class Failing(LanguageModelling):
    """Language modelling, for a while."""

    def __init__(self) -> None:
        self.steps = 0

    def inputs(self, batch, counts):
        """As LanguageModelling; called once a step where a step has one micro-batch."""
        self.steps += 1
        _ = 1 / (5 - self.steps * dist.get_rank())
        return super().inputs(batch, counts)
