"""The lines that a run prints before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.config.adapters import adapted_modules, adapter_shapes, trained_whole
from megalith.config.stages import layers_of, schedule_of
from megalith.data.build import blend_summary, why_no_validation
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
    left: Sequence[str],
) -> None:
    """Print what is about to run, in a few lines. Only the main process calls this.

    changed: how it differs from the checkpoint that it starts from.
    left: what is to be done after the last step, "the loss of its test data".
    """
    config, mesh = trainer.runtime.config, trainer.runtime.mesh
    devices = f"{mesh.world_size} x {device_name(mesh.device)}, {config.precision.compute_dtype}"
    print(
        f"{config.model.model_type} with {trainer.runtime.num_parameters:,} parameters on {devices}; "
        f"activation {config.model.activation}; run folder {config.run_folder}",
        flush=True,
    )
    if config.lora.lora_rank:
        shapes = adapter_shapes(config.model, config.lora)
        number, layers = sum(map(math.prod, shapes.values())), len(adapted_modules(config.model, config.lora))
        kind = "DoRA" if config.lora.use_dora else "LoRA"
        head = "".join(f" and the {name}" for name in trained_whole(config.model))
        print(
            f"{kind}: {number:,} parameters of rank {config.lora.lora_rank} on {layers} linear layers{head} are "
            f"trained, on {(trainer.base or {}).get('path')}",
            flush=True,
        )
    if config.retriever.bert_load and not progress.iteration and saving.source_of(config) is None:
        print(f"both towers begin with the BERT of {config.retriever.bert_load}", flush=True)
    if mesh.size("pp") > 1:
        stages = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in layers_of(config))
        print(f"pipeline: {schedule_of(config.parallel)}, layers by stage {stages}", flush=True)
    if line := saving.describe_loaded(trainer):
        print(line, flush=True)
    if progress.iteration:
        rest = f"what is left is {' and '.join(left)}" if left else "nothing is left to do"
        length = "--train-iters" if config.finetuning.epochs is None else "--epochs"
        more = f"raise {length}, with --override-opt-param-scheduler, to train longer"
        done = f"; that is all of them, {rest} ({more})" if progress.iteration >= train_iters > 0 else ""
        step = progress.iteration
        doing = f"resuming after step {step} of {train_iters}{done}" if train_iters else f"measuring step {step}"
        print(doing, flush=True)
    for line in changed:
        print(f"  changed since that checkpoint: {line}", flush=True)
    print("".join(f"  {line}\n" for line in blend_summary(datasets["train"])), end="", flush=True)
    described = {"training data": getattr(datasets["train"], "dataset", None)}
    if isinstance(datasets["valid"], Mapping):
        described |= {f"validation data {name}": whole.dataset for name, whole in datasets["valid"].items()}
    for name, dataset in described.items():
        print("".join(f"{line}\n" for line in getattr(dataset, "describe", lambda name: ())(name)), end="", flush=True)
    if datasets["valid"] is None and config.validation.eval_iters:
        print(why_no_validation(config.data, datasets["train"]), flush=True)
