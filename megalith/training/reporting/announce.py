"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megalith.config.stages import layers_of, schedule_of
from megalith.data.build import told, without_validation
from megalith.training.build import device_name
from megalith.training.resume import saving
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer


def announce(
    trainer: Trainer,
    progress: Progress,
    train_iters: int,
    datasets: Mapping[str, Any],
    changed: Sequence[str],
    owed: Sequence[str],
) -> None:
    """Say what is about to run, in a few lines. One process alone calls this.

    changed: how it differs from the checkpoint that it starts from.
    owed: the splits whose loss at the present step is not known.
    """
    config, mesh = trainer.runtime.config, trainer.runtime.mesh
    devices = f"{mesh.world_size} x {device_name(mesh.device)}, {config.precision.compute_dtype}"
    print(
        f"{config.model.model_type} with {trainer.runtime.num_parameters:,} parameters on {devices}; "
        f"activation {config.model.activation}; run folder {config.run_folder}",
        flush=True,
    )
    if mesh.size("pp") > 1:
        stages = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in layers_of(config))
        print(f"pipeline: {schedule_of(config.parallel)}, layers by stage {stages}", flush=True)
    if line := saving.loaded(trainer):
        print(line, flush=True)
    if progress.iteration:
        left = f"what is left is the loss of its {' and '.join(owed)} data" if owed else "nothing is left to do"
        more = "raise --train-iters, with --override-opt-param-scheduler, to go on"
        done = f"; that is all of them, {left} ({more})" if progress.iteration >= train_iters > 0 else ""
        step = progress.iteration
        doing = f"resuming after step {step} of {train_iters}{done}" if train_iters else f"measuring step {step}"
        print(doing, flush=True)
    for line in changed:
        print(f"  changed since that checkpoint: {line}", flush=True)
    print("".join(f"  {line}\n" for line in told(datasets["train"])), end="", flush=True)
    if datasets["valid"] is None and config.validation.eval_iters:
        print(without_validation(config.data, datasets["train"]), flush=True)
