"""From the tensors of Megatron's ranks to megalith's parameters: the step that all formats of its family share."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats import MegatronReadOptions
from megalith.checkpoint.formats.megatron.agreement import check_same_names
from megalith.checkpoint.formats.megatron.arguments import to_config, without_class
from megalith.checkpoint.formats.megatron.layout import Layout, merge_shards, shard_shape
from megalith.checkpoint.formats.megatron.names import (
    SUM_ROW_PARALLEL_BIASES,
    TIED_EMBEDDING,
    first_tower,
    infer_model_type,
    mappings_of_model,
    mappings_of_names,
)
from megalith.checkpoint.formats.megatron.replicas import Replicas, sum_of
from megalith.checkpoint.formats.megatron.vocabulary import IF_WRONG_GIVE
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.unpickle import fields
from megalith.common.errors import CheckpointError, problem
from megalith.config.architectures import architecture
from megalith.config.flags.text import Words
from megalith.config.parameters import parameter_shapes

RankTensors = Mapping[str, Lazy]  # of one tensor-parallel rank, {Megatron's name: tensor}
MAX_LINES = 20  # lines of an error
WEIGHTS_ONLY_CURE = (  # where the optimizer's state cannot be read
    "Take the weights alone: import without --with-optimizer; pretrain with --no-load-optim, or at step 0 with "
    "--finetune"
)
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"


class ConversionPlan:
    """How the tensors of a checkpoint become parameters: decided once, from arguments, names and shapes.

    Weights and moments of the optimizer are converted in the same way.
    """

    def __init__(
        self,
        args: Any,
        version: float,
        shards: Sequence[RankTensors],
        options: MegatronReadOptions,
        notes: list[str],
    ):
        """shards: the model's tensors of each tensor-parallel rank.

        Raises CheckpointError where they are not those of a known model.
        """
        arguments = {name: without_class(value) for name, value in fields(args).items()}
        tied = (arguments | dict(options.overrides)).get("untie_embeddings_and_output_weights") is False
        self.dropped = {TIED_EMBEDDING} | ({"output_layer.weight"} if tied else set())
        self.sums_biases = len(shards) > 1 and bool(arguments.get(SUM_ROW_PARALLEL_BIASES))
        first: RankTensors = {name: tensor for name, tensor in shards[0].items() if name not in self.dropped}
        kind = options.custom_model("megatron") or options.overrides.get("model_type") or infer_model_type(first)
        self.encoder_layers = count_layers(first, "encoder") if architecture(kind).decoder else 0
        first = self._renumber_decoder(first)
        given = options.overrides, notes, options.vocabulary_size, options.assumed
        tower = first_tower(first)
        self.config = to_config(fields(args), tower, len(shards), kind, *given)
        if any(name.startswith("shared_model.") for name in first):
            self.config = self.config.replace(biencoder_shared_query_context_model=True)
        if "output_layer.weight" in first:
            self.config = self.config.replace(untie_embeddings_and_output_weights=True)
        model = self.config.model
        self.layernorm_1p = bool(arguments.get("apply_layernorm_1p")) and model.norm == "layernorm"
        multiquery = model.attention_head_type == "multiquery"
        all_mappings = mappings_of_model(kind, gated=model.gated, multiquery=multiquery)
        self.mappings = mappings_of_names(all_mappings, first)
        self.layout = Layout(
            heads=model.num_attention_heads or 1,
            groups=model.num_kv_heads,
            head_dim=model.head_dim,
            vocabulary=model.vocab_size or 0,
            padded=tower[WORD_EMBEDDINGS].shape[0] * len(shards),
            ranks=len(shards),
            qkv=qkv_layout(options, version, notes),
            gate_first=gate_first(options, arguments, model.gated, notes),
        )
        self.shapes = parameter_shapes(model)
        check_same_names(shards)
        self._check_names(kind)

    def apply(self, shards: Sequence[RankTensors], prefix: str, replicas: Replicas) -> dict[str, Lazy]:
        """The parameters, named with `prefix`, from the shards of all ranks: weights, or one state of the optimizer.

        replicas: gets the copies that several ranks have of one tensor, to be compared. Raises CheckpointError with
        every shard that is missing or has another shape than the model's.
        """
        layout = dataclasses.replace(self.layout, ranks=len(shards))
        if len(shards) != self.layout.ranks and layout.qkv != "grouped":
            rule = (
                f"must be on {self.layout.ranks} ranks, because rows of query_key_value in the order {layout.qkv} can "
                "be told apart only there"
            )
            what = f"the tensor-parallel shards of {prefix.rstrip('/')}"
            raise CheckpointError(problem(what, len(shards), rule, WEIGHTS_ONLY_CURE))
        label = "" if prefix == "model/" else prefix  # before the names of tensors in messages
        shards = [
            self._merge_tied_copies(self._renumber_decoder(shard), rank, label, replicas)
            for rank, shard in enumerate(shards)
        ]
        wrong, found = list[str](), dict[str, Lazy]()
        for mapping in self.mappings:
            expected = shard_shape(mapping.split, [self.shapes[name] for name in mapping.parameters], layout)
            by_rank = [shard.get(mapping.megatron_name) for shard in shards]
            if mapping.split == "vocabulary":  # padded or not
                expected = _vocabulary_shape(by_rank, expected, layout)
            for rank, tensor in enumerate(by_rank):
                if tensor is None or tensor.shape != expected:
                    where = f"{mapping.megatron_name} of tensor-parallel rank {rank}"
                    shape = list(tensor.shape) if tensor else "nothing"
                    wrong.append(f"{where}: found {shape}, the model has {list(expected)} there")
            if not wrong:
                tensors = [tensor for tensor in by_rank if tensor is not None]
                if mapping.split == "replicated" or (mapping.split == "pair" and layout.groups == 1):
                    if self.sums_biases and prefix == "model/" and mapping.summed:
                        if len(tensors) != self.layout.ranks:
                            rule = f"must have its addends on {self.layout.ranks} tensor-parallel ranks"
                            raise CheckpointError(problem(mapping.megatron_name, len(tensors), rule, WEIGHTS_ONLY_CURE))
                        tensors = [sum_of(tensors)]
                    else:
                        copies = {f"tensor-parallel rank {rank}": tensor for rank, tensor in enumerate(tensors)}
                        tensors = [replicas.merge(f"{label}{mapping.megatron_name}", copies)]
                parameters = merge_shards(mapping.split, tensors, layout, len(mapping.parameters))
                if self.layernorm_1p and prefix == "model/" and mapping.parameters[0].endswith("norm.weight"):
                    parameters = [parameter.elementwise(lambda stored: stored + 1) for parameter in parameters]
                found |= {prefix + name: each for name, each in zip(mapping.parameters, parameters, strict=True)}
        if wrong:
            more = [f"... and {len(wrong) - MAX_LINES} more"] if len(wrong) > MAX_LINES else []
            cure = (
                "The flags of the model override what the file says: --num-attention-heads, --hidden-size, "
                "--num-query-groups, ..."
            )
            raise CheckpointError(
                "\n".join([f"{prefix.rstrip('/')} does not fit the model's shape:", *wrong[:MAX_LINES], *more, cure])
            )
        return found

    def _merge_tied_copies(self, shard: RankTensors, rank: int, prefix: str, replicas: Replicas) -> RankTensors:
        """A rank's tensors, with the word embedding merged with its copies under other names (the last stage's)."""
        copies = {name: shard[name] for name in (WORD_EMBEDDINGS, *sorted(self.dropped)) if name in shard}
        if len(copies) < 2 or WORD_EMBEDDINGS not in copies:
            return shard
        rows = self.layout.vocabulary - rank * copies[WORD_EMBEDDINGS].shape[0]  # padding may differ
        merged = replicas.merge(f"{prefix}{WORD_EMBEDDINGS} of tensor-parallel rank {rank}", copies, rows)
        return {**shard, WORD_EMBEDDINGS: merged}

    def _renumber_decoder(self, shard: RankTensors) -> RankTensors:
        """A rank's tensors, with the decoder's layers numbered after the encoder's."""
        if not self.encoder_layers:
            return shard
        shift = functools.partial(
            re.sub, r"^decoder\.layers\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) + self.encoder_layers}"
        )
        return {shift(name): tensor for name, tensor in shard.items()}

    def _check_names(self, kind: str) -> None:
        """Raise CheckpointError where the model has parameters that the file lacks, or the file has others."""
        names = {name for mapping in self.mappings for name in mapping.parameters}
        missing, spare = sorted(self.shapes.keys() - names), sorted(names - self.shapes.keys())
        if missing or spare:
            texts = [
                missing and f"some that are not in the file: {missing[:4]}",
                spare and f"some that are only in the file: {spare[:4]}",
            ]
            raise CheckpointError(
                problem(
                    f"The parameters of the {kind}",
                    Words("; ".join(filter(None, texts))),
                    "must be those that the arguments describe",
                    "A shard may be missing; or give the flags of the model that are wrong in the file "
                    "(--position-embedding-type, ...)",
                )
            )


