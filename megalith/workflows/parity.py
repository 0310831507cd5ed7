"""The parity check: a config in its layout against one process, on this machine, with random data or a user's own."""

from __future__ import annotations

import dataclasses

import torch

from megalith.common.errors import problem
from megalith.config.batch_math import data_parallel_size, global_batch
from megalith.config.flags.text import Words, fail
from megalith.config.run import RunConfig
from megalith.testing.finetuning import STEPS, Steps, measure_steps
from megalith.testing.parity import TOLERANCE, Difference, LayoutResult, compare, measure, merge
from megalith.testing.ranks import MAX_RANKS, RankPool
from megalith.training.build import open_tokenizer
from megalith.training.pretrain import with_vocabulary

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
class Masks:
    """Loss masks compared: of how many samples, with how many tokens that count, and the samples where they differ."""

    samples: int
    tokens: int
    wrong: list[int]


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome. differences: of the loss first, then of every gradient, the worst first. masks: of a user's data."""

    expected: LayoutResult
    found: LayoutResult
    differences: list[Difference]
    tolerance: float
    same_weights: bool
    masks: Masks | None = None

    @property
    def equal(self) -> bool:
        """Whether the layout is right."""
        masks = self.masks is None or not self.masks.wrong
        return (
            masks and self.same_weights and all(difference.error <= self.tolerance for difference in self.differences)
        )


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
    return compare_ranks(expected, parts, dtype, TOLERANCE[dtype])


def check_finetuning(
    config: RunConfig, processes: int, dtype: torch.dtype = torch.float64, timeout: float = 3600.0
) -> list[Result]:
    """The first steps of `config` on its --train-data, on `processes` ranks of this machine's CPU and on one.

    A result for each step (masks, loss, gradients), and one of the weights after all, with adapters merged, in which
    they take the place of the gradients. A step begins with weights that differ by rounding, which an optimizer makes
    larger, so that 100 times as much is allowed from the second on.
    Raises ConfigError or DataError where the machine cannot run it, or the data cannot be used.
    """
    samples = global_batch(config, data_parallel_size(config, processes))
    schedule = RunConfig().replace(train_iters=STEPS).schedule  # the run's warm-up may be longer
    config = dataclasses.replace(config, schedule=schedule).replace(
        device="cpu", bf16=False, fp16=False, global_batch_size=samples, lr=config.optimizer.lr or 1e-4, epochs=None
    )
    config = with_vocabulary(config, open_tokenizer(config)[0])
    check_possible(config, processes)
    pool = RankPool()
    try:
        (one,) = pool.run(measure_steps, 1, config.replace(**ONE_PROCESS), dtype, timeout=timeout)
        ranks = pool.run(measure_steps, processes, config, dtype, timeout=timeout)
    finally:
        pool.close()
    return compare_steps(one, ranks, dtype)


def compare_steps(one: Steps, ranks: list[Steps], dtype: torch.dtype) -> list[Result]:
    """What every rank measured of some steps, against one process; see check_finetuning."""
    results = []
    for number, expected in enumerate(one.steps):
        allowed = TOLERANCE[dtype] * (100 if number else 1)
        result = compare_ranks(expected, [rank.steps[number] for rank in ranks], dtype, allowed)
        if number < len(one.masks):
            masks = same_masks(one.masks[number], [rank.masks[number] for rank in ranks])
            result = dataclasses.replace(result, masks=masks)
        results.append(result)
    return results


def same_masks(expected: dict[int, torch.Tensor], found: list[dict[int, torch.Tensor]]) -> Masks:
    """The masks of one process against those of every rank, which together must have every token of all samples."""
    wrong = set().union(*found) - expected.keys()
    for sample, whole in expected.items():
        parts = [masks[sample] for masks in found if sample in masks]
        here = [~part.isnan() for part in parts]
        complete = bool(parts) and bool(torch.stack(here).any(0).all())
        if not complete or not all(torch.equal(part[has], whole[has]) for part, has in zip(parts, here)):
            wrong.add(sample)
    return Masks(len(expected), sum(int((mask != 0).sum()) for mask in expected.values()), sorted(wrong))


def compare_ranks(expected: LayoutResult, parts: list[LayoutResult], dtype: torch.dtype, tolerance: float) -> Result:
    """What one process computed against what each rank holds, and all of them together."""
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
    return Result(expected, found, [loss, *ordered], tolerance, same)
