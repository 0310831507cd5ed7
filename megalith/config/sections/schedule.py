"""The section `schedule`: how long a run is, and its learning rate over time."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class ScheduleConfig:
    """Length in steps or in samples (never both), warm-up and decay of the learning rate."""

    train_iters: int | None = option(None, "steps of the run", minimum=0)
    train_samples: int | None = option(None, "samples of the run, instead of --train-iters", minimum=0)
    lr_decay_style: str = option(
        "linear", "shape of the decay", choices=("constant", "linear", "cosine", "inverse-square-root", "WSD")
    )
    lr_decay_iters: int | None = option(None, "steps until --min-lr is reached (default: the run's)", minimum=1)
    lr_decay_samples: int | None = option(None, "the same in samples", minimum=1)
    lr_warmup_iters: int = option(0, "steps of linear warm-up", minimum=0)
    lr_warmup_samples: int = option(0, "samples of linear warm-up", minimum=0)
    lr_warmup_fraction: float | None = option(None, "warm-up as a fraction of the decay, 0 to 1", minimum=0.0)
    lr_warmup_init: float = option(0.0, "learning rate that warm-up starts from", minimum=0.0)
    lr_wsd_decay_style: str = option(
        "exponential", "shape of the last phase of WSD", choices=("linear", "cosine", "exponential", "minus_sqrt")
    )
    lr_wsd_decay_iters: int | None = option(None, "steps of the last phase of WSD", minimum=1)
    lr_wsd_decay_samples: int | None = option(None, "the same in samples", minimum=1)
    override_opt_param_scheduler: bool = option(
        False, "on resume, take the schedule from the flags and not from the checkpoint"
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False, "on resume, take the schedule from the checkpoint even where flags differ"
    )
