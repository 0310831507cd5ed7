"""Accelerator.save_state and load_state: a checkpoint of megalith, which any layout and every verb opens.

    output_dir/latest                   names the newest
    output_dir/iter_0000120/            model and optimizer under canonical names; config.yaml, train_state.json
    output_dir/iter_0000120/accelerate/ schedulers, random states, registered objects, as Accelerate writes them

The number is that of optimizer steps done.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from typing import Any

from accelerate import checkpointing
from torch import Tensor
from torch.optim import Optimizer

from megalith import checkpoint
from megalith.checkpoint import formats
from megalith.checkpoint.formats import adapters, foreign
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface import files as huggingface_files
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store.facts import CONFIG, part_of
from megalith.checkpoint.store.folder import is_megalith
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, ConfigError, TrainingError, problem
from megalith.config.flags.loading import stored_config, to_yaml
from megalith.config.flags.text import Words
from megalith.config.identity import differences
from megalith.config.sections.model import ModelConfig
from megalith.integrations.accelerate.saving import folders
from megalith.integrations.accelerate.saving.export import source_files
from megalith.integrations.accelerate.saving.folders import NAME
from megalith.integrations.accelerate.session import Session
from megalith.runtime import state
from megalith.training.finite import RULE, abbreviate, find_not_finite

# What a parameter group holds besides hyper-parameters: how this process computes a step.
NOT_STORED = ("params", "param_names", "fused", "foreach", "capturable", "differentiable")
Stages = list[dict[str, Tensor]]


def save_state(
    accelerator: Any, output_dir: str | os.PathLike | None = None, safe_serialization: bool = True, **others: Any
) -> str:
    """Save everything that a run needs to resume; every process calls it. Returns the folder.

    The checkpoint is written aside and renamed when it is complete: a save that is interrupted leaves the older one,
    which goes afterwards. A checkpoint of another run in output_dir is moved into a folder there, with a line that says
    so. With ProjectConfiguration(automatic_checkpoint_naming=True) the folder is project_dir/checkpoints/checkpoint_N,
    and the oldest beyond total_limit are deleted once the new one is complete.

    Raises ConfigError before `prepare`, for other options of Accelerate, and for a missing output_dir; CheckpointError
    on all processes where a file cannot be written; TrainingError where weights or state are not finite.
    """
    session, ranks, project = _session(accelerator), Ranks(), accelerator.project_configuration
    _refuse("save_state", others)
    if not safe_serialization:
        _say(accelerator, "safe_serialization=False changes nothing: torch.distributed.checkpoint writes the tensors")
    if project.save_on_each_node:
        _say(accelerator, "save_on_each_node changes nothing: a checkpoint is one folder, which all machines see")
    folder = pathlib.Path(ranks.on_rank_0(lambda: str(folders.target(accelerator, output_dir))))
    session.run = ranks.on_rank_0(lambda: session.run)
    for hook in accelerator._save_model_state_pre_hook.values():
        hook(accelerator._models, [], str(folder))  # without weights, as with Accelerate's own Megatron-LM plugin
    session.reshard()
    tensors = [state.weights(stage) for stage in session.runtime.stages]
    if session.optimizer is not None and not session.config.checkpoint.no_save_optim:
        tensors = _with_optimizer_state(session, tensors)
    if names := find_not_finite(tensors):
        what = f"save_state after step {session.steps}: weights and optimizer state"
        cure = "Nothing was saved; load an earlier checkpoint, and lower the learning rate"
        raise TrainingError(problem(what, Words(abbreviate(names)), RULE, cure))
    with contextlib.ExitStack() as held:
        staging, moved = ranks.on_rank_0(lambda: folders.begin_saving(folder, session.run, held))
        if moved:
            _say(accelerator, f"{folder} had the checkpoint of another run, which is in {moved} now")
        files = pathlib.Path(staging) / NAME
        try:
            ranks.on_every_rank(lambda: _write_files(accelerator, files))
            copied = ranks.on_rank_0(lambda: _files(session, files))
            checkpoint.save(
                folder, session.steps, tensors, train_state=_train_state(accelerator, session),
                config_yaml=to_yaml(session.config), files=copied, keep_last=1,
            )  # fmt: skip
        finally:
            if ranks.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)
    if project.automatic_checkpoint_naming and project.total_limit is not None:
        ranks.on_rank_0(lambda: folders.delete_oldest(folder, project.total_limit))
    project.iteration += 1
    return str(folder)


def load_state(
    accelerator: Any, input_dir: str | os.PathLike | None = None, load_kwargs: dict | None = None, **others: Any
) -> None:
    """Resume from what `save_state` saved in any layout; every process calls it.

    input_dir: None is the newest of automatic_checkpoint_naming. A folder of another program, such as a Hugging Face or
    a Megatron folder, a run of `megalith pretrain`, or what Accelerate saved without Megatron-LM, gives its weights
    alone, and a line says so. load_kwargs: for torch.load of Accelerate's files. others: map_location, as in
    Accelerate.

    Raises ConfigError before `prepare` and for other options, CheckpointError on all processes where there is no
    checkpoint, where it is damaged, or where it is of another model, optimizer, or number of schedulers or registered
    objects.
    """
    session, ranks = _session(accelerator), Ranks()
    map_location = others.pop("map_location", None)
    _refuse("load_state", others)
    folder = pathlib.Path(ranks.on_rank_0(lambda: str(folders.source(accelerator, input_dir))))
    for hook in accelerator._load_model_state_pre_hook.values():
        hook([], str(folder))
    session.discard_gradients()
    own = ranks.on_rank_0(lambda: _stored(folder))
    if own is None:
        _load_weights(accelerator, session, folder, ranks)
        return
    path, stored = pathlib.Path(own[0]), own[1]
    ranks.on_rank_0(lambda: _check_record(accelerator, path, stored[NAME]))
    ranks.on_rank_0(lambda: _check_model(session, str(path), _model_of(path)))
    if not _load_tensors(session, path, stored, ranks) and session.optimizer is not None and stored["iteration"]:
        _say(accelerator, f"{path}: the optimizer begins anew, as its state was not saved or is not to be loaded")
    session.steps, session.consumed_samples = stored["iteration"], stored["consumed_train_samples"]
    session.run = stored["run"]
    _load_files(accelerator, path / NAME, stored, map_location, load_kwargs)


def _session(accelerator: Any) -> Session:
    if accelerator.session is None:
        cure = "Call accelerator.prepare(model, ...) before"
        raise ConfigError(problem("Accelerator", Words("no model"), "must have a model to save or load", cure))
    return accelerator.session


def _refuse(name: str, options: dict[str, Any]) -> None:
    if options:
        found = Words(", ".join(sorted(options)))
        raise ConfigError(problem(name, found, "has no such option with MegatronLMPlugin", "Leave it out"))


def _say(accelerator: Any, line: str) -> None:
    accelerator.print(f"megalith: {line}")


def _write_files(accelerator: Any, folder: pathlib.Path) -> None:
    """This process's part of Accelerate's own files; the main process writes what all have in common."""
    loaders = accelerator._dataloaders if accelerator.is_main_process else []  # whose states are equal everywhere
    index, step = accelerator.process_index, accelerator.step
    checkpointing.save_accelerator_state(str(folder), [], [], accelerator._schedulers, loaders, index, step)
    for number, each in enumerate(accelerator._custom_objects):
        checkpointing.save_custom_state(each, str(folder), number)


def _files(session: Session, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name in the checkpoint: file} of Accelerate's files in `folder`, of the model's configs and the tokenizer."""
    own = {f"{NAME}/{file.name}": file for file in sorted(folder.iterdir())}
    return own | source_files(session, folder.parent / "source")


