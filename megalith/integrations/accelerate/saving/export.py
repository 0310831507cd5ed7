"""A prepared model for transformers: as a folder that `from_pretrained` reads, or as a state_dict."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils.modeling import convert_file_size_to_int
from torch import Tensor
from torch.distributed.tensor import DTensor

from megalith import checkpoint
from megalith.checkpoint.formats import HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.family import FAMILIES
from megalith.checkpoint.formats.huggingface.files import INDEX, WEIGHT_FILES
from megalith.checkpoint.formats.huggingface.tokenizer import tokenizer_files
from megalith.checkpoint.ranks import Ranks
from megalith.checkpoint.store.dcp import local
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights, read_megalith
from megalith.common.errors import ConfigError, problem
from megalith.common.files import fsync_directory, remove_leftovers, temporary_path
from megalith.common.locks import locked
from megalith.config.flags.loading import to_yaml
from megalith.config.flags.text import Words
from megalith.config.parameters import parameter_shapes
from megalith.integrations.accelerate.session import Session
from megalith.runtime import state
from megalith.runtime.build import Runtime


def save_pretrained(
    session: Session, save_directory: str | os.PathLike, *, is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None, save_function: Any = None, max_shard_size: int | str = "50GB",
    safe_serialization: bool = True, **others: Any,
) -> None:  # fmt: skip
    """Write a folder that transformers' from_pretrained reads: weights in float32, configs, tokenizer files if known.

    Every process must call it, with the same folder, which all of them see. No process holds the whole model: a sharded
    one is written as a checkpoint into the folder, and converted tensor by tensor. What the folder has under the same
    names is replaced, and so are older weights; other files stay.

    is_main_process, save_function: as scripts pass them to transformers; one process writes whichever is the main one.
    state_dict: what `Accelerator.get_state_dict` returned, perhaps changed, instead of the present weights; processes
    without it pass {}. max_shard_size: bytes of a file at most, or a text such as "5GB". safe_serialization: False
    writes pytorch_model.bin. Raises ConfigError for other options of transformers, CheckpointError on all processes
    where a file cannot be written.
    """
    if asked := sorted(name for name, value in others.items() if value):
        cure = "Leave it out; huggingface_hub.upload_folder uploads the folder afterwards"
        raise ConfigError(problem("save_pretrained", Words(", ".join(asked)), "does not have this option here", cure))
    options = HuggingFaceOptions(max_shard_size=_bytes_of(max_shard_size), safetensors=safe_serialization)
    ranks, folder = Ranks(), pathlib.Path(save_directory)
    givers = ranks.collect(lambda: bool(state_dict))
    if not ranks.collect(lambda: bool(is_main_process), any):
        cure = "Pass accelerator.is_main_process, or leave it out"
        raise ConfigError(problem("is_main_process", Words("False everywhere"), "must be True somewhere", cure))
    if state_dict is not None and not any(givers):
        cure = "Pass accelerator.get_state_dict(model), called on every process, or leave it out"
        raise ConfigError(problem("state_dict", Words("{} everywhere"), "must have tensors on one process", cure))
    writer = givers.index(True) if any(givers) else 0
    with contextlib.ExitStack() as held:
        temporary = pathlib.Path(ranks.on_rank_0(lambda: _begin(folder, held)))
        try:
            if state_dict is None:
                weights = _whole_weights(session, temporary / "weights", ranks)
            else:
                tensors = {name: Lazy.of(tensor.detach().cpu()) for name, tensor in state_dict.items()}
                weights = functools.partial(
                    huggingface.weights_of_tensors, session.hf_config, session.hf_class, tensors
                )  # fmt: skip

            def write() -> None:
                files = source_files(session, temporary / "source")
                huggingface.write(dataclasses.replace(weights(), files=files), temporary / "new", options)
                _replace(temporary / "new", folder)

            ranks.on_every_rank(lambda: write() if ranks.rank == writer else None)
        finally:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)


def state_dict(session: Session) -> dict[str, Tensor]:
    """The weights as transformers' model has them in its state_dict: on the CPU of the main process; {} elsewhere.

    Every process must call it. The main process, which is the last one, holds the whole model then. Tied weights are
    one tensor under several names. Raises CheckpointError where transformers cannot represent the model.
    """
    options = HuggingFaceOptions(architecture=session.hf_config.model_type)
    weights = Weights(config=session.config, tensors={})
    _, family = huggingface.choose_family(weights, options)
    session.reshard()
    tensors = {f"model/{name}": Lazy.of(tensor) for name, tensor in gather(session.runtime).items()}
    if not tensors:
        return {}
    files = huggingface.tensors_of_family(dataclasses.replace(weights, tensors=tensors), family, options)
    with torch.device("meta"):
        names = list(session.hf_class(session.hf_config).state_dict())
    found = {}
    for name in names:
        file_name = family.file_names.get(name, name)
        if file_name not in files and file_name in family.tied:
            file_name = family.tied[file_name].original
        found[name] = files[file_name].read().contiguous()
    return found


def gather(runtime: Runtime) -> dict[str, Tensor]:
    """Every parameter, whole and on the CPU, by its name in the whole model: on the last process; {} on the others.

    Every process calls it. Of one parameter at a time all processes hold the whole.
    """
    mesh, here = runtime.mesh, dict(runtime.named_parameters())

    def merge(tables: list[dict[str, int]]) -> dict[str, int]:
        return {name: rank for table in tables for name, rank in table.items()}

    # {name: the pipeline rank that sends it}
    owners = Ranks().collect(lambda: dict.fromkeys(here, mesh.rank("pp")), merge)
    dtype, is_last = next(iter(here.values())).dtype, mesh.global_rank == mesh.world_size - 1
    found: dict[str, Tensor] = {}
    for name, shape in parameter_shapes(runtime.config.model).items():
        if owners[name] == mesh.rank("pp"):
            parameter = here[name].detach()
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        else:
            whole = torch.empty(shape, dtype=dtype, device=mesh.device)
        mesh.broadcast(whole, "pp", owners[name])
        if is_last:
            found[name] = whole.cpu().clone()
    return found


def source_files(session: Session, folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name in a checkpoint of megalith: file} of what a Hugging Face folder has beside its weights.

    The configs are written into the new `folder`; none of a user's own architecture, which no family describes.
    """
    folder.mkdir()
    files = {} if session.tokenizer_folder is None else tokenizer_files(session.tokenizer_folder)
    if getattr(session.hf_config, "model_type", None) not in FAMILIES.addresses:
        return files
    config = json.loads(session.hf_config.to_json_string())
    contents = {huggingface.CONFIG: config | {"architectures": [session.hf_class.__name__], "dtype": "float32"}}
    if session.generation_config is not None:
        contents[huggingface.GENERATION] = json.loads(session.generation_config.to_json_string())
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files | {f"{huggingface.SOURCE_FOLDER}{name}": folder / name for name in contents}


