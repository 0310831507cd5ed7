"""`Accelerator.prepare`: what a script made, in a parallel layout. The order of the arguments is that of the result."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from megalith.checkpoint.formats.huggingface.family import FAMILIES
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.weights import Weights
from megalith.common.errors import ConfigError, problem
from megalith.config.architectures import architecture
from megalith.config.flags.text import Words
from megalith.integrations.accelerate import batches, data, optimizer, parsers, schedules
from megalith.integrations.accelerate import config as configs
from megalith.integrations.accelerate.model import MegatronModel
from megalith.integrations.accelerate.session import Session
from megalith.integrations.accelerate.steps import providers
from megalith.optim.loss_scale import build_loss_scale
from megalith.runtime.build import build_runtime
from megalith.runtime.load import weights_of
from megalith.training.tasks import TASKS

LOSSES = {"gpt": "lm", "bert": "bert", "bert_classification": "classification", "t5": "t5"}  # kind -> task
KINDS = {loss: kind for kind, loss in LOSSES.items()}


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
    loaders = [each for each in objects if isinstance(each, (DataLoader, data.MegatronLMDummyDataLoader))]
    if loaders:
        micro_batch_size, notices = data.micro_batch_size_of(loaders, plugin.is_train_batch_min)
        plugin.set_training_args(micro_batch_size, accelerator.mesh.data_size)
        _say(accelerator, notices)
    if models:
        accelerator.session = build_session(accelerator, models[0], loaders)
    new = {id(each) for each in objects if isinstance(each, Optimizer) and not hasattr(each, "session")}
    before = accelerator.session is not None and accelerator.session.optimizer is not None
    if new and len(new) + before > 1:
        rule, cure = "must be one for a model", "Give parameters that differ groups of one optimizer"
        raise ConfigError(problem("accelerator.prepare", Words("several optimizers"), rule, cure))
    made: dict[int, Any] = {}
    for each in objects:  # optimizers before schedulers, which are bound to them
        if isinstance(each, Optimizer):
            made[id(each)] = prepare_optimizer(accelerator, each, models)
    results, indexed = list[Any](), iter(list[Any]())
    for each in objects:
        if any(each is model for model in models):
            results.append(MegatronModel(accelerator.session))
        elif isinstance(each, Optimizer):
            results.append(made[id(each)])
        elif schedules.is_scheduler(each):
            results.append(prepare_scheduler(accelerator, each))
        elif isinstance(each, data.MegatronLMDummyDataLoader):
            if (loader := next(indexed, None)) is None:
                indexed = iter(indexed_loaders(accelerator, each, objects))
                loader = next(indexed)
            results.append(loader)
        elif isinstance(each, DataLoader):
            results.append(accelerator.prepare_data_loader(each))
        else:
            results.append(each)
    return results


def indexed_loaders(accelerator: Any, dummy: data.MegatronLMDummyDataLoader, objects: Sequence[Any]) -> list[Any]:
    """The loaders of training, validation and test data; a scheduler among the objects says how long the run is."""
    steps = [each.total_num_steps for each in objects if isinstance(each, schedules.MegatronLMDummyScheduler)]
    loaders = data.indexed_loaders(dummy, needed_session(accelerator), next(iter(steps), None))
    _say(accelerator, dummy.notices)
    return loaders


def needed_session(accelerator: Any) -> Session:
    """The session of the prepared model. Raises ConfigError where there is none yet."""
    if accelerator.session is None:
        cure = "Give the model in the same call of accelerator.prepare, or in one before it"
        raise ConfigError(problem("accelerator.prepare", Words("no model"), "must have been given the model", cure))
    return accelerator.session


def build_session(accelerator: Any, model: nn.Module, loaders: Sequence[Any]) -> Session:
    """Place a transformers model: with its weights, or drawn at random where it is on meta or the plugin says so."""
    plugin, mesh = accelerator.state.megatron_lm_plugin, accelerator.mesh
    found = providers.provided(plugin, model)
    model = found.model
    parsers.check_model(model)
    if parsers.user_parser(model.config.model_type) is not None:
        parsers.run_parser(plugin, model, data.first_batch(loaders))
    of_family = model.config.model_type in FAMILIES.addresses
    _say(accelerator, share_weights(model))
    source = weights_of(model) if of_family else Weights(config=parsers.parsed_config(plugin, model), tensors={})
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    weights = source if plugin.keep_weights and not on_meta and found.model_type is None else None
    described = source.config
    if found.model_type is not None:
        described = described.replace(**architecture(found.model_type).defaults, model_type=found.model_type)
    name = "is_activation_checkpointing"  # is_gradient_checkpointing until transformers 5.2
    recomputes = bool(getattr(model, name if hasattr(model, name) else "is_gradient_checkpointing", False))
    options = {"keeps_weights": weights is not None, "recomputes": recomputes}
    config = configs.run_config(
        plugin, described, num_processes=mesh.world_size, micro_batch_size=plugin.micro_batch_size or 1,
        seq_length=sequence_length(plugin, loaders), mixed_precision=accelerator.mixed_precision,
        device=accelerator.device, **options,
    )  # fmt: skip
    parsers.set_network_size_args(plugin, model, config)
    _say(accelerator, [
        *source.notes, *plugin.notices(), *parsers.model_notices(model, config),
        *configs.config_notices(plugin, config, described, **options),
        *configs.megatron_log_lines(config, keeps_weights=weights is not None),
    ])  # fmt: skip
    runtime = build_runtime(config, mesh, weights=weights)
    batches.keep_padding_idx(runtime, model)
    folder = pathlib.Path(getattr(model.config, "_name_or_path", "") or "no such folder")
    kind = parsers.kind_of(model, described) if found.model_type is None else KINDS[architecture(found.model_type).loss]
    task = TASKS.find(LOSSES[kind])()
    task.setup(config, mesh, None)
    return Session(
        plugin=plugin, config=config, runtime=runtime, task=task, kind=kind, hf_config=model.config,
        hf_class=type(model), loss_scale=build_loss_scale(config.precision), gradient_state=accelerator.gradient_state,
        generation_config=getattr(model, "generation_config", None),
        tokenizer_folder=folder if folder.is_dir() else None,
    )  # fmt: skip


@torch.no_grad()
def share_weights(model: nn.Module) -> list[str]:
    """Give all processes the weights of process 0, as DistributedDataParallel does; a line where theirs differed."""
    ranks, state = Ranks(), model.state_dict()
    meta = ranks.collect(lambda: [each.is_meta for each in state.values()])
    if any(each != meta[0] for each in meta):
        cure = "Load them on every process, or make the model with init_empty_weights on every process"
        found = Words("weights on some processes and none on others")
        raise ConfigError(problem("The model", found, "must be the same on all processes", cure))
    tensors = [each for each in state.values() if not each.is_meta]
    sums = [str(each.double().sum().item()) for each in tensors]  # as text, where nan is nan
    if ranks.collect(lambda: sums, lambda found: all(each == found[0] for each in found)):
        return []
    for each in tensors:
        each.copy_(ranks.from_rank_0(each))
    return [
        "the model's weights differed between processes; those of process 0 are taken: set_seed(...) before the model "
        "is made gives the same ones everywhere"
    ]


def sequence_length(plugin: Any, loaders: Sequence[Any]) -> int | None:
    """The length of sequences where it is known before the first batch is read."""
    given = [plugin.seq_length, plugin.encoder_seq_length, plugin.decoder_seq_length]
    given += [
        each.dataset_args.get("seq_length") for each in loaders if isinstance(each, data.MegatronLMDummyDataLoader)
    ]
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
    session.trains = Ranks().collect(lambda: any(each.requires_grad for each in session.parameters), any)
    session.optimizer = optimizer.MegatronOptimizer(given, session)
    return session.optimizer


def prepare_scheduler(accelerator: Any, given: Any) -> Any:
    """The scheduler, moved once an optimizer step."""
    session = needed_session(accelerator)
    scheduler, notices = schedules.prepare(given, session, accelerator.step_scheduler_with_optimizer)
    _say(accelerator, notices)
    return scheduler


def _say(accelerator: Any, lines: Sequence[str]) -> None:
    for line in lines:
        accelerator.print(line)
