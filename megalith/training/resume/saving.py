"""A run's checkpoints: what is saved, what is loaded, and what a run does with a folder that is not empty."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable

from torch import Tensor

from megalith import checkpoint
from megalith.checkpoint.formats import adapters, foreign
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import folder
from megalith.checkpoint.store.facts import part_of, written_by_another_run
from megalith.checkpoint.store.folder import checkpoint_folder, checkpoint_paths, iteration_of, load_path
from megalith.checkpoint.store.loading import verify_on_all_ranks
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.config.checks.checks import needs_checkpoint
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.runtime import state
from megalith.training.finite import check_before_saving, check_loaded
from megalith.training.resume.labels import LABELS, labels_of
from megalith.training.resume.lora import check_kind
from megalith.training.resume.source import (
    check_save_folder,
    is_foreign,
    read_foreign,
    source_of,
    weights_only,
)
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer


def save(
    trainer: Trainer, progress: Progress, config_yaml: str, files: dict[str, str], data: dict[str, str],
    next_start: Callable[[], str], check_locks: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write a checkpoint of the present step, and delete none. Every process takes part.

    files: {name inside: path} that are copied into it. data: {prefix: fingerprint} of the corpora.
    next_start: what the next start does, as text. check_locks: raises where another run has taken the run's folders;
        only the main process's is called.
    Raises TrainingError, and writes nothing, where the state is not finite.
    """
    Ranks().on_rank_0(check_locks)
    config = trainer.runtime.config
    tensors = stored_weights(trainer)
    if not config.checkpoint.no_save_optim:
        tensors = with_optimizer_state(trainer, tensors)
    check_before_saving(tensors, progress.iteration, next_start)
    train_state = progress.numbers() | {
        "schedule": trainer.schedule.state(),
        "loss_scale": trainer.loss_scale.state_dict(),
        "world_size": trainer.runtime.mesh.world_size,
        "data": data,
    }
    if labels := labels_of(config):
        train_state[LABELS] = labels
    if trainer.base is not None:
        train_state[adapters.BASE] = trainer.base
    checkpoint.save(
        checkpoint_folder(config), progress.iteration, tensors, train_state=train_state, config_yaml=config_yaml,
        files=files, keep_last=0,
    )  # fmt: skip


def stored_weights(trainer: Trainer) -> list[dict[str, Tensor]]:
    """The weights that a checkpoint has, of each pipeline stage: all, or with LoRA those that are trained."""
    trained = trainer.runtime.config.lora.lora_rank > 0
    return [state.weights(part, trained=trained) for part in trainer.runtime.stages]


def prune(config: RunConfig, progress: Progress, start: int) -> None:
    """Delete the checkpoints that the config does not keep, once the last one saved is known to be good.

    Only the main process calls this. start: the step that this process resumed from; its checkpoint is the last one
    until another is saved.
    """
    c, own = config.checkpoint, checkpoint_folder(config)
    newest = start if progress.saved is None else progress.saved
    best = None if progress.best is None else progress.best.step

    def deletable(path: pathlib.Path) -> bool:
        return iteration_of(path) != best and not written_by_another_run(path, progress.run)

    with contextlib.suppress(OSError):  # what could not be deleted is tried again next time
        folder.prune(own, newest, c.keep_last, c.keep_every, deletable)


def describe_loaded(trainer: Trainer) -> str:
    """A line that says what `resume` loaded from where, and what it did not and why; "" for random weights."""
    config, source = trainer.runtime.config, source_of(trainer.runtime.config)
    if source is None:
        return ""
    counts = "the counts of steps and samples"
    if weights_only(config):
        taken, left = ["the weights"], ["the optimizer's state", "the schedule", counts]
        why = "--finetune begins at step 0 with a new optimizer"
    elif config.validation.skip_train:
        taken, left, why = (
            ["the weights", counts],
            ["the optimizer's state", "the schedule"],
            "--skip-train needs neither",
        )
    elif config.checkpoint.no_load_optim:
        taken, left, why = (
            ["the weights", counts],
            ["the optimizer's state", "the schedule"],
            "--no-load-optim begins with new ones",
        )
    else:
        taken, left, why = (
            ["the weights", *["the optimizer's state"] * bool(trainer.optimizer.state), "the schedule", counts],
            [],
            "",
        )
    rest = f"; not {_join_words(left)}: {why}" if left else ""
    where = config.checkpoint.load if is_foreign(source) else checkpoint.find(source, config.checkpoint.ckpt_step)
    return f"loaded from {where}: {_join_words(taken)}{rest}"


