"""What a run starts from: its own newest checkpoint, what --load names in whatever format, or nothing."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from megalith import checkpoint
from megalith.checkpoint.formats import adapters, foreign
from megalith.checkpoint.store.folder import checkpoint_folder, is_megalith, load_path
from megalith.checkpoint.weights import Weights
from megalith.common.errors import ConfigError, MegalithError
from megalith.config.adapters import is_adapter
from megalith.config.flags.loading import from_yaml
from megalith.config.run import RunConfig


def source_of(config: RunConfig) -> str | os.PathLike | None:
    """What the config says a run starts from: its own newest checkpoint, --load's, or nothing; on this machine."""
    load, own = load_path(config), checkpoint_folder(config)
    if checkpoint.iterations(own) and (load is None or config.checkpoint.finetune):
        return own
    return None if load is None else foreign.local_path(load)


def weights_only(config: RunConfig) -> bool:
    """Whether a run takes only the weights from its source: --finetune, until it has its own checkpoint."""
    return config.checkpoint.finetune and source_of(config) != checkpoint_folder(config)


def is_foreign(source: str | os.PathLike) -> bool:
    """Whether a source is not a checkpoint of megalith."""
    return not is_megalith(source)


def read_foreign(config: RunConfig, *, with_optimizer: bool = False, check_replicas: bool = True) -> Weights:
    """The weights of a foreign source; adapters are merged into theirs, in float32.

    check_replicas: whether copies of one parameter in it are compared, which one process does for all.
    """
    options = foreign.read_options(config, with_optimizer=with_optimizer)
    if not check_replicas and options["replicas"] == "equal":
        options["replicas"] = "first"
    return adapters.merge(foreign.read(config.checkpoint.load or "", options), widen=True)


class Source(NamedTuple):
    """What a run is compared with. tokenizer: the folder of its files, if it has them."""

    path: str | os.PathLike
    config: RunConfig
    tokenizer: pathlib.Path | None
    train_state: Mapping[str, Any]


def read_source(config: RunConfig, source: str | os.PathLike) -> Source:
    """What is compared of a source.

    Raises ConfigError for a config that cannot be read here, CheckpointError for damage.
    """
    if is_foreign(source):
        weights = read_foreign(config, check_replicas=False)
        return Source(config.checkpoint.load or source, weights.config, weights.tokenizer, weights.train_state)
    path = checkpoint.find(source, config.checkpoint.ckpt_step)
    tokenizer = path / "tokenizer"
    then = from_yaml(checkpoint.read_config(path))
    return Source(path, then, tokenizer if tokenizer.is_dir() else None, checkpoint.read_train_state(path))


def infer_finetune(config: RunConfig) -> tuple[RunConfig, str]:
    """The config, with --finetune set where --load names weights that belong to no step of a run, and a line saying so.

    With LoRA those are all but the checkpoints of a LoRA run, and these too where --adapter names other adapters.
    Without, such are a Hugging Face folder, a release of Megatron, and what was converted from them; and what
    Accelerator.save_state saved, whose schedule is the script's. Called by the main process.
    """
    load, lora, of_script = load_path(config), config.lora, False
    if load is None or config.checkpoint.finetune or (config.validation.skip_train and not lora.lora_rank):
        return config, ""
    try:
        source = foreign.local_path(load, notice=lambda line: print(f"megalith: {line}", flush=True))
        if is_foreign(source):
            begins = lora.lora_rank > 0 or foreign.format_of(source) in ("huggingface", "peft")
            begins = begins or foreign.is_weights_only(read_foreign(config, check_replicas=False))
        else:
            path = checkpoint.find(source, config.checkpoint.ckpt_step)
            facts, state = checkpoint.describe(path), checkpoint.read_train_state(path)
            of_script = "accelerate" in state
            begins = facts["iteration"] == 0 and set(facts["parameters"]) == {"model"} and "schedule" not in state
            of_base = lora.adapter is not None or not any(map(is_adapter, facts["tensors"]))
            begins = begins or (lora.lora_rank > 0 and of_base)
    except MegalithError:  # it is raised again where the source is used, if it is
        return config, ""
    held = "weights that belong to no step of a run"
    if lora.lora_rank:
        held = "the weights that adapters are trained on"
    if of_script:
        held = "what Accelerator.save_state saved, of which a run takes the weights"
    line = f"--load {load} holds {held}: it begins with them at step 0, as with --finetune"
    return (config.replace(finetune=True), line) if begins or of_script else (config, "")


def check_save_folder(config: RunConfig) -> None:
    """Raise ConfigError where --load and --save name one folder, which holds another program's checkpoint."""
    own = checkpoint_folder(config)
    if config.checkpoint.load is None or load_path(config) is not None or is_megalith(own):
        return
    try:
        format = foreign.format_of(own)
    except MegalithError:
        return  # an empty folder: the run begins there
    raise ConfigError(
        f"--load and the folder of this run's own checkpoints are both {own}, which holds a checkpoint in the format "
        f"{format}; a run resumes from it in another folder. Name another --save."
    )
