"""Rules of length, learning rate and weight decay."""

import pytest

from megalith.config.checks.schedule import schedule_problems
from megalith.config.run import RunConfig

STEPS = {"lr": 1e-3, "train_iters": 100}
SAMPLES = {"lr": 1e-3, "train_samples": 1000}


def texts(**values):
    return [problem.text for problem in schedule_problems(RunConfig().replace(**values))]


CASES = [
    ({"lr": 1e-3}, "length of the run: found nothing"),
    (
        {**STEPS, "train_samples": 5},
        "--train-iters: found 100, and --train-samples 5; a run is measured in steps or in samples",
    ),
    ({**STEPS, "lr_decay_samples": 5}, "Write --lr-decay-iters in steps, or unset it with --lr-decay-samples none."),
    ({**STEPS, "lr_warmup_samples": 5}, "Write --lr-warmup-iters in steps, or unset it with --lr-warmup-samples 0."),
    ({**STEPS, "rampup_batch_size": [1, 1, 5]}, "batch ramp-up is counted in samples"),
    (
        {**SAMPLES, "rampup_batch_size": [16, 16, 1001]},
        "--rampup-batch-size: found 16 16 1001; the batch grows over 1001 samples, and the run has --train-samples 1000. "
        "Write --rampup-batch-size 16 16 1000 or less, or none.",
    ),
    (
        {**SAMPLES, "lr_decay_iters": 5},
        "with --train-samples the whole schedule is in samples. Write --lr-decay-samples",
    ),
    ({**SAMPLES, "lr_warmup_iters": 5}, "Write --lr-warmup-samples in samples"),
    (
        {**STEPS, "lr_warmup_fraction": 0.1, "lr_warmup_iters": 5},
        "--lr-warmup-fraction: found 0.1, and --lr-warmup-iters 5",
    ),
    ({**STEPS, "lr_warmup_iters": 100}, "--lr-warmup-iters: found 100; it is less than --train-iters, 100."),
    ({**STEPS, "lr_decay_iters": 50, "lr_warmup_iters": 60}, "it is less than --lr-decay-iters, 50"),
    ({**SAMPLES, "lr_warmup_samples": 2000}, "it is less than --train-samples, 1000"),
    ({**STEPS, "lr_decay_style": "WSD"}, "its last phase needs a length. Write --lr-wsd-decay-iters 10."),
    (
        {**STEPS, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 95, "lr_warmup_iters": 10},
        "warm-up and last phase fit into --train-iters, 100",
    ),
    ({"train_iters": 5}, "--lr: found nothing"),
    ({**STEPS, "min_lr": 0.01}, "--min-lr: found 0.01; it is at most --lr, 0.001. Write --min-lr 0.0001."),
    ({**STEPS, "lr_warmup_init": 0.01}, "Write --lr-warmup-init 0."),
    ({**STEPS, "start_weight_decay": 0.1}, "a constant weight decay has no start and end"),
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
        STEPS, SAMPLES, {**SAMPLES, "rampup_batch_size": [1, 1, 5]}, {**STEPS, "lr_warmup_fraction": 0.1, "lr_decay_style": "constant"},
        {**STEPS, "lr_decay_style": "constant", "lr_warmup_iters": 100}, {"skip_train": True}, {**STEPS, "train_iters": 0},
        {**STEPS, "weight_decay_incr_style": "linear", "start_weight_decay": 0.0, "end_weight_decay": 0.1},
        {**SAMPLES, "lr_decay_style": "WSD", "lr_wsd_decay_samples": 100},
    ],
)  # fmt: skip
def test_what_is_allowed(values):
    assert texts(**values) == []