def _join_words(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def resume(trainer: Trainer) -> Progress:
    """Load what the config says a run starts from: its own newest checkpoint, --load's, or nothing."""
    config, source = trainer.runtime.config, source_of(trainer.runtime.config)
    if source is None:
        return Progress()
    options, own = config.checkpoint, checkpoint_folder(config)
    only_weights = weights_only(config)
    only_measures = config.validation.skip_train  # which needs neither optimizer nor schedule
    with_optimizer = not (only_weights or options.no_load_optim or only_measures)
    ranks, weights = Ranks(), None
    if not config.lora.lora_rank:
        ranks.on_rank_0(lambda: check_kind(config))
    if only_weights and trainer.started:
        if not config.lora.lora_rank and not is_foreign(source):
            verify_on_all_ranks(checkpoint.find(source, options.ckpt_step), ranks)
        check_loaded([state.weights(part) for part in trainer.runtime.stages], source, 0)
        return Progress()
    if with_optimizer and not is_foreign(source):
        ranks.on_rank_0(lambda: check_schedule(checkpoint.find(source, options.ckpt_step)))
    if is_foreign(source):
        read = functools.partial(read_foreign, config, with_optimizer=with_optimizer, check_replicas=ranks.rank == 0)
        weights = ranks.on_every_rank(read)
        if ranks.rank == 0:
            print("".join(f"{options.load}: {note}\n" for note in weights.notes), end="", flush=True)
    tensors = stored_weights(trainer)
    if with_optimizer:
        state.create_optimizer_state(trainer.optimizer)
        complete = with_optimizer_state(trainer, tensors)
        asked = {part_of(name) for tensors in complete for name in tensors}
        if ranks.on_rank_0(lambda: has_optimizer_state(source, weights, options.ckpt_step, asked)):
            tensors = complete
        else:
            trainer.optimizer.state.clear()
    if weights is not None:
        checkpoint.fill(weights, tensors)
        stored = {"iteration": weights.iteration, **weights.train_state}
    else:
        stored = checkpoint.load(source, tensors, iteration=options.ckpt_step)
    check_loaded(tensors, source, stored["iteration"])
    if only_weights:
        return Progress()
    if with_optimizer:
        trainer.loss_scale.load_state_dict(stored["loss_scale"])
        trainer.schedule = trainer.schedule.resumed(stored["schedule"])
    if source != own:
        return Progress.resumed(stored, same_run=False)
    progress = Progress.resumed(stored)
    ranks.on_rank_0(lambda: check_later_checkpoints(own, progress))
    return progress


def check_schedule(path: pathlib.Path) -> None:
    """Raise CheckpointError where a checkpoint of megalith is of Accelerator.save_state, not of a run of pretrain."""
    if "accelerate" in checkpoint.read_train_state(path):
        rule = "must be of a run of megalith pretrain to resume: the schedule of a script is in the script"
        cure = f"Begin at step 0 with its weights: --load {path} --finetune --run-dir NEW"
        raise CheckpointError(problem(f"{path}", Words("a checkpoint of Accelerator.save_state"), rule, cure))


def check_later_checkpoints(own: pathlib.Path, progress: Progress) -> None:
    """Raise CheckpointError where later steps of a run have checkpoints of another run, which are not replaced."""
    others = [
        path
        for path in checkpoint_paths(own)
        if written_by_another_run(path, progress.run) and iteration_of(path) > progress.iteration
    ]
    if others:
        raise CheckpointError(
            f"{own} holds {', '.join(path.name for path in others)} of another run, whose steps this run, resumed "
            f"after step {progress.iteration}, would reach; it does not replace them. Move them away, or name another "
            f"--save."
        )


def has_optimizer_state(
    source: str | os.PathLike, weights: Weights | None, iteration: int | None, asked: set[str]
) -> bool:
    """Whether a checkpoint has the optimizer's state; raises CheckpointError where it lacks what is needed.

    weights: those of a foreign source. asked: the parts of this run's state, such as optimizer/exp_avg. Before the
    first step that changed weights there is no such state: float16 begins with steps that are skipped.
    """
    path, parts = source, {part_of(name) for name in weights or ()}
    if weights is None:
        path = checkpoint.find(source, iteration)
        parts = set(checkpoint.describe(path)["parameters"])
    wanted, found = ({part for part in each if part.startswith("optimizer/")} for each in (asked, parts))
    if wanted == found:
        return bool(found)
    if weights is None and not found and checkpoint.read_train_state(path).get("scheduled_samples") == 0:
        return False
    rule = f"must be {', '.join(sorted(wanted)) or 'none'} for this run to resume"
    same = "the optimizer that it was saved with (--optimizer, --sgd-momentum), or " if found else ""
    new_run = f"begin at step 0 with --load {path} --finetune --run-dir NEW"
    cure = f"Give {same}--no-load-optim to resume with a new one, or {new_run}"
    held = Words(", ".join(sorted(found)) or "weights alone")
    raise CheckpointError(problem(f"{path}: state of the optimizer", held, rule, cure))


def with_optimizer_state(trainer: Trainer, weights: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The tensors of each pipeline stage with those of the optimizer."""
    return [
        tensors | state.optimizer_state(part, trainer.optimizer)
        for part, tensors in zip(trainer.runtime.stages, weights, strict=True)
    ]


def check_folder(config: RunConfig) -> None:
    """Refuse to start where another run would be overwritten. Only the main process calls this.

    Raises ConfigError or CheckpointError that names the choices.
    """
    own, load = checkpoint_folder(config), load_path(config)
    has_checkpoints = bool(checkpoint.iterations(own))
    if load is not None and has_checkpoints and not config.checkpoint.finetune:
        raise ConfigError(
            f"--load {load} was given, and the folder of this run's own checkpoints, {own}, holds iteration "
            f"{checkpoint.latest(own)}; only one of them can be resumed. Drop --load to resume this run, "
            f"name another --run-dir or --save, or give --fresh to move this run aside."
        )
    if load is not None and not has_checkpoints:
        foreign.format_of(load)
    pretrained = config.finetuning.pretrained_checkpoint
    if pretrained is not None and has_checkpoints and config.finetuning.epochs == 0:
        raise ConfigError(
            f"--epochs 0 measures one model, and there are two: --pretrained-checkpoint {pretrained}, and iteration "
            f"{checkpoint.latest(own)} of {own}. Name another --save for what is measured, and one of them as "
            f"--pretrained-checkpoint."
        )
    check_save_folder(config)
    if not has_checkpoints and config.checkpoint.load is None and (given := needs_checkpoint(config)):
        raise ConfigError(
            f"{given} needs a checkpoint to load, and {own} holds none. "
            f"Name its folder with --load, or leave {given} out."
        )
