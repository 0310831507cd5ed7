"""Rules of the run's length, its learning rate and its weight decay."""

from __future__ import annotations

from collections.abc import Iterator

from megalith.config.flags.text import Problem, Words, field_problem, flag, value_text
from megalith.config.run import RunConfig

IN_STEPS = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
IN_SAMPLES = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")


def schedule_problems(config: RunConfig) -> Iterator[Problem]:
    """What in the sections schedule and optimizer cannot work together."""
    s, training = config.schedule, not config.validation.skip_train
    if s.train_iters is not None and s.train_samples is not None:
        cure = "Keep one; to drop the one that a recipe or file sets, write --train-iters none or --train-samples none"
        rule = "excludes --train-samples, because a run is measured in steps or in samples"
        found = Words(f"{s.train_iters}, and --train-samples {s.train_samples}")
        yield field_problem(("train_iters", "train_samples"), "--train-iters", found, rule, cure)
    elif s.train_iters is not None:
        yield from _other_unit(config, "train_iters", IN_SAMPLES)
    elif s.train_samples is not None:
        yield from _other_unit(config, "train_samples", IN_STEPS)
    elif training and config.finetuning.epochs is None:
        about, cure = ("train_iters", "train_samples"), "Write --train-iters 1000 (steps), or --train-samples"
        cure = cure if config.finetuning.task is None else "Write --epochs 3, or --train-iters 1000 (steps)"
        yield field_problem(about, "The length of the run", None, "must be given", cure)
    if s.train_iters is not None and config.batch.rampup_batch_size:
        cure = "Write --train-samples N --train-iters none, and give the schedule in samples too"
        about, rule = ("rampup_batch_size", "train_iters"), "needs --train-samples, because it is counted in samples"
        yield field_problem(about, "--rampup-batch-size", Words(f"--train-iters {s.train_iters}"), rule, cure)
    ramp = config.batch.rampup_batch_size
    if s.train_samples is not None and len(ramp) == 3 and ramp[2] > s.train_samples:
        about, rule = ("rampup_batch_size", "train_samples"), f"must end within --train-samples {s.train_samples}"
        cure = f"Write --rampup-batch-size {value_text([*ramp[:2], s.train_samples])} or less, or none"
        yield field_problem(about, "--rampup-batch-size", Words(value_text(ramp)), rule, cure)
    yield from _warmup(config)
    if s.override_opt_param_scheduler and s.use_checkpoint_opt_param_scheduler:
        both = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
        rule = "excludes --use-checkpoint-opt-param-scheduler: the schedule comes from the flags or from the checkpoint"
        yield field_problem(both, "--override-opt-param-scheduler", Words("both"), rule, "Leave out one of the two")
    yield from _rates(config, training)
    yield from _weight_decay(config)


def _other_unit(config: RunConfig, length: str, others: tuple[str, ...]) -> Iterator[Problem]:
    """Lengths given in the unit that the run is not measured in."""
    unit = "steps" if length == "train_iters" else "samples"
    for name in others:
        value = getattr(config.schedule, name)
        if value:
            right = name.replace("_samples", "_iters") if unit == "steps" else name.replace("_iters", "_samples")
            rule = f"cannot go with {flag(length)}, with which the whole schedule is in {unit}"
            unset = f"{flag(name)} {'none' if value is None or name.startswith(('lr_decay', 'lr_wsd')) else 0}"
            cure = f"Write {flag(right)} in {unit}, or unset it with {unset}"
            yield field_problem((name, length), flag(name), value, rule, cure)


def _warmup(config: RunConfig) -> Iterator[Problem]:
    s = config.schedule
    given = next((name for name in ("lr_warmup_iters", "lr_warmup_samples") if getattr(s, name)), None)
    if s.lr_warmup_fraction is not None and given:
        found = Words(f"{value_text(s.lr_warmup_fraction)}, and {flag(given)} {getattr(s, given)}")
        rule = f"excludes {flag(given)}, because warm-up has one length"
        cure = f"Keep one; --lr-warmup-fraction none and {flag(given)} 0 unset them"
        yield field_problem(("lr_warmup_fraction", given), "--lr-warmup-fraction", found, rule, cure)
        return
    unit = "samples" if s.train_samples is not None else "iters"
    name, length = f"lr_decay_{unit}", f"train_{unit}"
    decay = getattr(s, name) or getattr(s, length)
    source = name if getattr(s, name) else length
    warmup_name = f"lr_warmup_{unit}"
    warmup = getattr(s, warmup_name)
    if decay and warmup >= decay and s.lr_decay_style != "constant":
        cure = f"Write a shorter warm-up, or --lr-warmup-fraction 0.01 and {flag(warmup_name)} 0"
        rule = f"must be less than {flag(source)}, {decay}"
        yield field_problem((warmup_name, source), flag(warmup_name), warmup, rule, cure)
    if s.lr_decay_style == "WSD":
        tail = getattr(s, f"lr_wsd_decay_{unit}")
        about = (f"lr_wsd_decay_{unit}", "lr_decay_style")
        if tail is None:
            rule = f"needs {flag(about[0])}, the length of the last phase of WSD"
            cure = f"Write {flag(about[0])} {max(1, (decay or 10) // 10)}"
            yield field_problem(about, "--lr-decay-style WSD", None, rule, cure)
        elif decay and tail + warmup > decay:
            rule = f"must fit with the warm-up into {flag(source)}, {decay}"
            yield field_problem(about, flag(about[0]), tail, rule, "Write a smaller number")


def _rates(config: RunConfig, training: bool) -> Iterator[Problem]:
    o, s = config.optimizer, config.schedule
    if o.lr is None:
        if training:
            rule = "must be given, because training needs a peak learning rate"
            yield field_problem(("lr",), "--lr", None, rule, "Write --lr 3e-4, or start from a recipe with --recipe")
        return
    if o.min_lr > o.lr:
        rule = f"must be at most --lr, {o.lr}"
        yield field_problem(("min_lr", "lr"), "--min-lr", o.min_lr, rule, f"Write --min-lr {o.lr / 10:g}")
    if s.lr_warmup_init > o.lr:
        about, rule = ("lr_warmup_init", "lr"), f"must be at most --lr, {o.lr}"
        yield field_problem(about, "--lr-warmup-init", s.lr_warmup_init, rule, "Write --lr-warmup-init 0")


def _weight_decay(config: RunConfig) -> Iterator[Problem]:
    o = config.optimizer
    about = ("weight_decay_incr_style", "start_weight_decay", "end_weight_decay")
    start, end, style = o.start_weight_decay, o.end_weight_decay, o.weight_decay_incr_style
    if style == "constant":
        if start is not None or end is not None:
            rule = "must be linear or cosine for a weight decay with a start and an end"
            cure = "Write --weight-decay-incr-style linear (or cosine), or only --weight-decay"
            yield field_problem(about, "--weight-decay-incr-style", style, rule, cure)
    elif start is None or end is None:
        missing = "--start-weight-decay" if start is None else "--end-weight-decay"
        rule = f"needs {missing}, because weight decay grows from a start to an end"
        yield field_problem(about, f"--weight-decay-incr-style {style}", None, rule, f"Write {missing} too")
    elif end < start:
        rule = f"must be at least --start-weight-decay, {start}"
        yield field_problem(about, "--end-weight-decay", end, rule, "Exchange the two")
