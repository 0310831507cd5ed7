"""Learning rate and weight decay as pure functions of the samples trained on so far.

Samples, not steps, because a batch may grow during a run. The numbers are Megatron's, so that a run of Megatron can be
resumed here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.config.sections.optimizer import OptimizerConfig
from megalith.config.sections.schedule import ScheduleConfig

_SHAPES = {  # from the fraction of the decay that is done, 0 to 1, to the fraction of (peak - minimum) that is left
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (math.cos(math.pi * x) + 1.0),
    "exponential": lambda x: 2.0 * 0.5**x - 1.0,
    "minus_sqrt": lambda x: 1.0 - math.sqrt(x),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleParameters:
    """Everything a schedule depends on; lengths are in samples. This is what a checkpoint keeps."""

    lr: float
    min_lr: float
    lr_warmup_init: float
    warmup_samples: float
    decay_samples: int
    lr_decay_style: str
    wsd_decay_samples: int
    lr_wsd_decay_style: str
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_samples: int
    weight_decay_incr_style: str


class Schedule:
    """The schedule of one run.

    The argument `samples` of `lr` and `weight_decay` counts the samples of *successful* steps before the step in
    question. It is 0 in the first step, which therefore has the warm-up's initial rate (0 by default, as in Megatron),
    and does not count a step that was skipped because of an fp16 overflow.
    """

    def __init__(self, optimizer: OptimizerConfig, schedule: ScheduleConfig, global_batch_size: int):
        """`global_batch_size` is the final one (after a ramp-up); lengths given in steps are multiplied by it.

        Raises a ConfigError that lists all invalid values.
        """
        self.config = schedule
        self.parameters = _schedule_parameters(optimizer, schedule, global_batch_size)

    def lr(self, samples: int) -> float:
        """Learning rate of the step that starts after `samples` samples."""
        c = self.parameters
        if c.warmup_samples > 0 and samples <= c.warmup_samples:
            return c.lr_warmup_init + (c.lr - c.lr_warmup_init) * samples / c.warmup_samples
        if c.lr_decay_style == "constant":
            return c.lr
        if samples > c.decay_samples:
            return c.min_lr
        if c.lr_decay_style == "inverse-square-root":
            return max(c.min_lr, c.lr * math.sqrt(max(c.warmup_samples, 1)) / math.sqrt(max(samples, 1)))
        if c.lr_decay_style == "WSD":
            done = max(0.0, (samples - (c.decay_samples - c.wsd_decay_samples)) / c.wsd_decay_samples)
            return c.min_lr + _SHAPES[c.lr_wsd_decay_style](done) * (c.lr - c.min_lr)
        done = (samples - c.warmup_samples) / (c.decay_samples - c.warmup_samples)
        return c.min_lr + _SHAPES[c.lr_decay_style](done) * (c.lr - c.min_lr)

    def weight_decay(self, samples: int) -> float:
        """Weight decay of the step that starts after `samples` samples."""
        c = self.parameters
        if c.weight_decay_incr_style == "constant" or samples > c.weight_decay_samples:
            return c.end_weight_decay
        done = samples / c.weight_decay_samples
        if c.weight_decay_incr_style == "cosine":
            done = 0.5 * (math.cos(math.pi * (1.0 - done)) + 1.0)
        return c.start_weight_decay + done * (c.end_weight_decay - c.start_weight_decay)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: numbers and names. (The progress is the run's count of samples.)"""
        return dataclasses.asdict(self.parameters)

    def check_state(self, stored: dict[str, Any]) -> None:
        """Raise a ConfigError that lists the differences between `stored`, a checkpoint's state, and the flags."""
        differing = [
            f"{name}: {stored[name]!r} in the checkpoint, {value!r} by the flags"
            for name, value in self.state().items()
            if name in stored and stored[name] != value
        ]
        if differing:
            raise ConfigError(
                "The schedule of the checkpoint is not the one that the flags describe:\n  "
                + "\n  ".join(differing)
                + "\nGive --override-opt-param-scheduler to resume with the flags' schedule, "
                "or --use-checkpoint-opt-param-scheduler to resume with the checkpoint's."
            )

    def resumed(self, stored: dict[str, Any]) -> Schedule:
        """The schedule to resume with: that of the flags or of `stored`, a checkpoint's state, as the two flags say.

        Raises ConfigError where they differ and no flag decides.
        """
        if self.config.override_opt_param_scheduler:
            return self
        if not self.config.use_checkpoint_opt_param_scheduler:
            self.check_state(stored)
        resumed = copy.copy(self)
        resumed.parameters = dataclasses.replace(
            self.parameters, **{name: stored[name] for name in self.state() if name in stored}
        )
        return resumed


