"""Options of the readers and writers of checkpoint formats: one class for each format, with the fields that it uses."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from megalith.config.architectures import architecture
from megalith.config.sections.data import DataConfig

REPLICAS = ("equal", "average")  # that a user may choose
QKV_LAYOUTS, SWIGLU_ORDERS = ("auto", "grouped", "thirds", "interleaved"), ("auto", "gate-first", "gate-second")


def no_tokenizer(data: DataConfig) -> int | None:
    """None: the default of `vocabulary_size`, where no tokenizer goes along."""
    return None


@dataclass(frozen=True, kw_only=True)
class Options:
    """For every format.

    tokenizer: folder of the tokenizer files to take instead of the source's.
    adapter: folder of low-rank adapters (formats/adapters.py) that are read together with the source, their base.
    """

    tokenizer: pathlib.Path | None = None
    adapter: str | os.PathLike | None = None

    @classmethod
    def select(cls, given: Mapping[str, Any]) -> Self:
        """The options of this format among `given`, {name: value} of options of any format."""
        names = {each.name for each in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in names})


def as_mapping(options: Options | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """{name: value} of options, whichever way they are given."""
    if isinstance(options, Options):
        return {each.name: getattr(options, each.name) for each in dataclasses.fields(options)}
    return options or {}


@dataclass(frozen=True, kw_only=True)
class MegalithOptions(Options):
    """Checkpoints of megalith. iteration: which of several; None is the latest."""

    iteration: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """For formats that describe the model in other words than RunConfig.

    overrides: fields of the config, by flat name, that replace what the source states.
    assumed: fields of the model, by flat name, that are used where the source does not state them: where Megatron's
        files hold no arguments and no shape shows them. A Hugging Face folder is read with model_type alone of these.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)

    def custom_model(self, format: str) -> str | None:
        """The user's model type (module:name) as which a source in `format` is read: from the overrides, or the run's.

        None where there is none, or where its Architecture record has no names in that format.
        """
        types = [str(fields.get("model_type") or "") for fields in (self.overrides, self.assumed)]
        return next((name for name in types if ":" in name and format in architecture(name).names), None)


@dataclass(frozen=True, kw_only=True)
class HuggingFaceOptions(ModelOptions):
    """Hugging Face folders. The fields that it does not inherit say how one is written.

    dtype: float32, bfloat16 or float16; None is the source's.
    max_shard_size: bytes of one file at most (a single tensor may be larger). safetensors: False is pytorch_model.bin.
    architecture: the family written, by its name in FAMILIES (llama, gpt2, ...: config.json's model_type); None is that
        of the source, or the first that can represent the model.
    """

    dtype: str | None = None
    max_shard_size: int = 5_000_000_000
    safetensors: bool = True
    architecture: str | None = None


@dataclass(frozen=True, kw_only=True)
class PeftOptions(Options):
    """Folders of adapters, as peft has them. The fields say how one is written.

    dtype, architecture: as of HuggingFaceOptions.
    """

    dtype: str | None = None
    architecture: str | None = None


@dataclass(frozen=True, kw_only=True)
class MegatronReadOptions(ModelOptions):
    """How checkpoints of Megatron, of Megatron core and of Megatron-DeepSpeed are read.

    iteration: which of several; None is the latest. with_optimizer: the optimizer's state too.
    qkv_layout: order of rows in fused q, k, v (grouped, thirds, interleaved: see megatron/layout.py).
    swiglu_order: which half of a fused gate and up projection is the gate. auto: what the source states, or most likely
        has.
    replicas: copies that several ranks have of one parameter. equal: an error where more than rounding differs;
        average: their mean; first: the first, and none is compared (not for users: where another process compares, or
        values are not used).
    vocabulary_size(section `data` of the config): the size of the vocabulary of the tokenizer that goes along; None
        where none goes along.
    """

    iteration: int | None = None
    with_optimizer: bool = False
    qkv_layout: str = "auto"
    swiglu_order: str = "auto"
    replicas: str = "equal"
    vocabulary_size: Callable[[DataConfig], int | None] = no_tokenizer


@dataclass(frozen=True, kw_only=True)
class MegatronOptions(MegatronReadOptions):
    """Megatron's directories. The fields that it does not inherit are the layout and dtype of what is written.

    with_optimizer and swiglu_order are of what is written, too; without with_optimizer data_parallel_size and
    use_distributed_optimizer have no effect. dtype: None is the source's. make_vocab_size_divisible_by: None is the
    model's.
    """

    dtype: str | None = None
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    num_layers_per_virtual_pipeline_stage: int | None = None
    data_parallel_size: int = 1
    use_distributed_optimizer: bool = False
    make_vocab_size_divisible_by: int | None = None


@dataclass(frozen=True, kw_only=True)
class TorchDistOptions(MegatronReadOptions):
    """Megatron core's torch_dist checkpoints, which are only read."""


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions(MegatronReadOptions):
    """DeepSpeed's directories, which are only read."""
