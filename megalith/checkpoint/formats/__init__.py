"""The formats that weights come from and go to, by name; each is one module with a FORMAT.

weights = read(SOURCE)                    # whatever it is
FORMATS.find("huggingface").write(weights, FOLDER, Options(dtype="bfloat16"))
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from megalith.checkpoint import weights as own_format
from megalith.checkpoint.formats.huggingface import tokenizer
from megalith.checkpoint.store.folder import is_ours, runs_in
from megalith.checkpoint.store.manifest import NAME as MANIFEST
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError, problem
from megalith.common.pointers import pointers_below
from megalith.common.registry import Registry
from megalith.config.architectures import architecture
from megalith.config.sections.data import DataConfig

REPLICAS = ("equal", "average")
QKV_LAYOUTS, SWIGLU_ORDERS = ("auto", "grouped", "thirds", "interleaved"), ("auto", "gate-first", "gate-second")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a reader or a writer may be told; each takes what concerns it.

    qkv_layout, swiglu_order: order of rows in fused weights, where the source does not tell (auto: what it most likely is).
    dtype: of what is written: float32, bfloat16 or float16; None keeps that of the source.
    tensor_model_parallel_size, pipeline_model_parallel_size, num_layers_per_virtual_pipeline_stage, data_parallel_size,
    use_distributed_optimizer, make_vocab_size_divisible_by: the layout written, in formats that have one.
    max_shard_size: bytes of one file at most (a single tensor may be larger). safetensors: or pytorch_model.bin.
    architecture: Hugging Face family written; None is that of the source, or the first that has this form.
    tokenizer: folder of tokenizer files that are written along, instead of those of the source.
    words: the size of that tokenizer's vocabulary, for weights with this section `data`; None where none goes along.
    with_optimizer: read or write the optimizer's state too. iteration: which checkpoint of several (the latest).
    overrides: fields of the config, by flat name, that override what the source says.
    assumed: fields of the model, by flat name, that count where Megatron's files hold no arguments and no shape tells.
    replicas: of copies that Megatron's ranks keep of one parameter: equal, where others are an error, or average; first
        compares none, which another process does.
    """

    qkv_layout: str = "auto"
    swiglu_order: str = "auto"
    dtype: str | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    data_parallel_size: int = 1
    use_distributed_optimizer: bool = False
    make_vocab_size_divisible_by: int | None = None
    max_shard_size: int = 5_000_000_000
    safetensors: bool = True
    architecture: str | None = None
    tokenizer: pathlib.Path | None = None
    words: Callable[[DataConfig], int | None] = lambda data: None
    with_optimizer: bool = False
    iteration: int | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    replicas: str = "equal"

    def own_model(self, format: str) -> str | None:
        """The model of one's own (module:name) as which a source in `format` is to be read: asked for, or the run's.

        None where there is none, or where its record has no names in that format.
        """
        said = [str(each.get("model_type") or "") for each in (self.overrides, self.assumed)]
        return next((name for name in said if ":" in name and format in architecture(name).names), None)


class Format(NamedTuple):
    """A format. looks: what one looks like, for the error that lists them all. write: None where it is only read."""

    looks: str
    recognises: Callable[[pathlib.Path], bool]
    read: Callable[[pathlib.Path, Options], Weights]
    write: Callable[[Weights, pathlib.Path, Options], None] | None = None


def _write_own(weights: Weights, folder: pathlib.Path, options: Options) -> None:
    own_format.write(weights, folder)


OWN = Format(
    f"megalith: a folder with {MANIFEST}, or one of iter_NNNNNNN folders that have it",
    is_ours,
    lambda path, options: own_format.own(path, options.iteration),
    _write_own,
)
FORMATS = Registry(
    "checkpoint format",
    {
        "megalith": "megalith.checkpoint.formats:OWN",
        "huggingface": "megalith.checkpoint.formats.huggingface.conversion:FORMAT",
        "megatron": "megalith.checkpoint.formats.megatron.legacy:FORMAT",
        "deepspeed": "megalith.checkpoint.formats.deepspeed.tree:FORMAT",
        "torch_dist": "megalith.checkpoint.formats.megatron.dist:FORMAT",
    },
)


def recognise(path: str | os.PathLike) -> str:
    """The name of the format that `path` is in. Raises CheckpointError where it is in none, or is not there."""
    place = pathlib.Path(path)
    if not place.exists():
        raise CheckpointError(problem("source", str(path), "there is no such file or folder", "Correct the path"))
    for name in FORMATS:
        if FORMATS.find(name).recognises(place):
            return name
    refuse_pointers(place)
    if runs := runs_in(place):
        raise CheckpointError(runs)
    inside = sorted(each.name for each in place.iterdir())[:8] if place.is_dir() else "a file"
    looks = "; ".join(FORMATS.find(name).looks for name in FORMATS)
    raise CheckpointError(
        problem(
            f"{place}",
            inside,
            f"no known format looks like this ({looks})",
            "Correct the path, or name the format with --from",
        )
    )


def refuse_pointers(place: pathlib.Path) -> None:
    """Raise CheckpointError that names the files in whose stead git LFS left pointers: the cause, where reading has failed."""
    if found := pointers_below(place):
        raise CheckpointError("\n".join(found[:8]) + f"\nand {len(found) - 8} more" * (len(found) > 8))


def read(path: str | os.PathLike, format: str | None = None, options: Options | None = None) -> Weights:
    """The weights at `path`, in `format` or the one recognised."""
    options = options or Options()
    try:
        weights = FORMATS.find(format or recognise(path)).read(pathlib.Path(path), options)
    except Exception:
        refuse_pointers(pathlib.Path(path))
        raise
    weights = replace(weights, source=os.fspath(path)) if weights.source == Weights.source else weights
    if options.tokenizer is None:
        return weights
    others = {name: file for name, file in weights.files.items() if not name.startswith(tokenizer.HERE)}
    return replace(weights, files=others | tokenizer.found_in(options.tokenizer))
