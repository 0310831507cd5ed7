"""The section `logging`: what a run records and prints."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class LoggingConfig:
    """The run folder and what is written into it."""

    name: str = option("gpt", "name of the run; its folder is runs/<name> where neither --run-dir nor --save is given")
    run_dir: str | None = option(
        None, "folder of the run's record: config, metrics, pictures (default: --save, else runs/<name>)"
    )
    log_interval: int = option(100, "steps between log lines", minimum=1)
    log_params_norm: bool = option(False, "log the norm of all parameters")
    profile_pipeline: bool = option(
        False, "time one step of the pipeline and draw it beside the schedule's ideal (pipeline.png)"
    )
    log_num_zeros_in_grad: bool = option(False, "log how many gradient elements are zero")
    progress: str = option(
        "auto", "progress display: rich on a terminal, lines elsewhere", choices=("auto", "rich", "lines", "none")
    )
    tensorboard_dir: str | None = option(None, "also write tensorboard scalars here (needs the extra 'track')")
    peak_tflops: float | None = option(
        None, "peak TFLOP/s of one device, for MFU (default: by device name)", minimum=0.0
    )
