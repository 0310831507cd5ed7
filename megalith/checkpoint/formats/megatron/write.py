"""Weights for Megatron-LM's legacy models: one file for each tensor and pipeline rank, checkpoint_version 3.0.

Tensors are split and written one by one; a rank's file is never in memory as a whole.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megalith.checkpoint.formats import MegatronOptions
from megalith.checkpoint.formats.megatron.arguments import to_arguments
from megalith.checkpoint.formats.megatron.layout import Layout, check_divisible, shard_shape, take_shard
from megalith.checkpoint.formats.megatron.names import (
    HEADS,
    TIED_EMBEDDING,
    ParamMapping,
    mappings_of_model,
    mappings_of_parameters,
    table_of,
)
from megalith.checkpoint.formats.megatron.optimizer import MOMENTS, SCHEDULE, flat_buffer, parameter_order
from megalith.checkpoint.formats.megatron.source import TRACKER
from megalith.checkpoint.store.folder import check_new
from megalith.checkpoint.tensors.lazy import Lazy, check_range
from megalith.checkpoint.tensors.torch_file import Placeholder, save
from megalith.checkpoint.weights import Weights
from megalith.common import files
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words
from megalith.config.megatron.counts import padded_vocabulary
from megalith.config.parameters import tied_output

NESTED = ("embedding", "output_layer", "word_embeddings_for_head", *HEADS[1:])  # nested dicts; others have dotted names
BESIDE_LANGUAGE_MODEL = ("word_embeddings_for_head", *HEADS)
EMBEDDING_PREFIX = "embedding."
UNSUPPORTED_FIELDS: dict[str, Any] = {  # fields of the model -> the only value that Megatron's legacy models have
    "sliding_window": None, "rope_scaling_type": None, "scaled_alibi": False, "embed_layernorm": False,
    "parallel_attn": False, "norm_after_residual": False, "relu": False, "qk_layernorm": False, "softmax_scale": None,
    "scale_output": False, "apply_layernorm_1p": False, "scale_embeddings": False,
}  # fmt: skip


def write(weights: Weights, folder: pathlib.Path, options: MegatronOptions) -> None:
    """Write `weights` into the new `folder`, in the layout that the options name.

    Raises CheckpointError where the folder is not empty, or where heads, sizes or layers cannot be split so.
    """
    if not table_of(kind := weights.config.model.model_type).writable:
        rule = "is read from Megatron's files, and not written"
        raise CheckpointError(problem("A model of this kind", kind, rule, "Keep it as it is"))
    check_new(folder)
    export = _Export(weights, options)
    name = f"iter_{weights.iteration:07d}" if weights.iteration else "release"
    for pipeline in range(export.pipeline):
        for tensor in range(export.layout.ranks):
            suffix = f"_{pipeline:03d}" if export.pipeline > 1 else ""
            rank_folder = folder / name / f"mp_rank_{tensor:02d}{suffix}"
            rank_folder.mkdir(parents=True)
            for file, content in export.files(tensor, pipeline).items():
                save(rank_folder / file, content)
    files.write_text(folder / TRACKER, str(weights.iteration or "release"))


class _Export:
    """An export, with everything that is the same for every rank."""

    def __init__(self, weights: Weights, options: MegatronOptions):
        self.weights, self.options = weights, options
        model = weights.config.model
        self.pipeline, chunk = options.pipeline_model_parallel_size, options.num_layers_per_virtual_pipeline_stage
        self.virtual = None if chunk is None else max(1, (model.num_layers or 0) // self.pipeline // max(1, chunk))
        divisor = options.make_vocab_size_divisible_by or model.make_vocab_size_divisible_by
        ranks = options.tensor_model_parallel_size
        self.layout = Layout(
            heads=model.num_attention_heads or 1,
            groups=model.num_kv_heads,
            head_dim=model.head_dim,
            vocabulary=model.vocab_size or 0,
            padded=padded_vocabulary(model.vocab_size or 0, divisor, ranks),
            ranks=ranks,
            gate_first=options.swiglu_order != "gate-second",
        )
        names = [name.removeprefix("model/") for name in weights.tensors if name.startswith("model/")]
        multiquery = model.attention_head_type == "multiquery"
        all_mappings = mappings_of_model(model.model_type, gated=model.gated, multiquery=multiquery)
        self.mappings = mappings_of_parameters(all_mappings, names, model.num_layers or 0)
        self.shapes = {name: weights.tensors[f"model/{name}"].shape for name in names}
        self.dtype = getattr(torch, options.dtype) if options.dtype else weights.tensors[f"model/{names[0]}"].dtype
        self.with_optimizer = options.with_optimizer
        # T5 has stages of the encoder, then stages of the decoder: the first stage of the decoder.
        self.split = (
            self.pipeline * (model.num_layers or 0) // model.all_layers
            if model.decoder_layers and self.pipeline > 1
            else None
        )
        self._check()
        check_range({name: lazy for name, lazy in weights.tensors.items() if name.startswith("model/")}, self.dtype)
        self.stages = self._stages()
        arguments = to_arguments(
            weights.config,
            iteration=weights.iteration,
            tensor=ranks,
            pipeline=self.pipeline,
            split=self.split,
            virtual=self.virtual,
            data=options.data_parallel_size if self.with_optimizer else 1,
            padded=self.layout.padded,
        )
        counts = {
            name: weights.train_state.get(name, 0) for name in ("consumed_train_samples", "consumed_valid_samples")
        }
        of_export = {
            "params_dtype": self.dtype,
            "bf16": self.dtype == torch.bfloat16,
            "fp16": self.dtype == torch.float16,
            "make_vocab_size_divisible_by": divisor,
            "use_distributed_optimizer": options.use_distributed_optimizer and self.with_optimizer,
        }
        self.args = argparse.Namespace(**(arguments | counts | of_export))

    def _check(self) -> None:
        model = self.weights.config.model
        unsupported = [name for name, value in UNSUPPORTED_FIELDS.items() if getattr(model, name, value) != value]
        if unsupported:
            rule = "has no counterpart in Megatron's legacy models, which would compute something else"
            found = getattr(model, unsupported[0])
            raise CheckpointError(problem(unsupported[0], found, rule, "Export to another format"))
        stacks = {
            "encoder" if model.decoder_layers else "model": (
                model.num_layers or 0,
                self.split or self.pipeline * (self.virtual or 1),
            )
        }
        if model.decoder_layers:
            stacks["decoder"] = (model.decoder_layers, self.pipeline - (self.split or 0))
        for stack, (layers, stages) in stacks.items():
            if not stages or layers % stages or (model.decoder_layers and self.virtual):
                rule = f"must give each of {stages} stages of the {stack} as many of its {layers} layers"
                rule += ", without virtual stages" if model.decoder_layers else ""
                cure = "Take a number of stages that divides it"
                raise CheckpointError(problem("--pipeline-model-parallel-size", self.pipeline, rule, cure))
        layers, chunk = (model.num_layers or 0) // self.pipeline, self.options.num_layers_per_virtual_pipeline_stage
        if chunk is not None and chunk not in (sizes := [size for size in range(1, layers + 1) if layers % size == 0]):
            rule = f"must divide the {layers} layers of a stage ({', '.join(map(str, sizes))})"
            raise CheckpointError(problem("--num-layers-per-virtual-pipeline-stage", chunk, rule, "Take one of these"))
        shapes = [(each.megatron_name, each.split, self.shapes[each.parameters[0]]) for each in self.mappings]
        check_divisible(self.layout, shapes)
        first = self.mappings[0].parameters[0]
        missing = [key for key in MOMENTS if f"optimizer/{key}/{first}" not in self.weights.tensors]
        if self.with_optimizer and missing:
            rule = f"must have {' and '.join(missing)} of every parameter, as Adam has them"
            raise CheckpointError(problem("The optimizer", Words("nothing"), rule, "Export without it"))

    def files(self, tensor: int, pipeline: int) -> dict[str, Any]:
        """{name: content} of one rank's files."""
        chunks = [self._chunk(tensor, pipeline, number) for number in range(self.virtual or 1)]
        state = self.weights.train_state
        content: dict[str, Any] = {"args": self.args, "checkpoint_version": 3.0, "iteration": self.weights.iteration}
        for number, chunk in enumerate(chunks):
            placeholders = {name: self._placeholder(mapping, tensor) for name, mapping in chunk.items()}
            content[f"model{number}" if self.virtual else "model"] = _tree(placeholders)
        others: dict[str, Any] = {}
        if self.with_optimizer:
            content["optimizer"], others = self._optimizer(chunks, tensor)
            if schedule := state.get("schedule"):
                content["opt_param_scheduler"] = {
                    megatron_name: schedule[name] for megatron_name, name in SCHEDULE.items() if name in schedule
                } | {"num_steps": state.get("scheduled_samples", 0)}
        return {"model_optim_rng.pt": content} | others

    def _stages(self) -> list[dict[str, range]]:
        """The layers of each stage, in the order of the model: {"encoder": numbers, "decoder": numbers}."""
        model = self.weights.config.model
        last, count = model.num_layers or 0, self.split or self.pipeline * (self.virtual or 1)
        encoder = [range(number * last // count, (number + 1) * last // count) for number in range(count)]
        stages = [{"encoder": layers} for layers in encoder]
        if model.decoder_layers:
            size = model.decoder_layers // (self.pipeline - (self.split or 0))
            decoder = [range(first, first + size) for first in range(last, model.all_layers, size)]
            if self.split is None:
                return [{"encoder": encoder[0], "decoder": decoder[0]}]
            stages += [{"decoder": layers} for layers in decoder]
        return stages

    def _chunk(self, tensor: int, pipeline: int, number: int) -> dict[str, ParamMapping]:
        """{name in the file: mapping} of a stage's chunk, in the order of Megatron's modules; layers count from 0."""
        stage, last = number * self.pipeline + pipeline, len(self.stages) - 1
        found: dict[str, ParamMapping] = {}
        for mapping in self.mappings:
            layer = re.match(r"(encoder|decoder)\.layers\.(\d+)\.", mapping.megatron_name)
            if layer:
                layers = self.stages[stage].get(layer[1], range(0))
                if int(layer[2]) in layers:
                    rest = mapping.megatron_name[layer.end() :]
                    found[f"{layer[1]}.layers.{int(layer[2]) - layers.start}.{rest}"] = mapping
            elif stage in self._stages_of(mapping, last):
                found[mapping.megatron_name] = mapping
        if stage == last and self.pipeline > 1 and tied_output(self.weights.config.model):
            heads = {name: found.pop(name) for name in list(found) if name.startswith(BESIDE_LANGUAGE_MODEL)}
            embedding = next(each for each in self.mappings if each.megatron_name.startswith(EMBEDDING_PREFIX))
            found |= {TIED_EMBEDDING: embedding} | heads
        return found

    def _stages_of(self, mapping: ParamMapping, last: int) -> tuple[int, ...]:
        """The stages that hold a tensor outside of layers: embeddings begin each stack, everything else ends one."""
        if mapping.megatron_name.startswith(EMBEDDING_PREFIX):
            return (0,) if self.split is None else (0, self.split)
        return (self.split - 1,) if self.split and mapping.megatron_name.startswith("encoder.") else (last,)

    def _lazies(self, mapping: ParamMapping, prefix: str) -> list[Lazy]:
        return [self.weights.tensors[prefix + name] for name in mapping.parameters]

    def _shard(self, mapping: ParamMapping, tensor: int, prefix: str) -> Tensor:
        """One rank's shard of the weights or moments of a mapping."""
        return take_shard(mapping.split, self._lazies(mapping, prefix), self.layout, tensor, padding=prefix == "model/")

    def _placeholder(
        self, mapping: ParamMapping, tensor: int, prefix: str = "model/", dtype: torch.dtype | None = None
    ) -> Placeholder:
        shape = shard_shape(mapping.split, [lazy.shape for lazy in self._lazies(mapping, prefix)], self.layout)
        return Placeholder(shape, dtype or self.dtype, ((0, functools.partial(self._shard, mapping, tensor, prefix)),))

    def _optimizer(
        self, chunks: Sequence[Mapping[str, ParamMapping]], tensor: int
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The value of `optimizer`, and further files."""
        mappings = {
            f"{number}:{name}": mapping for number, chunk in enumerate(chunks) for name, mapping in chunk.items()
        }
        masters = {name: self._placeholder(mapping, tensor, dtype=torch.float32) for name, mapping in mappings.items()}
        empty = {
            name: Lazy(shape=placeholder.shape, dtype=placeholder.dtype, read=lambda: torch.empty(0))
            for name, placeholder in masters.items()
        }
        groups = parameter_order([empty])
        numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
        config, step = self.weights.config.optimizer, self._step()
        param_groups = [
            {
                "lr": config.lr or 0.0,
                "betas": (config.adam_beta1, config.adam_beta2),
                "eps": config.adam_eps,
                "bias_correction": True,
                "weight_decay": config.weight_decay * mult,
                "wd_mult": mult,
                "lr_mult": 1.0,
                "step": step,
                "params": [numbers[name] for name in group],
            }
            for group in groups
            for mult in [1.0 if len(masters[group[0]].shape) > 1 else 0.0]
        ]
        scaler = {"grad_scaler": self._scaler()} if self.dtype == torch.float16 else {}
        if self.options.use_distributed_optimizer:
            flat = {number: {torch.float32: self._flat_buffers(chunk, tensor)} for number, chunk in enumerate(chunks)}
            return {"optimizer": {"param_groups": param_groups}} | scaler, {"distrib_optim.pt": flat}
        moments = {
            numbers[name]: {
                key: self._placeholder(mapping, tensor, f"optimizer/{key}/", torch.float32) for key in MOMENTS
            }
            for name, mapping in mappings.items()
        }
        inner = {"state": {number: moments[number] for number in sorted(moments)}, "param_groups": param_groups}
        if self.dtype == torch.float32:
            return inner, {}
        copies = {"fp32_from_fp16_params": [[masters[name] for name in group] for group in groups]}
        return {"optimizer": inner} | scaler | copies, {}

    def _flat_buffers(self, chunk: Mapping[str, ParamMapping], tensor: int) -> dict[str, Placeholder]:
        """The buffers of the distributed optimizer, padded to a multiple of the data-parallel size."""
        shapes = {name: self._placeholder(mapping, tensor) for name, mapping in chunk.items()}
        ranges = flat_buffer(
            {
                name: Lazy(shape=placeholder.shape, dtype=placeholder.dtype, read=lambda: torch.empty(0))
                for name, placeholder in shapes.items()
            }
        )
        total, ranks = sum(count for _, _, count in ranges), self.options.data_parallel_size
        found = {}
        for megatron_key, prefix in {"param": "model/", **{key: f"optimizer/{key}/" for key in MOMENTS}}.items():
            pieces = tuple(
                (first, functools.partial(self._shard, chunk[name], tensor, prefix)) for name, first, _ in ranges
            )
            found[megatron_key] = Placeholder((-(-total // ranks) * ranks,), torch.float32, pieces)
        return found

    def _step(self) -> int:
        lazy = self.weights.tensors.get(f"optimizer/step/{self.mappings[0].parameters[0]}")
        return int(lazy.read()) if lazy else self.weights.iteration

    def _scaler(self) -> dict[str, Any]:
        state = dict(self.weights.train_state.get("loss_scale", {}))
        scale = Placeholder((1,), torch.float32, ((0, functools.partial(torch.tensor, [state.pop("scale", 1.0)])),))
        return {"scale": scale, "growth_tracker": 0, "hysteresis_tracker": 2} | state


def _tree(placeholders: Mapping[str, Placeholder]) -> dict[str, Any]:
    """Tensors under dotted names as Megatron nests them."""
    tree: dict[str, Any] = {"language_model": {}}
    for name, placeholder in placeholders.items():
        top, _, rest = name.partition(".")
        node = tree if top in BESIDE_LANGUAGE_MODEL else tree["language_model"]
        node = node.setdefault(top, {})
        keys = rest.split(".") if top in NESTED else [rest]
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        node[keys[-1]] = placeholder
    return tree
