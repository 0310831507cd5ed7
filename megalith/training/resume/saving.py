"""A run's checkpoints: what goes in, what comes out, and what a run folder that is not empty means."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable

from torch import Tensor

from megalith import checkpoint
from megalith.checkpoint.formats import foreign
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store import folder
from megalith.checkpoint.store.facts import part_of, written_by_another
from megalith.checkpoint.store.folder import folder_of, iteration_of, load_of, paths
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.config.checks.checks import needs_checkpoint
from megalith.config.flags.text import Words, flag
from megalith.config.run import RunConfig
from megalith.runtime import state
from megalith.training.finite import check_before_saving, check_loaded
from megalith.training.resume.source import check_own, is_foreign, read_foreign, source_of, weights_only
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer


def save(
    trainer: Trainer, progress: Progress, config_yaml: str, files: dict[str, str], data: dict[str, str],
    again: Callable[[], str], alone: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Write a checkpoint of the present step, and delete none. Every process takes part.

    files: {name inside: path} carried along. data: {prefix: fingerprint} of the corpora. again: what the next start does, in words.
    alone: raises where the run's folders are another's by now; that of process 0 is asked.
    Raises TrainingError, and writes nothing, where the state is not finite.
    """
    Ranks().first(alone)
    config = trainer.runtime.config
    tensors = [state.weights(part) for part in trainer.runtime.parts]
    if not config.checkpoint.no_save_optim:
        tensors = with_optimizer_state(trainer, tensors)
    check_before_saving(tensors, progress.iteration, again)
    train_state = progress.numbers() | {
        "schedule": trainer.schedule.state(),
        "loss_scale": trainer.loss_scale.state_dict(),
        "world_size": trainer.runtime.mesh.world_size,
        "data": data,
    }
    checkpoint.save(
        folder_of(config), progress.iteration, tensors, train_state=train_state, config_yaml=config_yaml, files=files,
        keep_last=0,
    )  # fmt: skip


def retain(config: RunConfig, progress: Progress, start: int) -> None:
    """Delete the checkpoints that the config does not keep now that the last one saved is good. One process alone calls this.

    start: the step that this process went on from; its checkpoint is the last one until another is saved.
    """
    c, own = config.checkpoint, folder_of(config)
    newest = start if progress.saved is None else progress.saved
    with contextlib.suppress(OSError):  # what could not be deleted is tried again next time
        folder.retain(
            own, newest, c.keep_last, c.keep_every, ours=lambda path: not written_by_another(path, progress.run)
        )


def loaded(trainer: Trainer) -> str:
    """A line on what `resume` took from where, and what it left and why; "" where the run begins from random weights."""
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
    rest = f"; not {_listed(left)}: {why}" if left else ""
    where = config.checkpoint.load if is_foreign(source) else checkpoint.find(source, config.checkpoint.ckpt_step)
    return f"loaded from {where}: {_listed(taken)}{rest}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def resume(trainer: Trainer) -> Progress:
    """Load what the config says a run starts from: its own newest checkpoint, --load's, or nothing."""
    config, source = trainer.runtime.config.checkpoint, source_of(trainer.runtime.config)
    if source is None:
        return Progress()
    whole = trainer.runtime.config
    only_weights = weights_only(whole)
    measures = whole.validation.skip_train  # which needs neither optimizer nor schedule
    with_optimizer = not (only_weights or config.no_load_optim or measures)
    ranks, weights = Ranks(), None
    if is_foreign(source):
        weights = ranks.every(lambda: read_foreign(whole, with_optimizer=with_optimizer, judges=ranks.rank == 0))
        if ranks.rank == 0:
            print("".join(f"{config.load}: {note}\n" for note in weights.notes), end="", flush=True)
    tensors = [state.weights(part) for part in trainer.runtime.parts]
    if with_optimizer:
        state.touch(trainer.optimizer)
        complete = with_optimizer_state(trainer, tensors)
        asked = {part_of(name) for tensors in complete for name in tensors}
        if ranks.first(lambda: has_moments(source, weights, config.ckpt_step, asked)):
            tensors = complete
        else:
            trainer.optimizer.state.clear()
    if weights is not None:
        checkpoint.fill(weights, tensors)
        stored = {"iteration": weights.iteration, **weights.train_state}
    else:
        stored = checkpoint.load(source, tensors, iteration=config.ckpt_step)
    check_loaded(tensors, source, stored["iteration"])
    if only_weights:
        return Progress()
    if with_optimizer:
        trainer.loss_scale.load_state_dict(stored["loss_scale"])
        trainer.schedule = trainer.schedule.resumed(stored["schedule"])
    if source != folder_of(whole):
        return Progress.resumed(stored, same_run=False)
    progress = Progress.resumed(stored)
    ranks.first(lambda: check_ahead(folder_of(whole), progress))
    return progress


def check_ahead(own: pathlib.Path, progress: Progress) -> None:
    """Raise CheckpointError where a run would come upon checkpoints that another one wrote: they are not replaced."""
    others = [
        path
        for path in paths(own)
        if written_by_another(path, progress.run) and iteration_of(path) > progress.iteration
    ]
    if others:
        raise CheckpointError(
            f"{own} holds {', '.join(path.name for path in others)} of another run, which this one, resumed after step "
            f"{progress.iteration}, would come upon and not replace. Move them away, or name another --save."
        )


def has_moments(source: str | os.PathLike, weights: Weights | None, iteration: int | None, asked: set[str]) -> bool:
    """Whether a checkpoint has the optimizer's state; raises CheckpointError where it lacks what is needed.

    weights: those of a foreign source. asked: the parts of this run's state, such as optimizer/exp_avg. Before the first
    step that changed weights there is none to have: float16 begins with steps that are skipped.
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
    rule = f"this run's optimizer goes on from {', '.join(sorted(wanted)) or 'none'}"
    if not found:
        rule = "it holds weights alone, and going on needs the optimizer's state too"
    again = "the optimizer that it was saved with (--optimizer, --sgd-momentum), or " if found else ""
    cure = f"Give {again}--no-load-optim to go on with a new one, or begin at step 0 with --load {path} --finetune --run-dir NEW"
    raise CheckpointError(
        problem(f"{path}: state of the optimizer", Words(", ".join(sorted(found)) or "none"), rule, cure)
    )


def with_optimizer_state(trainer: Trainer, weights: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The tensors of each part with those of the optimizer."""
    return [
        tensors | state.optimizer_state(part, trainer.optimizer)
        for part, tensors in zip(trainer.runtime.parts, weights, strict=True)
    ]


def check_folder(config: RunConfig) -> None:
    """Refuse to start over a run that is there. One process alone calls this.

    Raises ConfigError or CheckpointError that names the choices.
    """
    own, load = folder_of(config), load_of(config)
    there = bool(checkpoint.iterations(own))
    if load is not None and there and not config.checkpoint.finetune:
        raise ConfigError(
            f"--load {load} and the folder of this run's own checkpoints, {own}, which holds iteration "
            f"{checkpoint.latest(own)}: only one can be gone on from. Drop --load to resume this run, "
            f"name another --run-dir or --save, or give --fresh to move this run aside."
        )
    if load is not None and not there:
        foreign.format_of(load)
    check_own(config)
    if not there and config.checkpoint.load is None and (given := needs_checkpoint(config)):
        raise ConfigError(
            f"{flag(given)}: {own} holds no checkpoint; it needs one to load. Name its folder with --load, or leave it out."
        )
