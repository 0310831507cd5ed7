"""Weights as Megatron-LM's legacy models read them: one file for each tensor and pipeline rank, checkpoint_version 3.0.

Tensors are cut and written one by one; a rank's file is never in memory.
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

from megalith.checkpoint.formats import Options
from megalith.checkpoint.formats.megatron.arguments import to_arguments
from megalith.checkpoint.formats.megatron.layout import Layout, check_divisible, part_shape, split_part
from megalith.checkpoint.formats.megatron.names import HEADS, TIED, Row, rows_of, rows_of_ours
from megalith.checkpoint.formats.megatron.optimizer import MOMENTS, SCHEDULE, buffer, order
from megalith.checkpoint.formats.megatron.source import TRACKER
from megalith.checkpoint.store.folder import check_new
from megalith.checkpoint.tensors.lazy import Lazy, check_range
from megalith.checkpoint.tensors.torch_file import Room, save
from megalith.checkpoint.weights import Weights
from megalith.common import files
from megalith.common.errors import CheckpointError, problem
from megalith.config.megatron.counts import padded_vocabulary
from megalith.config.parameters import tied_output

# Dicts all the way; the rest has dotted names.
NESTED = ("embedding", "output_layer", "word_embeddings_for_head", *HEADS[1:])
OF_THE_MODEL = ("word_embeddings_for_head", *HEADS)
FIRST = "embedding."
UNWRITTEN: dict[str, Any] = {  # fields of the model that must have this value, because Megatron's legacy models know no other
    "sliding_window": None, "rope_scaling_type": None, "scaled_alibi": False, "embed_layernorm": False, "parallel_attn": False,
    "norm_after_residual": False, "relu": False, "qk_layernorm": False, "softmax_scale": None, "scale_output": False,
    "apply_layernorm_1p": False, "scale_embeddings": False,
}  # fmt: skip


def write(weights: Weights, folder: pathlib.Path, options: Options) -> None:
    """Write `weights` into the new `folder`, in the layout that the options name.

    Raises CheckpointError where the folder holds something, or where heads, sizes or layers cannot be cut so.
    """
    check_new(folder)
    export = _Export(weights, options)
    name = f"iter_{weights.iteration:07d}" if weights.iteration else "release"
    for pipeline in range(export.pipeline):
        for tensor in range(export.layout.ranks):
            place = folder / name / (f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if export.pipeline > 1 else ""))
            place.mkdir(parents=True)
            for file, content in export.files(tensor, pipeline).items():
                save(place / file, content)
    files.write_text(folder / TRACKER, str(weights.iteration or "release"))


class _Export:
    """What is the same for every rank."""

    def __init__(self, weights: Weights, options: Options):
        self.weights, self.options = weights, options
        model = weights.config.model
        self.pipeline, chunk = options.pipeline_model_parallel_size, options.num_layers_per_virtual_pipeline_stage
        self.virtual = None if chunk is None else max(1, (model.num_layers or 0) // self.pipeline // max(1, chunk))
        divisor = options.make_vocab_size_divisible_by or model.make_vocab_size_divisible_by
        ranks = options.tensor_model_parallel_size
        self.layout = Layout(
            heads=model.num_attention_heads or 1, groups=model.num_kv_heads, head_dim=model.head_dim, vocabulary=model.vocab_size or 0,
            padded=padded_vocabulary(model.vocab_size or 0, divisor, ranks), ranks=ranks,
            gate_first=options.swiglu_order != "gate-second",
        )  # fmt: skip
        names = [name.removeprefix("model/") for name in weights.tensors if name.startswith("model/")]
        rows = rows_of(model.model_type, gated=model.gated, multiquery=model.attention_head_type == "multiquery")
        self.rows = rows_of_ours(rows, names, model.num_layers or 0)
        self.shapes = {name: weights.tensors[f"model/{name}"].shape for name in names}
        self.dtype = getattr(torch, options.dtype) if options.dtype else weights.tensors[f"model/{names[0]}"].dtype
        self.with_optimizer = options.with_optimizer
        # T5 has stages of the encoder, then stages of the decoder.
        self.split = (
            self.pipeline * (model.num_layers or 0) // model.all_layers
            if model.decoder_layers and self.pipeline > 1
            else None
        )
        self._check()
        check_range({name: lazy for name, lazy in weights.tensors.items() if name.startswith("model/")}, self.dtype)
        self.stages = self._stages()
        arguments = to_arguments(
            weights.config, iteration=weights.iteration, tensor=ranks, pipeline=self.pipeline,
            split=self.split, virtual=self.virtual,
            data=options.data_parallel_size if self.with_optimizer else 1, padded=self.layout.padded,
        )  # fmt: skip
        counts = {
            name: weights.train_state.get(name, 0) for name in ("consumed_train_samples", "consumed_valid_samples")
        }
        own = {
            "params_dtype": self.dtype, "bf16": self.dtype == torch.bfloat16, "fp16": self.dtype == torch.float16,
            "make_vocab_size_divisible_by": divisor, "use_distributed_optimizer": options.use_distributed_optimizer and self.with_optimizer,
        }  # fmt: skip
        self.args = argparse.Namespace(**(arguments | counts | own))

    def _check(self) -> None:
        model = self.weights.config.model
        unwritten = [name for name, plain in UNWRITTEN.items() if getattr(model, name, plain) != plain]
        if unwritten:
            rule = "Megatron's legacy models have no such part, and would compute something else"
            raise CheckpointError(problem(unwritten[0], getattr(model, unwritten[0]), rule, "Export to another format"))
        parts = {
            "encoder" if model.decoder_layers else "model": (
                model.num_layers or 0,
                self.split or self.pipeline * (self.virtual or 1),
            )
        }
        if model.decoder_layers:
            parts["decoder"] = (model.decoder_layers, self.pipeline - (self.split or 0))
        for stack, (layers, stages) in parts.items():
            if not stages or layers % stages or (model.decoder_layers and self.virtual):
                rule = f"each of {stages} stages of the {stack} takes as many of its {layers} layers"
                rule += ", and there are no virtual stages" if model.decoder_layers else ""
                cure = "Take a number of stages that divides it"
                raise CheckpointError(problem("--pipeline-model-parallel-size", self.pipeline, rule, cure))
        each, chunk = (model.num_layers or 0) // self.pipeline, self.options.num_layers_per_virtual_pipeline_stage
        if chunk is not None and chunk not in (fit := [size for size in range(1, each + 1) if each % size == 0]):
            rule = f"it must divide the {each} layers of a stage: {', '.join(map(str, fit))}"
            raise CheckpointError(problem("--num-layers-per-virtual-pipeline-stage", chunk, rule, "Take one of these"))
        check_divisible(self.layout, [(row.theirs, row.split, self.shapes[row.ours[0]]) for row in self.rows])
        lacking = [key for key in MOMENTS if f"optimizer/{key}/{self.rows[0].ours[0]}" not in self.weights.tensors]
        if self.with_optimizer and lacking:
            raise CheckpointError(
                problem(
                    "optimizer",
                    None,
                    f"{' and '.join(lacking)} of every parameter would be needed, as Adam has them",
                    "Export without it",
                )
            )

    def files(self, tensor: int, pipeline: int) -> dict[str, Any]:
        """{name: content} of one rank's files."""
        chunks = [self._chunk(tensor, pipeline, number) for number in range(self.virtual or 1)]
        state = self.weights.train_state
        content: dict[str, Any] = {"args": self.args, "checkpoint_version": 3.0, "iteration": self.weights.iteration}
        for number, chunk in enumerate(chunks):
            rooms = {name: self._room(row, tensor) for name, row in chunk.items()}
            content[f"model{number}" if self.virtual else "model"] = _tree(rooms)
        others: dict[str, Any] = {}
        if self.with_optimizer:
            content["optimizer"], others = self._optimizer(chunks, tensor)
            if schedule := state.get("schedule"):
                content["opt_param_scheduler"] = {
                    theirs: schedule[ours] for theirs, ours in SCHEDULE.items() if ours in schedule
                } | {"num_steps": state.get("scheduled_samples", 0)}
        return {"model_optim_rng.pt": content} | others

    def _stages(self) -> list[dict[str, range]]:
        """The layers of each stage, in the order of the model: {"encoder": numbers, "decoder": numbers}."""
        model = self.weights.config.model
        last, count = model.num_layers or 0, self.split or self.pipeline * (self.virtual or 1)
        encoder = [range(number * last // count, (number + 1) * last // count) for number in range(count)]
        stages = [{"encoder": layers} for layers in encoder]
        if model.decoder_layers:
            each = model.decoder_layers // (self.pipeline - (self.split or 0))
            decoder = [range(first, first + each) for first in range(last, model.all_layers, each)]
            if self.split is None:
                return [{"encoder": encoder[0], "decoder": decoder[0]}]
            stages += [{"decoder": layers} for layers in decoder]
        return stages

    def _chunk(self, tensor: int, pipeline: int, number: int) -> dict[str, Row]:
        """{name in the file: row} of a stage's chunk, in the order of Megatron's modules; layers count from 0."""
        stage, last = number * self.pipeline + pipeline, len(self.stages) - 1
        found: dict[str, Row] = {}
        for row in self.rows:
            layer = re.match(r"(encoder|decoder)\.layers\.(\d+)\.", row.theirs)
            if layer:
                mine = self.stages[stage].get(layer[1], range(0))
                if int(layer[2]) in mine:
                    found[f"{layer[1]}.layers.{int(layer[2]) - mine.start}.{row.theirs[layer.end() :]}"] = row
            elif stage in self._places(row, last):
                found[row.theirs] = row
        if stage == last and self.pipeline > 1 and tied_output(self.weights.config.model):
            heads = {name: found.pop(name) for name in list(found) if name.startswith(OF_THE_MODEL)}
            found |= {TIED: next(row for row in self.rows if row.theirs.startswith(FIRST))} | heads
        return found

    def _places(self, row: Row, last: int) -> tuple[int, ...]:
        """The stages that hold what is in no layer: embeddings begin each stack, everything else ends one."""
        if row.theirs.startswith(FIRST):
            return (0,) if self.split is None else (0, self.split)
        return (self.split - 1,) if self.split and row.theirs.startswith("encoder.") else (last,)

    def _lazies(self, row: Row, prefix: str) -> list[Lazy]:
        return [self.weights.tensors[prefix + name] for name in row.ours]

    def _part(self, row: Row, tensor: int, prefix: str) -> Tensor:
        """One rank's part of a row's weights or moments."""
        return split_part(row.split, self._lazies(row, prefix), self.layout, tensor, padding=prefix == "model/")

    def _room(self, row: Row, tensor: int, prefix: str = "model/", dtype: torch.dtype | None = None) -> Room:
        shape = part_shape(row.split, [lazy.shape for lazy in self._lazies(row, prefix)], self.layout)
        return Room(shape, dtype or self.dtype, ((0, functools.partial(self._part, row, tensor, prefix)),))

    def _optimizer(self, chunks: Sequence[Mapping[str, Row]], tensor: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What goes under `optimizer`, and further files."""
        rows = {f"{number}:{name}": row for number, chunk in enumerate(chunks) for name, row in chunk.items()}
        masters = {name: self._room(row, tensor, dtype=torch.float32) for name, row in rows.items()}
        empty = {
            name: Lazy(shape=room.shape, dtype=room.dtype, read=lambda: torch.empty(0))
            for name, room in masters.items()
        }
        groups = order([empty])
        numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
        config, step = self.weights.config.optimizer, self._step()
        described = [
            {
                "lr": config.lr or 0.0, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_eps, "bias_correction": True,
                "weight_decay": config.weight_decay * mult, "wd_mult": mult, "lr_mult": 1.0, "step": step,
                "params": [numbers[name] for name in group],
            }
            for group in groups for mult in [1.0 if len(masters[group[0]].shape) > 1 else 0.0]
        ]  # fmt: skip
        scaler = {"grad_scaler": self._scaler()} if self.dtype == torch.float16 else {}
        if self.options.use_distributed_optimizer:
            flat = {number: {torch.float32: self._flat(chunk, tensor)} for number, chunk in enumerate(chunks)}
            return {"optimizer": {"param_groups": described}} | scaler, {"distrib_optim.pt": flat}
        moments = {
            numbers[name]: {key: self._room(row, tensor, f"optimizer/{key}/", torch.float32) for key in MOMENTS}
            for name, row in rows.items()
        }
        inner = {"state": {number: moments[number] for number in sorted(moments)}, "param_groups": described}
        if self.dtype == torch.float32:
            return inner, {}
        return {"optimizer": inner} | scaler | {
            "fp32_from_fp16_params": [[masters[name] for name in group] for group in groups]
        }, {}

    def _flat(self, chunk: Mapping[str, Row], tensor: int) -> dict[str, Room]:
        """The buffers of the distributed optimizer, padded to a multiple of the data-parallel size."""
        shapes = {name: self._room(row, tensor) for name, row in chunk.items()}
        places = buffer(
            {
                name: Lazy(shape=room.shape, dtype=room.dtype, read=lambda: torch.empty(0))
                for name, room in shapes.items()
            }
        )
        total, ranks = sum(count for _, _, count in places), self.options.data_parallel_size
        found = {}
        for theirs, prefix in {"param": "model/", **{key: f"optimizer/{key}/" for key in MOMENTS}}.items():
            pieces = tuple(
                (first, functools.partial(self._part, chunk[name], tensor, prefix)) for name, first, _ in places
            )
            found[theirs] = Room((-(-total // ranks) * ranks,), torch.float32, pieces)
        return found

    def _step(self) -> int:
        lazy = self.weights.tensors.get(f"optimizer/step/{self.rows[0].ours[0]}")
        return int(lazy.read()) if lazy else self.weights.iteration

    def _scaler(self) -> dict[str, Any]:
        state = dict(self.weights.train_state.get("loss_scale", {}))
        scale = Room((1,), torch.float32, ((0, functools.partial(torch.tensor, [state.pop("scale", 1.0)])),))
        return {"scale": scale, "growth_tracker": 0, "hysteresis_tracker": 2} | state


def _tree(rooms: Mapping[str, Room]) -> dict[str, Any]:
    """Tensors under dotted names as Megatron nests them."""
    tree: dict[str, Any] = {"language_model": {}}
    for name, room in rooms.items():
        top, _, rest = name.partition(".")
        place = tree if top in OF_THE_MODEL else tree["language_model"]
        place = place.setdefault(top, {})
        parts = rest.split(".") if top in NESTED else [rest]
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = room
    return tree
