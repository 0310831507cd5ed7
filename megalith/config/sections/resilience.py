"""The section `resilience`: how a run ends before its end, and survives it."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class ResilienceConfig:
    """Planned and unplanned exits. Each saves first, except where a run has diverged: saved weights are finite."""

    exit_interval: int | None = option(None, "stop after a step whose number is a multiple of this", minimum=1)
    exit_duration_in_mins: float | None = option(None, "stop after so many minutes", minimum=0.0)
    check_for_nan_in_loss_and_grad: bool = option(
        True,
        "stop where loss or gradients stay infinite or not a number; without it such steps are skipped without end",
    )
    max_nonfinite_steps: int | None = option(
        None,
        "such steps in a row that stop a run (default: 1; 10 with --fp16, whose smaller loss scale must have failed)",
        minimum=1,
    )
    exit_signal_handler: bool = option(
        True, "on SIGTERM or SIGHUP, finish the step (or leave the validation), save, exit with status 0"
    )