def count_layers(names: Iterable[str], stack: str) -> int:
    """Layers of the encoder or the decoder."""
    return len({match[1] for name in names if (match := re.match(rf"{stack}\.layers\.(\d+)\.", name))})


def _vocabulary_shape(by_rank: Sequence[Lazy | None], expected: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape of a shard of the vocabulary: the stored one, if all shards together have a row for every token."""
    first = by_rank[0]
    complete = first is not None and first.shape[0] * layout.ranks >= layout.vocabulary
    return (first.shape[0], *expected[1:]) if first is not None and complete else expected


def qkv_layout(options: MegatronReadOptions, version: float, notes: list[str]) -> str:
    """The order of rows in fused weights: the requested one, or that of the version."""
    if options.qkv_layout != "auto":
        return options.qkv_layout
    known = {0.0: "thirds", 1.0: "interleaved", 2.0: "grouped", 3.0: "grouped"}
    if version not in known:
        raise CheckpointError(
            problem(
                "checkpoint_version",
                version,
                f"must be one of {', '.join(map(str, known))}",
                "Name the order of rows: --qkv-layout",
            )
        )
    notes.append(
        f"checkpoint_version {version}: rows of query_key_value are read as {known[version]}{IF_WRONG_GIVE}--qkv-layout"
    )
    return known[version]


def gate_first(options: MegatronReadOptions, args: Mapping[str, Any], gated: bool, notes: list[str]) -> bool:
    """Whether the first half of a gated MLP is the gate: it is in NVIDIA's and Microsoft's Megatron.

    In Hugging Face's fork the gate is the second half.
    """
    if options.swiglu_order != "auto":
        return options.swiglu_order == "gate-first"
    fork = bool(args.get("glu_activation"))
    if gated:
        order = "the gate second, as Hugging Face's fork has it" if fork else "the gate first"
        notes.append(f"the halves of dense_h_to_4h are read with {order}{IF_WRONG_GIVE}--swiglu-order")
    return not fork


def group_by_rank(
    tables: Iterable[tuple[int, str, RankTensors]], replicas: Replicas, prefix: str = ""
) -> list[dict[str, Lazy]]:
    """The tensors of all stages and chunks, as one table for each tensor-parallel rank.

    tables: (tensor-parallel rank, file or chunk, tensors). replicas: gets the copies that several stages have, named
    with `prefix`.
    """
    found: dict[int, dict[str, dict[str, Lazy]]] = {}
    for rank, location, tensors in tables:
        copies_by_name = found.setdefault(rank, {})
        for name, tensor in tensors.items():
            copies_by_name.setdefault(name, {})[location] = tensor
    return [
        {name: replicas.merge(f"{prefix}{name}", copies) for name, copies in found[rank].items()}
        for rank in sorted(found)
    ]
