"""Arithmetic of batches: data-parallel size, global batch, micro-batches, batch ramp-up. Whole numbers only, no torch.

Rules as Megatron's (megatron/microbatches.py, megatron/training.py), which a resumed run depends on to the sample.
"""

from __future__ import annotations

from megalith.common.errors import ConfigError, problem
from megalith.config.finetuning import describe_length
from megalith.config.flags.text import flag
from megalith.config.run import RunConfig


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Copies of the model that `world_size` processes hold. Raises ConfigError where they do not come out even."""
    copy = config.parallel.model_parallel_size
    if world_size < 1 or world_size % copy:
        rule = f"must be a multiple of tensor x pipeline x context parallel size, {copy}"
        cure = f"Start {max(1, world_size // copy) * copy} processes"
        raise ConfigError(problem("The number of processes", world_size, rule, cure))
    return world_size // copy


def global_batch(config: RunConfig, dp: int) -> int:
    """Samples of a full step on `dp` data-parallel ranks: --global-batch-size, or one micro-batch of each rank."""
    return config.batch.global_batch_size or (config.batch.micro_batch_size or 1) * dp


def batch_size_at(config: RunConfig, dp: int, consumed: int) -> int:
    """Samples of the step that starts after `consumed` samples; below the global batch size while it ramps up."""
    full = global_batch(config, dp)
    if not config.batch.rampup_batch_size:
        return full
    start, increment, samples = config.batch.rampup_batch_size
    if consumed > samples:
        return full
    increments = (full - start) // increment
    per_increment = samples / increments  # a float on purpose: so the boundaries fall where Megatron's do
    return min(full, start + int(consumed / per_increment) * increment)


def micro_batches(config: RunConfig, dp: int, consumed: int = 0) -> int:
    """Micro-batches that each rank computes in the step that starts after `consumed` samples."""
    return batch_size_at(config, dp, consumed) // ((config.batch.micro_batch_size or 1) * dp)


def ramp(config: RunConfig, dp: int) -> tuple[int, int]:
    """(steps, samples) until the full batch size is reached; (0, 0) without ramp-up."""
    if not config.batch.rampup_batch_size:
        return 0, 0
    steps = consumed = 0
    while consumed <= config.batch.rampup_batch_size[2]:
        consumed += batch_size_at(config, dp, consumed)
        steps += 1
    return steps, consumed


def total_steps(config: RunConfig, dp: int) -> int:
    """Steps of the run: --train-iters, or as many whole batches as --train-samples holds, ramp-up counted."""
    if config.schedule.train_samples is None:
        return config.schedule.train_iters or 0
    steps, consumed = ramp(config, dp)
    return steps + max(0, config.schedule.train_samples - consumed) // global_batch(config, dp)


def steps_left(config: RunConfig, dp: int, consumed: int) -> int:
    """Steps after `consumed` samples of a run of --train-samples that reads each of them: the last may be less full."""
    return -(-max(0, (config.schedule.train_samples or 0) - consumed) // global_batch(config, dp))


def counted_samples(config: RunConfig, samples: int, consumed: int) -> int:
    """How many of a step's `samples` are data: what fills the last batch of a run in epochs is not."""
    if not config.finetuning.epochs or config.schedule.train_samples is None:
        return samples
    return min(samples, config.schedule.train_samples - consumed)


def check_length(config: RunConfig, dp: int) -> None:
    """Raise ConfigError where a run that is to train is shorter than one step."""
    if config.validation.skip_train or config.finetuning.epochs or total_steps(config, dp):
        return
    name = "train_iters" if config.schedule.train_samples is None else "train_samples"
    rule = "must be at least one step, because the run is to train"
    if name == "train_samples":
        rule = f"must be at least one step of {batch_size_at(config, dp, 0)} samples, because the run is to train"
    cure = f"Raise {flag(name)}, or give --skip-train to validate and test what --load gives"
    raise ConfigError(problem(flag(name), getattr(config.schedule, name), rule, cure))


def run_summary(config: RunConfig, world_size: int) -> str:
    """Processes, steps and samples of a run, for its header."""
    dp = data_parallel_size(config, world_size)
    steps, full, (growing, _) = total_steps(config, dp), global_batch(config, dp), ramp(config, dp)
    length = f"{steps} steps, each of {full} samples"
    if config.validation.skip_train:
        length = "no training steps (--skip-train)"
    elif config.finetuning.epochs is not None:
        length = f"{describe_length(config)} in steps of {full} samples"
    elif growing:
        first = batch_size_at(config, dp, 0)
        length = f"{steps} steps: {growing} while the batch grows from {first} to {full} samples, "
        length += f"then {steps - growing} of {full}"
    return f"{world_size} process{'es' * (world_size > 1)}, {dp} data-parallel; {length}"


def total_samples(config: RunConfig, dp: int) -> int:
    """Samples that the run consumes if nothing ends it early."""
    if config.schedule.train_samples is None:
        return total_steps(config, dp) * global_batch(config, dp)
    steps, consumed = ramp(config, dp)
    return consumed + (total_steps(config, dp) - steps) * global_batch(config, dp)