def _train_state(accelerator: Any, session: Session) -> dict[str, Any]:
    groups = [] if session.optimizer is None else session.optimizer.optimizer.param_groups
    record = {
        "step": accelerator.step,
        "save_iteration": accelerator.save_iteration,
        "schedulers": len(accelerator._schedulers),
        "objects": len(accelerator._custom_objects),
        "param_groups": [_numbers_of(group) for group in groups],
    }
    return {
        "run": session.run,
        "consumed_train_samples": session.consumed_samples,
        "loss_scale": session.loss_scale.state_dict(),
        "world_size": accelerator.num_processes,
        NAME: record,
    }


def _numbers_of(group: dict[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a parameter group, as JSON can hold them."""
    found = {name: value for name, value in group.items() if name not in NOT_STORED}
    found = {name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()}
    return {name: value for name, value in found.items() if isinstance(value, (bool, int, float, str, list, tuple))}


def _restore_groups(optimizer: Optimizer, stored: list[dict[str, Any]]) -> None:
    for group, values in zip(optimizer.param_groups, stored, strict=True):
        for name, value in values.items():
            if isinstance(group.get(name), Tensor):
                group[name].fill_(value)
            else:
                group[name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples


def _stored(folder: pathlib.Path) -> tuple[str, dict[str, Any]] | None:
    """The path and train_state of the checkpoint of `save_state` in `folder`; None for what others wrote."""
    if not is_megalith(folder):
        return None
    path = checkpoint.find(folder)
    stored = checkpoint.read_train_state(path)
    return (str(path), stored) if NAME in stored else None


def _model_of(path: pathlib.Path) -> ModelConfig:
    return stored_config(checkpoint.read_config(path), str(path / CONFIG)).model


def _check_record(accelerator: Any, path: pathlib.Path, record: dict[str, Any]) -> None:
    """Raise CheckpointError where something that is prepared or registered here would not be resumed.

    A script that only evaluates may have prepared the model alone.
    """
    session, schedulers, objects = accelerator.session, accelerator._schedulers, accelerator._custom_objects
    groups = [] if session.optimizer is None else session.optimizer.optimizer.param_groups
    alone = "load the weights alone, from a folder of save_pretrained"
    counts = [("registered objects", record["objects"], len(objects), alone)]
    if not session.config.checkpoint.no_load_optim:
        without = "give MegatronLMPlugin(no_load_optim=True)"
        counts += [("parameter groups", len(record["param_groups"]), len(groups), without)] if groups else []
        counts += [("schedulers", record["schedulers"], len(schedulers), without)] if schedulers else []
    for name, saved, here, otherwise in counts:
        if saved != here:
            cure = f"Prepare and register what the script that saved it had, or {otherwise}"
            raise CheckpointError(problem(f"{path}: {name}", saved, f"must be as many as here, {here}", cure))


def _check_model(session: Session, source: str, theirs: ModelConfig) -> None:
    """Raise CheckpointError where the weights are of another model, though their shapes may fit."""
    if another := differences(session.config.model, theirs).incompatible:
        found = Words("; ".join(f"{name} {then!r} instead of {now!r}" for name, now, then in another))
        cure = "Prepare the model that it was saved from, or name another folder"
        raise CheckpointError(problem(source, found, "must be of the model that was prepared", cure))


def _with_optimizer_state(session: Session, weights: Stages) -> Stages:
    assert session.optimizer is not None
    optimizer, stages = session.optimizer.optimizer, session.runtime.stages
    return [part | state.optimizer_state(stage, optimizer) for stage, part in zip(stages, weights, strict=True)]


def _load_tensors(session: Session, path: pathlib.Path, stored: dict[str, Any], ranks: Ranks) -> bool:
    """Load weights and, if there is one, the optimizer; returns whether its state was loaded.

    Raises CheckpointError where the checkpoint has the state of another optimizer.
    """
    session.reshard()
    tensors = [state.weights(stage) for stage in session.runtime.stages]
    if session.optimizer is None or session.config.checkpoint.no_load_optim:
        checkpoint.load(path, tensors)
        _forget_state(session)
        return False
    optimizer = session.optimizer.optimizer
    names: set[str] = ranks.on_rank_0(lambda: set(checkpoint.describe(path)["tensors"]))
    saved = {part_of(name) for name in names if name.startswith("optimizer/")}
    if saved:
        state.create_optimizer_state(optimizer)
        _check_optimizer(path, _with_optimizer_state(session, tensors), saved, ranks)
        for name, parameter in session.runtime.named_parameters():
            if not any(f"{part}/{name}" in names for part in saved):  # it had no gradient yet
                optimizer.state.pop(parameter, None)
        tensors = _with_optimizer_state(session, tensors)
    else:
        _forget_state(session)
    checkpoint.load(path, tensors)
    for stage, part in zip(session.runtime.stages, tensors, strict=True):
        state.restore_numbers(stage, optimizer, part)
    _restore_groups(optimizer, stored[NAME]["param_groups"])
    session.loss_scale.load_state_dict(stored["loss_scale"])
    return bool(saved)


def _check_optimizer(path: pathlib.Path, tensors: Stages, saved: set[str], ranks: Ranks) -> None:
    """Raise CheckpointError where the optimizer's parts, such as optimizer/exp_avg, are not those of the checkpoint."""
    here = {part_of(name) for part in tensors for name in part if name.startswith("optimizer/")}
    asked: set[str] = ranks.collect(lambda: here, lambda each: set().union(*each))
    if asked != saved:
        rule = f"must be {', '.join(sorted(asked)) or 'none'} for this optimizer"
        cure = "Make the optimizer that it was saved with, or give MegatronLMPlugin(no_load_optim=True)"
        raise CheckpointError(problem(f"{path}: state of the optimizer", Words(", ".join(sorted(saved))), rule, cure))


def _forget_state(session: Session) -> None:
    if session.optimizer is not None:
        session.optimizer.optimizer.state.clear()


def _load_files(
    accelerator: Any, folder: pathlib.Path, stored: dict[str, Any], map_location: Any, load_kwargs: dict | None
) -> None:  # fmt: skip
    """Load Accelerate's own files, and its counts."""
    record, processes = stored[NAME], accelerator.num_processes
    number = accelerator.process_index % stored["world_size"]
    if stored["world_size"] != processes:  # process 0, whose state decides on the order of samples, keeps its own
        saved = f"{stored['world_size']} processes saved theirs, and here are {processes}"
        _say(accelerator, f"{folder}: random states: {saved}, so that some go on in several processes, or in none")
    schedulers = [] if accelerator.session.config.checkpoint.no_load_optim else accelerator._schedulers
    checkpointing.load_accelerator_state(
        str(folder), [], [], schedulers, accelerator._dataloaders, number, None, map_location, load_kwargs
    )  # fmt: skip
    for index, each in enumerate(accelerator._custom_objects):
        checkpointing.load_custom_state(each, str(folder), index)
    accelerator.step = record["step"]
    if accelerator.project_configuration.automatic_checkpoint_naming:
        accelerator.project_configuration.iteration = record["save_iteration"] + 1


def _load_weights(accelerator: Any, session: Session, folder: pathlib.Path, ranks: Ranks) -> None:
    """Load the weights that another program, or another verb of megalith, wrote into `folder`."""
    session.reshard()
    tensors = [state.weights(stage) for stage in session.runtime.stages]
    if is_megalith(folder):
        path: pathlib.Path = ranks.on_rank_0(lambda: checkpoint.find(folder))
        ranks.on_rank_0(lambda: _check_model(session, str(path), _model_of(path)))
        checkpoint.load(path, tensors)
    else:
        weights = ranks.on_every_rank(lambda: _read(session, folder, ranks))
        ranks.on_every_rank(lambda: _check_model(session, str(folder), weights.config.model))
        checkpoint.fill(weights, tensors)
        for note in weights.notes:
            _say(accelerator, f"{folder}: {note}")
    _forget_state(session)
    begins = "" if session.optimizer is None else "; the optimizer begins anew"
    _say(accelerator, f"{folder}: the weights alone are loaded, as save_state did not write it{begins}")


def _read(session: Session, folder: pathlib.Path, ranks: Ranks) -> Weights:
    """The weights of a folder in any format; without a config.json, those that Accelerate itself wrote."""
    names = [f"{name}{end}" for name in huggingface_files.WEIGHT_FILES for end in ("", huggingface_files.INDEX)]
    if not (folder / huggingface.CONFIG).exists() and any((folder / name).is_file() for name in names):
        tensors, _ = huggingface_files.read_tensors(folder)
        return huggingface.weights_of_tensors(session.hf_config, session.hf_class, tensors)
    options = foreign.read_options(session.config)
    if ranks.rank and options["replicas"] == "equal":  # process 0 compares for all
        options["replicas"] = "first"
    return adapters.merge(formats.read(folder, None, options))
