"""A run's checkpoints: what goes in, what comes out, and what a run folder that is not empty means."""

from __future__ import annotations

import pathlib
import time

from torch import Tensor

from megalith import checkpoint
from megalith.checkpoint.folder import strange
from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.config.checks import needs_checkpoint
from megalith.config.loading import from_yaml
from megalith.config.run import RunConfig
from megalith.config.text import flag, value_text
from megalith.runtime import state
from megalith.training.state import Progress
from megalith.training.step import Trainer

COMPUTING = ("model", "data", "batch", "optimizer", "precision")  # sections that decide what a step reads and computes
INDIFFERENT = (  # of which these do not, but for rounding
    "data_cache_path", "num_workers", "mmap_bin_files", "micro_batch_size", "make_vocab_size_divisible_by", "attention_backend",
    "loss_chunk_tokens", "compile", "deterministic_mode",
)  # fmt: skip


def folder_of(config: RunConfig) -> pathlib.Path:
    """Where the run's checkpoints lie."""
    return pathlib.Path(config.checkpoint.save or f"{config.logging.folder}/checkpoints")


def load_of(config: RunConfig) -> str | None:
    """--load, unless it is the run's own folder: scripts name one folder for both, and mean "go on, if there is something"."""
    load = config.checkpoint.load
    return None if load is not None and pathlib.Path(load).resolve() == folder_of(config).resolve() else load


def save(trainer: Trainer, progress: Progress, config_yaml: str, files: dict[str, str]) -> None:
    """Write a checkpoint of the present step. Every process takes part. files: {name inside: path} carried along."""
    config = trainer.runtime.config
    tensors = [state.weights(part) for part in trainer.runtime.parts]
    if not config.checkpoint.no_save_optim:
        tensors = with_optimizer_state(trainer, tensors)
    train_state = progress.numbers() | {
        "schedule": trainer.schedule.state(),
        "loss_scale": trainer.loss_scale.state_dict(),
        "world_size": trainer.runtime.mesh.world_size,
    }
    checkpoint.save(
        folder_of(config), progress.iteration, tensors, train_state=train_state, config_yaml=config_yaml, files=files,
        keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every,
    )  # fmt: skip


def source_of(config: RunConfig) -> str | pathlib.Path | None:
    """What the config says a run starts from: its own newest checkpoint, --load's, or nothing."""
    load, own = load_of(config), folder_of(config)
    return own if checkpoint.iterations(own) and (load is None or config.checkpoint.finetune) else load


def changed(config: RunConfig) -> list[str]:
    """Lines that name what a run that is gone on from had otherwise, of all that changes what it computes or reads."""
    source = source_of(config)
    if source is None:
        return []
    try:
        before = from_yaml(checkpoint.read_config(checkpoint.find(source, config.checkpoint.ckpt_step)))
    except ConfigError:  # a config of another release
        return []
    pairs = [
        (name, value, getattr(getattr(before, section), name))
        for section in COMPUTING
        for name, value in vars(getattr(config, section)).items()
        if name not in INDIFFERENT
    ]
    return [f"{flag(name)} is {value_text(now)}, was {value_text(then)}" for name, now, then in pairs if now != then]


def resume(trainer: Trainer) -> Progress:
    """Load what the config says a run starts from: its own newest checkpoint, --load's, or nothing."""
    config, source = trainer.runtime.config.checkpoint, source_of(trainer.runtime.config)
    if source is None:
        return Progress()
    weights_only = config.finetune and source != folder_of(trainer.runtime.config)
    with_optimizer = not (weights_only or config.no_load_optim)
    tensors = [state.weights(part) for part in trainer.runtime.parts]
    if with_optimizer:
        state.touch(trainer.optimizer)
        if has_moments(source, config.ckpt_step, needed=any(trainer.optimizer.state.values())):
            tensors = with_optimizer_state(trainer, tensors)
        else:
            trainer.optimizer.state.clear()
    stored = checkpoint.load(source, tensors, iteration=config.ckpt_step)
    if weights_only:
        return Progress()
    if with_optimizer:
        trainer.loss_scale.load_state_dict(stored["loss_scale"])
        trainer.schedule = trainer.schedule.resumed(stored["schedule"])
    return Progress.resumed(stored)


def has_moments(source: str | pathlib.Path, iteration: int | None, needed: bool) -> bool:
    """Whether a checkpoint has the optimizer's state. All processes call; raises CheckpointError on all where it lacks what is needed.

    Before the first step that changed weights there is none to have: float16 begins with steps that are skipped.
    """

    def judge() -> bool:
        path = checkpoint.find(source, iteration)
        if any(part.startswith("optimizer/") for part in checkpoint.describe(path)["parameters"]):
            return True
        if needed and checkpoint.read_train_state(path).get("scheduled_samples") != 0:
            rule = "it holds weights alone, and going on needs the optimizer's state too"
            cure = "Give --no-load-optim to go on with a new one, or --finetune to begin at step 0"
            raise CheckpointError(problem(f"{path}: optimizer", None, rule, cure))
        return False

    return Ranks().first(judge)


def with_optimizer_state(trainer: Trainer, weights: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The tensors of each part with those of the optimizer."""
    return [tensors | state.optimizer_state(part, trainer.optimizer) for part, tensors in zip(trainer.runtime.parts, weights, strict=True)]


def check_folder(config: RunConfig) -> None:
    """Refuse to start over a run that is there, or with --fresh move it aside. One process alone calls this.

    Raises ConfigError or CheckpointError that names the choices.
    """
    run, own = pathlib.Path(config.logging.folder), folder_of(config)
    there = bool(checkpoint.iterations(own))
    load = load_of(config)
    if config.checkpoint.fresh:
        if load is not None and any(pathlib.Path(load).resolve().is_relative_to(path.resolve()) for path in (run, own)):
            raise ConfigError(f"--fresh would move --load {load} aside, as it lies in this run's folders; name another --run-dir.")
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for path in (run, own):
            if path.exists():
                path.rename(path.with_name(f"{path.name}.before-{stamp}"))
        return
    if load is not None and there and not config.checkpoint.finetune:
        raise ConfigError(
            f"--load {load} and the folder of this run's own checkpoints, {own}, which holds iteration "
            f"{checkpoint.latest(own)}: only one can be gone on from. Drop --load to resume this run, "
            f"name another --run-dir or --save, or give --fresh to move this run aside."
        )
    if load is not None and not there and not checkpoint.iterations(load):
        raise CheckpointError(
            strange(load)
            or f"--load {load} holds no complete checkpoint (iter_NNNNNNN/); starting from random weights instead would be silent loss. "
            f"Name a folder that `megalith checkpoint inspect` can read, or drop --load."
        )
    if not there and config.checkpoint.load is None and (given := needs_checkpoint(config)):
        raise ConfigError(f"{flag(given)}: {own} holds no checkpoint; it needs one to load. Name its folder with --load, or leave it out.")
    metrics = run / "metrics.jsonl"
    if not there and load is None and metrics.exists() and metrics.stat().st_size:
        raise ConfigError(
            f"{run} holds a run (metrics.jsonl) but no checkpoint to resume from; starting over would overwrite its record. "
            f"Give --fresh to move it aside and start anew, or another --run-dir."
        )
