"""What callbacks are given."""

import math

from megalith.training.callbacks import Callback, ValidationRecord
from tests.training.records import run_info, step


def test_the_last_rank_writes():
    assert [run_info(rank=rank, world_size=4).writes for rank in range(4)] == [False, False, False, True]
    assert run_info().writes


def test_the_total_is_of_losses_and_not_of_accuracies():
    assert step(1, {"lm loss": 2.5, "sop loss": 0.5}).total_loss == 3.0
    assert step(1, {"loss": 2.5}, metrics={"top1_acc": 40.0}).total_loss == 2.5
    assert math.isnan(step(1, {"lm loss": math.nan}).total_loss)


def test_a_callback_overrides_what_it_needs():
    class Count(Callback):
        seen = 0

        def on_step(self, run, record):
            self.seen += 1

    callback, run = Count(), run_info()
    callback.on_start(run)
    callback.on_step(run, step(1))
    callback.on_validation(run, ValidationRecord(step=1, consumed_samples=8, losses={"lm loss": 3.0}))
    callback.on_end(run)
    assert callback.seen == 1
