"""The parity check: a user's config in its layout against one process, on this machine, with made-up data."""

from __future__ import annotations

import dataclasses

import torch

from megalith.common.errors import problem
from megalith.config.batch_math import data_parallel_size, global_batch
from megalith.config.flags.text import Words, fail
from megalith.config.run import RunConfig
from megalith.testing.parity import TOLERANCE, Difference, Measured, compare, measure, merge
from megalith.testing.ranks import LARGEST, RankPool

# What makes a layout, and what one process has instead.
ALONE = {
    "tensor_model_parallel_size": 1, "sequence_parallel": False, "pipeline_model_parallel_size": 1, "pipeline_schedule": "auto",
    "num_layers_per_virtual_pipeline_stage": None, "context_parallel_size": 1, "use_distributed_optimizer": False,
    "data_parallel_sharding": "none", "data_parallel_replicas": 1, "recompute_granularity": None, "recompute_activations": False,
    "compile": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome. differences: of the loss first, then of every gradient, the worst first."""

    expected: Measured
    found: Measured
    differences: list[Difference]
    tolerance: float
    same_weights: bool

    @property
    def equal(self) -> bool:
        """Whether the layout is right."""
        return self.same_weights and all(difference.error <= self.tolerance for difference in self.differences)


def check_possible(config: RunConfig, processes: int) -> None:
    """Raise ConfigError where the machine cannot run the check, or where it is not told what to run."""
    faults = []
    if config.model.vocab_size is None:
        rule = "the check makes its data up and needs the size alone"
        faults.append(problem("--vocab-size", Words("nothing"), rule, "Write --vocab-size 1000"))
    if processes > LARGEST:
        p = config.parallel
        rule = f"one machine runs up to {LARGEST} ranks for this; the layout is tensor {p.tensor_model_parallel_size} x pipeline "
        rule += f"{p.pipeline_model_parallel_size} x context {p.context_parallel_size} x replicas {p.data_parallel_replicas}"
        faults.append(problem("number of processes", processes, rule, "Check a smaller layout of the same kind"))
    fail(faults)


def check(config: RunConfig, processes: int, dtype: torch.dtype = torch.float64, timeout: float = 3600.0) -> Result:
    """One step of `config` on `processes` ranks of this machine's CPU, and on one; every rank must have what one has.

    dtype: float64 finds what is wrong, not what is rounded; formats of the config (bf16, fp16) are left aside.
    Raises ConfigError where the machine cannot run it.
    """
    check_possible(config, processes)
    samples = global_batch(config, data_parallel_size(config, processes))
    config = config.replace(device="cpu", bf16=False, fp16=False, global_batch_size=samples)
    pool = RankPool()
    try:
        (expected,) = pool.run(measure, 1, config.replace(**ALONE), dtype, timeout=timeout)
        parts = pool.run(measure, processes, config, dtype, timeout=timeout)
    finally:
        pool.close()
    found = merge(parts)
    worst: dict[str, Difference] = {}
    for part in [*parts, found]:  # what several ranks hold must be right on each
        own = part if part is found else dataclasses.replace(part, gradients=expected.gradients | part.gradients)
        for difference in compare(expected, own, dtype):
            if difference.name not in worst or difference.error > worst[difference.name].error:
                worst[difference.name] = difference
    loss = worst.pop("loss")
    ordered = sorted(worst.values(), key=lambda difference: -difference.error)
    same = all(
        torch.equal(found.weights.get(name, torch.empty(0)), weight) for name, weight in expected.weights.items()
    )
    return Result(expected, found, [loss, *ordered], TOLERANCE[dtype], same)
