"""From what the ranks of Megatron hold to our parameters: the step that all formats of its family share."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats import Options
from megalith.checkpoint.formats.megatron.agreement import same_names
from megalith.checkpoint.formats.megatron.arguments import plain, to_config
from megalith.checkpoint.formats.megatron.layout import Layout, merge, part_shape
from megalith.checkpoint.formats.megatron.names import SUMMED, TIED, model_type, rows_of, rows_of_theirs
from megalith.checkpoint.formats.megatron.replicas import Replicas, total
from megalith.checkpoint.formats.megatron.vocabulary import IF_RIGHT
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.unpickle import fields
from megalith.common.errors import CheckpointError, problem
from megalith.config.architectures import architecture
from megalith.config.parameters import parameter_shapes

Parts = Mapping[str, Lazy]  # of one tensor-parallel rank, {Megatron's name: tensor}
SPARE = 20  # lines of an error
# The cure where the optimizer's state cannot be read.
WEIGHTS_ALONE = "Take the weights alone: import without --with-optimizer; pretrain with --no-load-optim, or at step 0 with --finetune"
WORDS = "embedding.word_embeddings.weight"


class Plan:
    """How the tensors of a checkpoint become ours: decided once, from arguments, names and shapes, for weights and moments alike."""

    def __init__(self, args: Any, version: float, parts: Sequence[Parts], options: Options, notes: list[str]):
        """parts: the model's tensors of each tensor-parallel rank. Raises CheckpointError where they make no model that is known."""
        said = {name: plain(value) for name, value in fields(args).items()}
        tied = (said | dict(options.overrides)).get("untie_embeddings_and_output_weights") is False
        self.left = {TIED} | ({"output_layer.weight"} if tied else set())
        self.summed = len(parts) > 1 and bool(said.get(SUMMED))
        first: Parts = {name: tensor for name, tensor in parts[0].items() if name not in self.left}
        kind = options.own_model("megatron") or options.overrides.get("model_type") or model_type(first)
        self.encoder_layers = count_layers(first, "encoder") if architecture(kind).decoder else 0
        first = self._number(first)
        given = options.overrides, notes, options.words, options.assumed
        self.config = to_config(fields(args), first, len(parts), kind, *given)
        if "output_layer.weight" in first:
            self.config = self.config.replace(untie_embeddings_and_output_weights=True)
        model = self.config.model
        self.minus_one = bool(said.get("apply_layernorm_1p")) and model.norm == "layernorm"
        multiquery = model.attention_head_type == "multiquery"
        rows = rows_of(kind, gated=model.gated, multiquery=multiquery)
        self.rows = rows_of_theirs(rows, first)
        self.layout = Layout(
            heads=model.num_attention_heads or 1, groups=model.num_kv_heads, head_dim=model.head_dim, vocabulary=model.vocab_size or 0,
            padded=first[WORDS].shape[0] * len(parts), ranks=len(parts),
            qkv=qkv_layout(options, version, notes), gate_first=gate_first(options, said, model.gated, notes),
        )  # fmt: skip
        self.shapes = parameter_shapes(model)
        same_names(parts)
        self._check_names(kind)

    def apply(self, parts: Sequence[Parts], prefix: str, replicas: Replicas) -> dict[str, Lazy]:
        """Our tensors under `prefix` of these parts, which may be the weights or one of the optimizer's states of them.

        replicas: gets the copies that several ranks have of one tensor, to be compared.

        Raises CheckpointError with every part that is missing or has another shape than the model gives it.
        """
        layout = dataclasses.replace(self.layout, ranks=len(parts))
        if len(parts) != self.layout.ranks and layout.qkv != "grouped":
            rule = f"rows of query_key_value in the order {layout.qkv} can only be told apart on each of {self.layout.ranks} ranks"
            raise CheckpointError(
                problem(f"{prefix.rstrip('/')}, tensor-parallel parts", len(parts), rule, WEIGHTS_ALONE)
            )
        theirs = "" if prefix == "model/" else prefix  # whose copies they are, in what is said of them
        parts = [self._tied(self._number(rank), number, theirs, replicas) for number, rank in enumerate(parts)]
        wrong, found = list[str](), dict[str, Lazy]()
        for row in self.rows:
            expected = part_shape(row.split, [self.shapes[name] for name in row.ours], layout)
            there = [rank.get(row.theirs) for rank in parts]
            if row.split == "vocabulary":  # padded or not
                expected = _enough(there, expected, layout)
            for number, part in enumerate(there):
                if part is None or part.shape != expected:
                    where = f"{row.theirs} of tensor-parallel rank {number}"
                    wrong.append(
                        f"{where}: found {list(part.shape) if part else 'nothing'}, the model has {list(expected)} there"
                    )
            if not wrong:
                whole = [part for part in there if part is not None]
                if row.split == "whole" or (row.split == "pair" and layout.groups == 1):
                    if self.summed and prefix == "model/" and row.summed:
                        if len(whole) != self.layout.ranks:
                            rule = f"its addends lie on {self.layout.ranks} tensor-parallel ranks"
                            raise CheckpointError(problem(row.theirs, len(whole), rule, WEIGHTS_ALONE))
                        whole = [total(whole)]
                    else:
                        copies = {f"tensor-parallel rank {number}": part for number, part in enumerate(whole)}
                        whole = [replicas.one(f"{theirs}{row.theirs}", copies)]
                pieces = merge(row.split, whole, layout, len(row.ours))
                if self.minus_one and prefix == "model/" and row.ours[0].endswith("norm.weight"):
                    pieces = [piece.elementwise(lambda stored: stored + 1) for piece in pieces]
                found |= {prefix + name: piece for name, piece in zip(row.ours, pieces, strict=True)}
        if wrong:
            more = [f"... and {len(wrong) - SPARE} more"] if len(wrong) > SPARE else []
            cure = "The flags of the model override what the file says: --num-attention-heads, --hidden-size, --num-query-groups, ..."
            raise CheckpointError(
                "\n".join([f"{prefix.rstrip('/')} does not fit the model's shape:", *wrong[:SPARE], *more, cure])
            )
        return found

    def _tied(self, parts: Parts, number: int, prefix: str, replicas: Replicas) -> Parts:
        """With the word embedding in the place of its copies under other names, such as that of the last stage."""
        copies = {name: parts[name] for name in (WORDS, *sorted(self.left)) if name in parts}
        if len(copies) < 2 or WORDS not in copies:
            return parts
        rows = self.layout.vocabulary - number * copies[WORDS].shape[0]  # padding may differ
        return {**parts, WORDS: replicas.one(f"{prefix}{WORDS} of tensor-parallel rank {number}", copies, rows)}

    def _number(self, parts: Parts) -> Parts:
        """The decoder's layers numbered after the encoder's."""
        if not self.encoder_layers:
            return parts
        shift = functools.partial(
            re.sub, r"^decoder\.layers\.(\d+)", lambda found: f"decoder.layers.{int(found[1]) + self.encoder_layers}"
        )
        return {shift(name): tensor for name, tensor in parts.items()}

    def _check_names(self, kind: str) -> None:
        """Raise CheckpointError where the model has parameters that the file has not, or the other way round."""
        ours = {name for row in self.rows for name in row.ours}
        lacking, spare = sorted(self.shapes.keys() - ours), sorted(ours - self.shapes.keys())
        if lacking or spare:
            text = "; ".join(
                filter(
                    None, [lacking and f"not in the file: {lacking[:4]}", spare and f"only in the file: {spare[:4]}"]
                )
            )
            raise CheckpointError(
                problem(
                    f"parameters of the {kind}", text, "names and arguments of a checkpoint describe one model",
                    "A shard may be missing; or give the flags of the model that are wrong in the file (--position-embedding-type, ...)",
                )
            )  # fmt: skip


