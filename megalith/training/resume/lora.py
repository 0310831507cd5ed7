"""What a LoRA run starts from: a base, which stays as it is, and the adapters that are trained on it."""

from __future__ import annotations

import dataclasses
import os

from megalith import checkpoint
from megalith.checkpoint.formats import adapters, foreign
from megalith.checkpoint.store.folder import checkpoint_folder, is_megalith, load_path
from megalith.checkpoint.weights import Weights, read_megalith
from megalith.common.errors import CheckpointError, problem
from megalith.config.adapters import adapted_modules, is_adapter
from megalith.config.flags.text import Words, flag, value_text
from megalith.config.run import RunConfig
from megalith.training.resume.source import source_of, weights_only


def read_start(config: RunConfig) -> Weights | None:
    """The weights that the model of a LoRA run is built from: the base's, with adapters if it does not begin with new
    ones. None without LoRA.

    Their train_state has the record of the base, which is what --load names, else what the run's own checkpoint, or
    that of --load, says. Raises CheckpointError where there is none, or it is not there or has changed, or adapters
    differ from those of the config, and as `check_kind` does.
    """
    if not config.lora.lora_rank:
        return None
    check_kind(config)
    source, load, step = source_of(config), load_path(config), config.checkpoint.ckpt_step
    if source is None:
        rule = "must name the model that the adapters are trained on, as random weights would stay as they are"
        raise CheckpointError(problem("--load", Words("nothing"), rule, "Name it: --load MODEL"))
    if source != checkpoint_folder(config):
        adapter = config.lora.adapter if weights_only(config) else None
        found = foreign.read(load or "", foreign.read_options(config, adapter=adapter))
    else:
        own = read_megalith(source, step)
        if load is None:
            found = adapters.with_base(own)
        else:
            found = adapters.attach(foreign.read(load, foreign.read_options(config, iteration=None)), own)
    _check_same(config, found)
    record = found.train_state.get(adapters.BASE) or adapters.record_of(found)
    if not any(map(is_adapter, found.tensors)):
        found = adapters.with_magnitudes(found, config)
    return dataclasses.replace(found, train_state={**found.train_state, adapters.BASE: record})


def check_kind(config: RunConfig) -> None:
    """Raise CheckpointError where a run would resume with adapters what has none, or without them what has some."""
    source, rank = source_of(config), config.lora.lora_rank
    if source is None or not is_megalith(source) or (rank and weights_only(config)):
        return
    found = holds_adapters(source, config.checkpoint.ckpt_step)
    if found and not rank:
        rule = "must be resumed with the flags of its adapters, or merged into a model first"
        cure = f"Give --lora-rank N, or write megalith checkpoint export {source} FOLDER --to megalith"
        raise CheckpointError(problem(f"{source}", Words("adapters of a LoRA run"), rule, cure))
    if rank and not found:
        rule, cure = "must be of a LoRA run to resume with --lora-rank", "Name a new --run-dir (and --save)"
        raise CheckpointError(problem(f"{source}", Words("a whole model"), rule, cure))


def holds_adapters(source: str | os.PathLike, step: int | None) -> bool:
    """Whether a checkpoint of megalith is of adapters."""
    return any(map(is_adapter, checkpoint.describe(checkpoint.find(source, step))["tensors"]))


def _check_same(config: RunConfig, found: Weights) -> None:
    """Raise CheckpointError where adapters that were read are not those that the config describes."""
    now, then, model = config.lora, found.config.lora, found.config.model
    if not any(map(is_adapter, found.tensors)):
        return
    pairs = {
        "lora_rank": (now.lora_rank, then.lora_rank),
        "lora_alpha": (now.scale * now.lora_rank, then.scale * then.lora_rank),
        "use_dora": (now.use_dora, then.use_dora),
        "lora_target_modules": tuple(list(adapted_modules(model, lora)) for lora in (now, then)),
    }
    if differing := [name for name, (one, other) in pairs.items() if one != other]:
        values = {**{name: pair[1] for name, pair in pairs.items()}, "lora_target_modules": then.lora_target_modules}
        flags = [_typed(name, value) for name, value in values.items() if value or name in differing]
        rule = f"must be those of the adapters in {found.source}: {' '.join(flags)}"
        now_text = " ".join(_typed(name, getattr(now, name)) for name in differing)
        raise CheckpointError(problem("LoRA's flags", Words(now_text), rule, "Give these"))


def _typed(name: str, value: object) -> str:
    """A flag with its value, as they are typed."""
    if value is True:
        return flag(name)
    return f"{flag(name)} {value_text(value)}" if value else f"no {flag(name)}"
