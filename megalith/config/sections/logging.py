"""The section `logging`: what a run tells."""

from __future__ import annotations

from megalith.config.knobs import knob, section


@section
class LoggingConfig:
    """The run folder and what is written into it."""

    name: str = knob("gpt", "name of the run; its folder is runs/<name> where neither --run-dir nor --save is given")
    run_dir: str | None = knob(
        None, "folder of the run's record: config, metrics, pictures (default: --save, else runs/<name>)"
    )
    log_interval: int = knob(100, "steps between log lines", minimum=1)
    log_params_norm: bool = knob(False, "log the norm of all parameters")
    profile_pipeline: bool = knob(
        False, "time one step of the pipeline and draw it beside the schedule's ideal (pipeline.png)"
    )
    log_num_zeros_in_grad: bool = knob(False, "log how many gradient elements are zero")
    progress: str = knob(
        "auto", "progress display: rich on a terminal, lines elsewhere", choices=("auto", "rich", "lines", "none")
    )
    tensorboard_dir: str | None = knob(None, "also write tensorboard scalars here (needs the extra 'track')")
    peak_tflops: float | None = knob(None, "peak TFLOP/s of one device, for MFU (default: by device name)", minimum=0.0)