def _bytes_of(size: int | str) -> int:
    try:
        return convert_file_size_to_int(size)
    except ValueError:
        rule = "must be a number of bytes, or a text with a unit"
        raise ConfigError(problem("max_shard_size", size, rule, "Try '5GB'")) from None


def _begin(folder: pathlib.Path, held: contextlib.ExitStack) -> str:
    """Lock the folder, and make a temporary one in it, where both are on one file system."""
    held.enter_context(locked(folder, inside=True))
    remove_leftovers(folder / "export")
    temporary = temporary_path(folder / "export")
    temporary.mkdir()
    return str(temporary)


def _whole_weights(session: Session, folder: pathlib.Path, ranks: Ranks) -> functools.partial[Weights]:
    """A function that gives process 0 the weights: of one process from memory, else from a checkpoint in `folder`."""
    session.reshard()
    tensors = [state.weights(stage) for stage in session.runtime.stages]
    if ranks.size == 1:
        lazies = {name: _on_cpu(local(tensor)) for part in tensors for name, tensor in part.items()}
        return functools.partial(Weights, config=session.config, tensors=lazies)
    checkpoint.save(folder, session.steps, tensors, train_state={}, config_yaml=to_yaml(session.config))
    return functools.partial(read_megalith, folder)


def _on_cpu(tensor: Tensor) -> Lazy:
    return Lazy(shape=tuple(tensor.shape), dtype=tensor.dtype, read=tensor.cpu, box=lambda index: tensor[index].cpu())


def _replace(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Move the files of `new` into the folder, where they replace those of an earlier save.

    A folder without config.json is no model to anybody: it is taken away first and comes back last.
    """
    (folder / huggingface.CONFIG).unlink(missing_ok=True)
    for name in WEIGHT_FILES:
        stem, _, ending = name.rpartition(".")
        for old in (folder / name, folder / f"{name}{INDEX}", *folder.glob(f"{stem}-?????-of-?????.{ending}")):
            old.unlink(missing_ok=True)
    for file in sorted(new.iterdir(), key=lambda file: file.name == huggingface.CONFIG):
        os.replace(file, folder / file.name)
    fsync_directory(folder)
