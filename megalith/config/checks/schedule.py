"""Rules of the run's length, its learning rate and its weight decay."""

from __future__ import annotations

from collections.abc import Iterator

from megalith.config.flags.text import Problem, Words, flag, trouble, value_text
from megalith.config.run import RunConfig

IN_STEPS = ("lr_decay_iters", "lr_warmup_iters", "lr_wsd_decay_iters")
IN_SAMPLES = ("lr_decay_samples", "lr_warmup_samples", "lr_wsd_decay_samples")


def schedule_problems(config: RunConfig) -> Iterator[Problem]:
    """What of the sections schedule and optimizer cannot work together."""
    s, training = config.schedule, not config.validation.skip_train
    if s.train_iters is not None and s.train_samples is not None:
        cure = "Keep one; to drop the one that a recipe or file sets, write --train-iters none or --train-samples none"
        yield trouble(("train_iters", "train_samples"), "--train-iters", Words(f"{s.train_iters}, and --train-samples {s.train_samples}"),
                      "a run is measured in steps or in samples", cure)  # fmt: skip
    elif s.train_iters is not None:
        yield from _other_unit(config, "train_iters", IN_SAMPLES)
    elif s.train_samples is not None:
        yield from _other_unit(config, "train_samples", IN_STEPS)
    elif training:
        yield trouble(("train_iters", "train_samples"), "length of the run", None, "a run needs an end",
                      "Write --train-iters 1000 (steps), or --train-samples")  # fmt: skip
    if s.train_iters is not None and config.batch.rampup_batch_size:
        cure = "Write --train-samples N --train-iters none, and give the schedule in samples too"
        yield trouble(("rampup_batch_size", "train_iters"), "--rampup-batch-size", Words(f"with --train-iters {s.train_iters}"),
                      "batch ramp-up is counted in samples", cure)  # fmt: skip
    ramp = config.batch.rampup_batch_size
    if s.train_samples is not None and len(ramp) == 3 and ramp[2] > s.train_samples:
        yield trouble(("rampup_batch_size", "train_samples"), "--rampup-batch-size", Words(value_text(ramp)),
                      f"the batch grows over {ramp[2]} samples, and the run has --train-samples {s.train_samples}",
                      f"Write --rampup-batch-size {value_text([*ramp[:2], s.train_samples])} or less, or none")  # fmt: skip
    yield from _warmup(config)
    if s.override_opt_param_scheduler and s.use_checkpoint_opt_param_scheduler:
        both = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
        yield trouble(both, "--override-opt-param-scheduler", Words("also --use-checkpoint-opt-param-scheduler"),
                      "the schedule comes from the flags or from the checkpoint", "Leave out one of the two")  # fmt: skip
    yield from _rates(config, training)
    yield from _weight_decay(config)


def _other_unit(config: RunConfig, length: str, others: tuple[str, ...]) -> Iterator[Problem]:
    """Lengths given in the unit that the run is not measured in."""
    unit = "steps" if length == "train_iters" else "samples"
    for name in others:
        value = getattr(config.schedule, name)
        if value:
            ours = name.replace("_samples", "_iters") if unit == "steps" else name.replace("_iters", "_samples")
            rule = f"with {flag(length)} the whole schedule is in {unit}"
            unset = f"{flag(name)} {'none' if value is None or name.startswith(('lr_decay', 'lr_wsd')) else 0}"
            yield trouble(
                (name, length), flag(name), value, rule, f"Write {flag(ours)} in {unit}, or unset it with {unset}"
            )


def _warmup(config: RunConfig) -> Iterator[Problem]:
    s = config.schedule
    given = next((name for name in ("lr_warmup_iters", "lr_warmup_samples") if getattr(s, name)), None)
    if s.lr_warmup_fraction is not None and given:
        found = Words(f"{value_text(s.lr_warmup_fraction)}, and {flag(given)} {getattr(s, given)}")
        yield trouble(("lr_warmup_fraction", given), "--lr-warmup-fraction", found, "warm-up has one length",
                      f"Keep one; --lr-warmup-fraction none and {flag(given)} 0 unset them")  # fmt: skip
        return
    unit = "samples" if s.train_samples is not None else "iters"
    name, length = f"lr_decay_{unit}", f"train_{unit}"
    decay = getattr(s, name) or getattr(s, length)
    source = name if getattr(s, name) else length
    warmup = getattr(s, f"lr_warmup_{unit}")
    if decay and warmup >= decay and s.lr_decay_style != "constant":
        yield trouble((f"lr_warmup_{unit}", source), flag(f"lr_warmup_{unit}"), warmup, f"it is less than {flag(source)}, {decay}",
                      f"Write a shorter warm-up, or --lr-warmup-fraction 0.01 and {flag(f'lr_warmup_{unit}')} 0")  # fmt: skip
    if s.lr_decay_style == "WSD":
        tail = getattr(s, f"lr_wsd_decay_{unit}")
        about = (f"lr_wsd_decay_{unit}", "lr_decay_style")
        if tail is None:
            yield trouble(
                about,
                "--lr-decay-style",
                "WSD",
                "its last phase needs a length",
                f"Write {flag(about[0])} {max(1, (decay or 10) // 10)}",
            )
        elif decay and tail + warmup > decay:
            yield trouble(
                about,
                flag(about[0]),
                tail,
                f"warm-up and last phase fit into {flag(source)}, {decay}",
                "Write a smaller number",
            )


def _rates(config: RunConfig, training: bool) -> Iterator[Problem]:
    o, s = config.optimizer, config.schedule
    if o.lr is None:
        if training:
            yield trouble(
                ("lr",),
                "--lr",
                None,
                "training needs a peak learning rate",
                "Write --lr 3e-4, or start from a recipe with --recipe",
            )
        return
    if o.min_lr > o.lr:
        yield trouble(
            ("min_lr", "lr"), "--min-lr", o.min_lr, f"it is at most --lr, {o.lr}", f"Write --min-lr {o.lr / 10:g}"
        )
    if s.lr_warmup_init > o.lr:
        yield trouble(
            ("lr_warmup_init", "lr"),
            "--lr-warmup-init",
            s.lr_warmup_init,
            f"it is at most --lr, {o.lr}",
            "Write --lr-warmup-init 0",
        )


def _weight_decay(config: RunConfig) -> Iterator[Problem]:
    o = config.optimizer
    about = ("weight_decay_incr_style", "start_weight_decay", "end_weight_decay")
    start, end, style = o.start_weight_decay, o.end_weight_decay, o.weight_decay_incr_style
    if style == "constant":
        if start is not None or end is not None:
            yield trouble(about, "--weight-decay-incr-style", style, "a constant weight decay has no start and end",
                          "Write --weight-decay-incr-style linear (or cosine), or only --weight-decay")  # fmt: skip
    elif start is None or end is None:
        missing = "--start-weight-decay" if start is None else "--end-weight-decay"
        yield trouble(
            about, "--weight-decay-incr-style", style, "it grows from a start to an end", f"Write {missing} too"
        )
    elif end < start:
        yield trouble(
            about, "--end-weight-decay", end, f"it is at least --start-weight-decay, {start}", "Exchange the two"
        )