def _schedule_parameters(optimizer: OptimizerConfig, schedule: ScheduleConfig, batch: int) -> ScheduleParameters:
    """Megatron's arithmetic from flags to samples, and the rules for its results."""
    problems = _conflicts(optimizer, schedule)
    if problems:
        raise ConfigError("\n".join(problems))

    def length(steps: int | None, samples: int | None, default: int) -> int:
        return samples if samples is not None else steps * batch if steps is not None else default

    run = length(schedule.train_iters, schedule.train_samples, 0)
    # At least 1, so that a run of no steps has a schedule too.
    decay = max(length(schedule.lr_decay_iters, schedule.lr_decay_samples, run), 1)
    if schedule.lr_warmup_fraction is not None:
        warmup: float = schedule.lr_warmup_fraction * decay
    else:
        warmup = schedule.lr_warmup_iters * batch or schedule.lr_warmup_samples
    tail = length(schedule.lr_wsd_decay_iters, schedule.lr_wsd_decay_samples, 0)
    if warmup >= decay:
        rule = f"must be shorter than the decay of {decay} samples"
        cure = (
            "Lower --lr-warmup-iters, --lr-warmup-samples or --lr-warmup-fraction, "
            "or raise --lr-decay-iters or --lr-decay-samples"
        )
        problems.append(problem("The warm-up of the learning rate", Words(f"{warmup:g} samples"), rule, cure))
    if schedule.lr_decay_style == "WSD" and tail > decay - warmup:
        rule = f"must fit, with the warm-up, into the decay of {decay} samples"
        cure = "Lower --lr-wsd-decay-iters or --lr-wsd-decay-samples"
        problems.append(problem("The last phase of WSD", Words(f"{tail} samples"), rule, cure))
    if problems:
        raise ConfigError("\n".join(problems))
    constant = optimizer.weight_decay_incr_style == "constant"
    return ScheduleParameters(
        lr=float(optimizer.lr or 0.0),
        min_lr=float(optimizer.min_lr),
        lr_warmup_init=float(schedule.lr_warmup_init),
        warmup_samples=warmup,
        decay_samples=decay,
        lr_decay_style=schedule.lr_decay_style,
        wsd_decay_samples=tail,
        lr_wsd_decay_style=schedule.lr_wsd_decay_style,
        start_weight_decay=float(optimizer.weight_decay if constant else optimizer.start_weight_decay or 0.0),
        end_weight_decay=float(optimizer.weight_decay if constant else optimizer.end_weight_decay or 0.0),
        weight_decay_samples=max(run, 1),
        weight_decay_incr_style=optimizer.weight_decay_incr_style,
    )


def _conflicts(optimizer: OptimizerConfig, schedule: ScheduleConfig) -> list[str]:
    """The problems that can be seen without the batch size."""
    o, s = optimizer, schedule
    fraction, in_steps, in_samples = s.lr_warmup_fraction, s.train_iters is not None, s.train_samples is not None
    steps_given = [name for name in ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters") if getattr(s, name)]
    samples_given = [
        name for name in ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples") if getattr(s, name)
    ]
    growing = o.weight_decay_incr_style != "constant"
    both = s.override_opt_param_scheduler and s.use_checkpoint_opt_param_scheduler
    decay_range = start, end = o.start_weight_decay, o.end_weight_decay
    nothing = Words("nothing")
    rules = [
        (o.lr is None, "--lr", nothing,
         "must be given, because training needs a peak learning rate", "Give --lr, for example --lr 3e-4"),
        (o.lr is not None and o.min_lr > o.lr, "--min-lr", o.min_lr,
         f"must be at most --lr {o.lr}", "Lower --min-lr"),
        (o.lr is not None and s.lr_warmup_init > o.lr, "--lr-warmup-init", s.lr_warmup_init,
         f"must be at most --lr {o.lr}", "Lower it"),
        (not in_steps and not in_samples, "The length of the run", nothing,
         "must be given in steps or in samples", "Give --train-iters or --train-samples"),
        (in_steps and in_samples, "--train-iters and --train-samples", _both(s.train_iters, s.train_samples),
         "are two lengths of the run, of which only one may be given", "Leave one out"),
        (in_samples and bool(steps_given), _flags(steps_given), Words("steps"),
         "must be in samples for a run of --train-samples", "Use the flags that end in -samples"),
        (in_steps and bool(samples_given), _flags(samples_given), Words("samples"),
         "must be in steps for a run of --train-iters", "Use the flags that end in -iters"),
        (fraction is not None and bool(s.lr_warmup_iters or s.lr_warmup_samples), "--lr-warmup-fraction", fraction,
         "must be the only length of the warm-up", "Leave it out, or --lr-warmup-iters / --lr-warmup-samples"),
        (s.lr_decay_style == "WSD" and not (s.lr_wsd_decay_iters or s.lr_wsd_decay_samples),
         "The last phase of WSD", nothing, "must have a length, as --lr-decay-style WSD is given",
         "Give --lr-wsd-decay-iters or --lr-wsd-decay-samples"),
        (growing and None in decay_range, "--start-weight-decay and --end-weight-decay", _both(start, end),
         f"must both be given with --weight-decay-incr-style {o.weight_decay_incr_style}", "Give both"),
        (growing and (start or 0.0) > (math.inf if end is None else end), "--start-weight-decay", start,
         f"must be at most --end-weight-decay {end}", "Swap them"),
        (not growing and decay_range != (None, None), "--start-weight-decay and --end-weight-decay", _both(start, end),
         "have no meaning for a constant weight decay",
         "Give --weight-decay-incr-style linear or cosine, or --weight-decay alone"),
        (both, "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler", Words("both"),
         "contradict each other", "Leave one out"),
    ]  # fmt: skip
    return [problem(what, found, rule, cure) for violated, what, found, rule, cure in rules if violated]


def _both(*values: float | None) -> Words:
    return Words(" and ".join("nothing" if value is None else str(value) for value in values))


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
