"""`Accelerator.prepare`: what a script made, in a parallel layout. The order of the arguments is that of the result."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.integrations.accelerate import config as configs
from megalith.integrations.accelerate import data, optimizer, parsers, schedules
from megalith.integrations.accelerate.model import MegatronModel
from megalith.integrations.accelerate.providers import provided
from megalith.integrations.accelerate.session import Session
from megalith.optim.loss_scale import build_loss_scale
from megalith.runtime.build import build_runtime
from megalith.runtime.load import weights_of
from megalith.training.tasks import TASKS

LOSSES = {"gpt": "lm", "bert": "bert", "bert_classification": "classification", "t5": "t5"}  # kind -> task
DUMMIES = (data.MegatronLMDummyDataLoader,)


def prepare(accelerator: Any, objects: Sequence[Any]) -> list[Any]:
    """The objects ready for training: model, optimizer, schedulers, loaders; anything else as it is.

    Every process calls it with the same objects. Raises ConfigError for what cannot work.
    """
    plugin = accelerator.state.megatron_lm_plugin
    models = [each for each in objects if isinstance(each, nn.Module) and not isinstance(each, MegatronModel)]
    if len(models) > 1 or (models and accelerator.session is not None):
        raise ConfigError(
            "You can't use same `Accelerator()` instance with multiple models when using Megatron-LM. Make another "
            "Accelerator in another run, or prepare one model."
        )
    loaders = [each for each in objects if isinstance(each, (DataLoader, *DUMMIES))]
    if loaders:
        micro_batch_size, notices = data.micro_batch_size_of(loaders, plugin.is_train_batch_min)
        plugin.set_training_args(micro_batch_size, accelerator.mesh.data_size)
        _say(accelerator, notices)
    if models:
        accelerator.session = build_session(accelerator, models[0], loaders)
    made: dict[int, Any] = {}
    for each in objects:  # optimizers before schedulers, which are bound to them
        if isinstance(each, Optimizer):
            made[id(each)] = prepare_optimizer(accelerator, each, models)
    results, indexed = [], None
    for each in objects:
        if each in models:
            result: Any = MegatronModel(accelerator.session)
            accelerator._models.append(result)
        elif isinstance(each, Optimizer):
            result = made[id(each)]
        elif schedules.is_scheduler(each):
            result = prepare_scheduler(accelerator, each)
        elif isinstance(each, data.MegatronLMDummyDataLoader):
            indexed = indexed or iter(data.indexed_loaders(each, needed_session(accelerator)))
            result = next(indexed)
            accelerator._dataloaders.append(result)
        elif isinstance(each, DataLoader):
            result = accelerator.prepare_data_loader(each)
        else:
            result = each
        results.append(result)
    return results


def needed_session(accelerator: Any) -> Session:
    """The session of the prepared model. Raises ConfigError where there is none yet."""
    if accelerator.session is None:
        cure = "Give the model in the same call of accelerator.prepare, or in one before it"
        raise ConfigError(problem("accelerator.prepare", Words("no model"), "must have been given the model", cure))
    return accelerator.session


def build_session(accelerator: Any, model: nn.Module, loaders: Sequence[Any]) -> Session:
    """Place a transformers model: with its weights, or drawn at random where it is on meta or the plugin says so."""
    plugin, mesh = accelerator.state.megatron_lm_plugin, accelerator.mesh
    placed, model_type = provided(plugin, model)
    model = placed if hasattr(placed.config, "to_json_string") else model
    parsers.check_model(model)
    on_meta = any(parameter.is_meta for parameter in placed.parameters())
    source = weights_of(placed)
    weights = source if plugin.keep_weights and not on_meta and model_type is None else None
    described = source.config if model_type is None else source.config.replace(model_type=model_type)
    config = configs.run_config(
        plugin, described, num_processes=mesh.world_size, micro_batch_size=plugin.micro_batch_size or 1,
        seq_length=sequence_length(plugin, loaders), mixed_precision=accelerator.mixed_precision,
        device=accelerator.device, keeps_weights=weights is not None,
        recomputes=bool(getattr(model, "is_gradient_checkpointing", False)),
    )  # fmt: skip
    _say(accelerator, [*source.notes, *configs.megatron_log_lines(config, keeps_weights=weights is not None)])
    runtime = build_runtime(config, mesh, weights=weights)
    kind = parsers.kind_of(model)
    name = getattr(model.config, "_name_or_path", "") or ""
    task = TASKS.find(LOSSES[kind])()
    task.setup(config, mesh, None)
    return Session(
        plugin=plugin, config=config, runtime=runtime, task=task, kind=kind, hf_config=model.config,
        hf_class=type(model), generation_config=getattr(model, "generation_config", None),
        loss_scale=build_loss_scale(config.precision), gradient_state=accelerator.gradient_state,
        tokenizer_folder=pathlib.Path(name) if name and pathlib.Path(name).is_dir() else None,
    )  # fmt: skip


def sequence_length(plugin: Any, loaders: Sequence[Any]) -> int | None:
    """The length of sequences where it is known before the first batch is read."""
    given = [plugin.seq_length, plugin.encoder_seq_length, plugin.decoder_seq_length]
    given += [each.dataset_args.get("seq_length") for each in loaders if isinstance(each, DUMMIES)]
    return next((length for length in given if length), None)


def prepare_optimizer(accelerator: Any, given: Optimizer, models: Sequence[nn.Module]) -> Optimizer:
    """The optimizer over the placed model's parameters; models: the transformers model that it was made for."""
    if isinstance(given, optimizer.MegatronOptimizer):
        return given
    session = needed_session(accelerator)
    if not models:
        cure = "Give it to accelerator.prepare together with the model"
        raise ConfigError(problem("accelerator.prepare", Words("an optimizer alone"), "needs its model", cure))
    _say(accelerator, optimizer.adopt(given, models[0], session.runtime, session.plugin))
    session.optimizer = optimizer.MegatronOptimizer(given, session)
    accelerator._optimizers.append(session.optimizer)
    return session.optimizer


def prepare_scheduler(accelerator: Any, given: Any) -> Any:
    """The scheduler, moved once an optimizer step."""
    session = needed_session(accelerator)
    scheduler, notices = schedules.prepare(given, session, accelerator.step_scheduler_with_optimizer)
    _say(accelerator, notices)
    accelerator._schedulers.append(scheduler)
    return scheduler


def _say(accelerator: Any, lines: Sequence[str]) -> None:
    for line in lines:
        accelerator.print(line)
