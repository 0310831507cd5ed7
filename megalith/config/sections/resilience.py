"""The section `resilience`: how a run ends before its end, and survives it."""

from __future__ import annotations

from megalith.config.knobs import knob, section


@section
class ResilienceConfig:
    """Planned and unplanned exits. Each saves first, but for a run that has diverged: what is not finite is never saved."""

    exit_interval: int | None = knob(None, "stop after a step whose number is a multiple of this", minimum=1)
    exit_duration_in_mins: float | None = knob(None, "stop after so many minutes", minimum=0.0)
    check_for_nan_in_loss_and_grad: bool = knob(
        True,
        "stop where loss or gradients stay infinite or not a number; without it such steps are skipped without end",
    )
    max_nonfinite_steps: int | None = knob(
        None,
        "such steps in a row that stop a run (default: 1; 10 with --fp16, whose smaller loss scale must have failed)",
        minimum=1,
    )
    exit_signal_handler: bool = knob(
        True, "on SIGTERM or SIGHUP, finish the step (or leave the validation), save, exit with status 0"
    )
