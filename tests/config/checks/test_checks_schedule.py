"""Rules of length, learning rate and weight decay."""

import pytest

from megalith.config.checks.schedule import schedule_problems
from megalith.config.run import RunConfig

STEPS = {"lr": 1e-3, "train_iters": 100}
SAMPLES = {"lr": 1e-3, "train_samples": 1000}


def texts(**values):
    return [problem.text for problem in schedule_problems(RunConfig().replace(**values))]


CASES = [
    (
        {"lr": 1e-3},
        "The length of the run must be given; found nothing. Write --train-iters 1000 (steps), or --train-samples.",
    ),
    (
        {**STEPS, "train_samples": 5},
        "--train-iters excludes --train-samples, because a run is measured in steps or in samples; found 100,"
        " and --train-samples 5. Keep one; to drop the one that a recipe or file sets, write --train-iters "
        "none or --train-samples none.",
    ),
    ({**STEPS, "lr_decay_samples": 5}, "Write --lr-decay-iters in steps, or unset it with --lr-decay-samples none."),
    ({**STEPS, "lr_warmup_samples": 5}, "Write --lr-warmup-iters in steps, or unset it with --lr-warmup-samples 0."),
    (
        {**STEPS, "rampup_batch_size": [1, 1, 5]},
        "--rampup-batch-size needs --train-samples, because it is counted in samples; found --train-iters "
        "100. Write --train-samples N --train-iters none, and give the schedule in samples too.",
    ),
    (
        {**SAMPLES, "rampup_batch_size": [16, 16, 1001]},
        "--rampup-batch-size must end within --train-samples 1000; found 16 16 1001. Write "
        "--rampup-batch-size 16 16 1000 or less, or none.",
    ),
    (
        {**SAMPLES, "lr_decay_iters": 5},
        "--lr-decay-iters cannot go with --train-samples, with which the whole schedule is in samples; found "
        "5. Write --lr-decay-samples in samples, or unset it with --lr-decay-iters none.",
    ),
    ({**SAMPLES, "lr_warmup_iters": 5}, "Write --lr-warmup-samples in samples"),
    (
        {**STEPS, "lr_warmup_fraction": 0.1, "lr_warmup_iters": 5},
        "--lr-warmup-fraction excludes --lr-warmup-iters, because warm-up has one length; found 0.1, and "
        "--lr-warmup-iters 5. Keep one; --lr-warmup-fraction none and --lr-warmup-iters 0 unset them.",
    ),
    (
        {**STEPS, "lr_warmup_iters": 100},
        "--lr-warmup-iters must be less than --train-iters, 100; found 100. Write a shorter warm-up, or "
        "--lr-warmup-fraction 0.01 and --lr-warmup-iters 0.",
    ),
    (
        {**STEPS, "lr_decay_iters": 50, "lr_warmup_iters": 60},
        "--lr-warmup-iters must be less than --lr-decay-iters, 50; found 60. Write a shorter warm-up, or "
        "--lr-warmup-fraction 0.01 and --lr-warmup-iters 0.",
    ),
    (
        {**SAMPLES, "lr_warmup_samples": 2000},
        "--lr-warmup-samples must be less than --train-samples, 1000; found 2000. Write a shorter warm-up, or"
        " --lr-warmup-fraction 0.01 and --lr-warmup-samples 0.",
    ),
    (
        {**STEPS, "lr_decay_style": "WSD"},
        "--lr-decay-style WSD needs --lr-wsd-decay-iters, the length of the last phase of WSD; found nothing."
        " Write --lr-wsd-decay-iters 10.",
    ),
    (
        {**STEPS, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 95, "lr_warmup_iters": 10},
        "--lr-wsd-decay-iters must fit with the warm-up into --train-iters, 100; found 95. Write a smaller number.",
    ),
    (
        {"train_iters": 5},
        "--lr must be given, because training needs a peak learning rate; found nothing. Write --lr 3e-4, or "
        "start from a recipe with --recipe.",
    ),
    ({**STEPS, "min_lr": 0.01}, "--min-lr must be at most --lr, 0.001; found 0.01. Write --min-lr 0.0001."),
    ({**STEPS, "lr_warmup_init": 0.01}, "Write --lr-warmup-init 0."),
    (
        {**STEPS, "start_weight_decay": 0.1},
        "--weight-decay-incr-style must be linear or cosine for a weight decay with a start and an end; found"
        " 'constant'. Write --weight-decay-incr-style linear (or cosine), or only --weight-decay.",
    ),
    ({**STEPS, "weight_decay_incr_style": "linear", "start_weight_decay": 0.1}, "Write --end-weight-decay too."),
    (
        {**STEPS, "weight_decay_incr_style": "cosine", "start_weight_decay": 0.1, "end_weight_decay": 0.01},
        "Exchange the two.",
    ),
    (
        {**STEPS, "override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
        "Leave out one of the two.",
    ),
]


@pytest.mark.parametrize(("values", "message"), CASES)
def test_each_rule(values, message):
    (text,) = texts(**values)
    assert message in text


@pytest.mark.parametrize(
    "values",
    [
        STEPS,
        SAMPLES,
        {**SAMPLES, "rampup_batch_size": [1, 1, 5]},
        {**STEPS, "lr_warmup_fraction": 0.1, "lr_decay_style": "constant"},
        {**STEPS, "lr_decay_style": "constant", "lr_warmup_iters": 100},
        {"skip_train": True},
        {**STEPS, "train_iters": 0},
        {**STEPS, "weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1},
        {**SAMPLES, "lr_decay_style": "WSD", "lr_wsd_decay_samples": 100},
    ],
)
def test_what_is_allowed(values):
    assert texts(**values) == []