def count_layers(names: Iterable[str], stack: str) -> int:
    """Layers of the encoder or the decoder."""
    return len({match[1] for name in names if (match := re.match(rf"{stack}\.layers\.(\d+)\.", name))})


def _enough(parts: Sequence[Lazy | None], expected: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape of a part of the vocabulary: as it is, if all parts together have every word."""
    first = parts[0]
    whole = first is not None and first.shape[0] * layout.ranks >= layout.vocabulary
    return (first.shape[0], *expected[1:]) if first is not None and whole else expected


def qkv_layout(options: Options, version: float, notes: list[str]) -> str:
    """The order of rows in fused weights: what is asked for, or what the version means."""
    if options.qkv_layout != "auto":
        return options.qkv_layout
    known = {0.0: "thirds", 1.0: "interleaved", 2.0: "grouped", 3.0: "grouped"}
    if version not in known:
        raise CheckpointError(
            problem(
                "checkpoint_version",
                version,
                f"those known are {', '.join(map(str, known))}",
                "Name the order of rows: --qkv-layout",
            )
        )
    notes.append(
        f"checkpoint_version {version}: rows of query_key_value are read as {known[version]}{IF_RIGHT}--qkv-layout"
    )
    return known[version]


def gate_first(options: Options, args: Mapping[str, Any], gated: bool, notes: list[str]) -> bool:
    """Whether the first half of a gated MLP is the gate: it is for NVIDIA and Microsoft, in Hugging Face's fork it is the second."""
    if options.swiglu_order != "auto":
        return options.swiglu_order == "gate-first"
    fork = bool(args.get("glu_activation"))
    if gated:
        order = "the gate second, as Hugging Face's fork has it" if fork else "the gate first"
        notes.append(f"the halves of dense_h_to_4h are read with {order}{IF_RIGHT}--swiglu-order")
    return not fork


def by_rank(tables: Iterable[tuple[int, str, Parts]], replicas: Replicas, prefix: str = "") -> list[dict[str, Lazy]]:
    """(tensor-parallel rank, where, tensors) of all stages and chunks, as one table for each tensor-parallel rank.

    replicas: gets the copies of what several stages have. prefix: of their names there.
    """
    found: dict[int, dict[str, dict[str, Lazy]]] = {}
    for rank, where, tensors in tables:
        mine = found.setdefault(rank, {})
        for name, tensor in tensors.items():
            mine.setdefault(name, {})[where] = tensor
    return [
        {name: replicas.one(f"{prefix}{name}", copies) for name, copies in found[rank].items()}
        for rank in sorted(found)
    ]
