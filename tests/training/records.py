"""Records that the tests of callbacks share."""

import pathlib

from megalith.config.run import RunConfig
from megalith.training.callbacks import RunInfo, StepRecord


def run_info(folder=pathlib.Path("unused"), *, config=None, **fields):
    defaults = {
        "config": RunConfig().replace(**{"log_interval": 2, "progress": "lines"} | (config or {})),
        "folder": folder,
        "train_iters": 10,
    }
    return RunInfo(**(defaults | fields))


def step(number, losses=None, **fields):
    defaults = {
        "step": number,
        "consumed_samples": number * 8,
        "losses": {"lm loss": 3.0} if losses is None else losses,
        "learning_rate": 1.5e-4,
        "weight_decay": 0.01,
        "global_batch_size": 8,
        "tokens": 1000,
        "seconds": 0.5,
        "grad_norm": 1.25,
    }
    return StepRecord(**(defaults | fields))
