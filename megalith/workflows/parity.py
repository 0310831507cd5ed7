"""The parity check: a user's config in its layout against one process, on this machine, with random data."""

from __future__ import annotations

import dataclasses

import torch

from megalith.common.errors import problem
from megalith.config.batch_math import data_parallel_size, global_batch
from megalith.config.flags.text import Words, fail
from megalith.config.run import RunConfig
from megalith.testing.parity import TOLERANCE, Difference, LayoutResult, compare, measure, merge
from megalith.testing.ranks import MAX_RANKS, RankPool

# The fields that make a layout, with the values of one process.
ONE_PROCESS = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "pipeline_model_parallel_size": 1,
    "pipeline_schedule": "auto",
    "num_layers_per_virtual_pipeline_stage": None,
    "context_parallel_size": 1,
    "use_distributed_optimizer": False,
    "data_parallel_sharding": "none",
    "data_parallel_replicas": 1,
    "recompute_granularity": None,
    "recompute_activations": False,
    "compile": False,
}


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome. differences: of the loss first, then of every gradient, the worst first."""

    expected: LayoutResult
    found: LayoutResult
    differences: list[Difference]
    tolerance: float
    same_weights: bool

    @property
    def equal(self) -> bool:
        """Whether the layout is right."""
        return self.same_weights and all(difference.error <= self.tolerance for difference in self.differences)


def check_possible(config: RunConfig, processes: int) -> None:
    """Raise ConfigError where the machine cannot run the check, or where the config lacks what it needs."""
    problems = []
    if config.model.vocab_size is None:
        rule = "must be given, because the check makes its own data"
        problems.append(problem("--vocab-size", Words("nothing"), rule, "Write --vocab-size 1000"))
    if processes > MAX_RANKS:
        p = config.parallel
        layout = f"tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size}"
        layout += f" x context {p.context_parallel_size} x replicas {p.data_parallel_replicas}"
        rule = f"must be at most {MAX_RANKS}, because one machine runs them all"
        cure = "Check a smaller layout of the same kind"
        problems.append(problem(f"The number of processes ({layout})", processes, rule, cure))
    fail(problems)


def check(config: RunConfig, processes: int, dtype: torch.dtype = torch.float64, timeout: float = 3600.0) -> Result:
    """One step of `config` on `processes` ranks of this machine's CPU, and on one; what each rank holds must be equal.

    dtype: float64 shows errors and no rounding; the config's formats (bf16, fp16) are not used.
    Raises ConfigError where the machine cannot run it.
    """
    check_possible(config, processes)
    samples = global_batch(config, data_parallel_size(config, processes))
    config = config.replace(device="cpu", bf16=False, fp16=False, global_batch_size=samples)
    pool = RankPool()
    try:
        (expected,) = pool.run(measure, 1, config.replace(**ONE_PROCESS), dtype, timeout=timeout)
        parts = pool.run(measure, processes, config, dtype, timeout=timeout)
    finally:
        pool.close()
    found = merge(parts)
    worst: dict[str, Difference] = {}
    for part in [*parts, found]:  # a gradient that several ranks hold must be right on each
        # A rank lacks the gradients of others: the expected ones stand in for them.
        complete = part if part is found else dataclasses.replace(part, gradients=expected.gradients | part.gradients)
        for difference in compare(expected, complete, dtype):
            if difference.name not in worst or difference.error > worst[difference.name].error:
                worst[difference.name] = difference
    loss = worst.pop("loss")
    ordered = sorted(worst.values(), key=lambda difference: -difference.error)
    same = all(
        torch.equal(found.weights.get(name, torch.empty(0)), weight) for name, weight in expected.weights.items()
    )
    return Result(expected, found, [loss, *ordered], TOLERANCE[dtype], same)
