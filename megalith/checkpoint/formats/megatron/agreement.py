"""Consistency checks: arguments must agree with the shapes of tensors, and the files of all ranks with each other.

A shape is a fact, so an argument that contradicts one means that tensors are missing, or that the arguments are those
of another model. Which of the two is not guessed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats.megatron.vocabulary import IF_WRONG_GIVE
from megalith.checkpoint.tensors import unpickle
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words
from megalith.config.flags.values import fields

ARGUMENT_NAMES = {  # config field: what versions and forks of Megatron call the argument
    "num_layers": ("num_layers", "encoder_num_layers"),
    "decoder_num_layers": ("decoder_num_layers",),
    "hidden_size": ("hidden_size",),
    "ffn_hidden_size": ("ffn_hidden_size", "intermediate_size"),
    "kv_channels": ("kv_channels",),
    "max_position_embeddings": ("max_position_embeddings",),
    "normalization": ("normalization",),
    "add_bias_linear": ("add_bias_linear",),
    "qk_layernorm": ("qk_layernorm",),
    "embed_layernorm": ("embed_layernorm",),
    "attention_head_type": ("attention_head_type",),
}
HEADS_TIMES_CHANNELS = "num_attention_heads x kv_channels"
FLAGS = {  # the flags for a field, where they are not the field's own with a value
    HEADS_TIMES_CHANNELS: "--num-attention-heads N --kv-channels M",
    "padded_vocab_size": "--vocab-size N",
    "swiglu": "--swiglu, or --glu-activation NAME",
    "position_embedding_type": "--position-embedding-type TYPE",
    "bert_binary_head": "--bert-no-binary-head, or --no-bert-no-binary-head",
}
CURE = (
    "Part of the checkpoint may be missing: copy it again. If it is complete and its arguments are wrong, give the "
    "right values as flags: "
)


class Disagreements(dict[str, tuple[Any, Any]]):
    """{field: (what the tensors say, what the arguments say)} of the disagreements found so far."""

    def compare(self, field: str, tensors: Any, argument: Any) -> None:
        """Record a disagreement where the argument exists and differs."""
        if argument is not None and _comparable(argument) != _comparable(tensors):
            self[field] = (tensors, argument)

    def check(self) -> None:
        """Raise CheckpointError with all of them, both values of each."""
        if self:
            lines = [
                f"{field}: the tensors have {found}, the arguments say {argument}"
                for field, (found, argument) in self.items()
            ]
            flags = [FLAGS.get(field) or _flag_text(field, found) for field, (found, _) in self.items()]
            raise CheckpointError(
                "\n".join(["tensors and arguments do not describe one model:", *lines, f"{CURE}{', '.join(flags)}."])
            )


def compare_arguments(
    disagreements: Disagreements,
    inferred: Mapping[str, Any],
    args: Mapping[str, Any],
    overrides: Mapping[str, Any],
    positions: Any,
) -> None:
    """Compare the config fields inferred from shapes with the arguments, except those that the user's flags override.

    positions: the argument position_embedding_type, as a value of the config field.
    """
    for field, names in ARGUMENT_NAMES.items():
        if field in inferred and field not in overrides:
            for name in names:
                disagreements.compare(field, inferred[field], args.get(name))
    if args.get("decoder_num_layers") is None and "decoder_num_layers" in inferred.keys() - overrides.keys():
        # Old versions had one num_layers for both stacks.
        disagreements.compare("decoder_num_layers", inferred["decoder_num_layers"], args.get("num_layers"))
    if "bert_no_binary_head" in inferred and "bert_no_binary_head" not in overrides:
        disagreements.compare("bert_binary_head", not inferred["bert_no_binary_head"], args.get("bert_binary_head"))
    gated = args.get("swiglu") or args.get("glu_activation")
    if inferred.get("swiglu") and not gated and not {"swiglu", "glu_activation"} & overrides.keys():
        disagreements.compare("swiglu", "two halves in dense_h_to_4h", args.get("swiglu"))
    if "position_embedding_type" not in overrides and not overrides.get("use_rotary_position_embeddings"):
        without = args.get("use_rotary_position_embeddings") or args.get("add_position_embedding") is False
        if "max_position_embeddings" in inferred:
            none = "none (add_position_embedding is False)" if args.get("add_position_embedding") is False else None
            disagreements.compare("position_embedding_type", "learned_absolute", none or positions)
        elif args and positions in (None, "learned_absolute") and not without:  # the oldest versions had no other
            disagreements["position_embedding_type"] = ("no position_embeddings", positions or "nothing about others")


def missing_bias_notes(inferred: Mapping[str, Any], args: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """A note where no tensor is a bias and no argument or flag says that the model has none: they may be missing."""
    without_biases = {
        "normalization": ("norm", inferred["normalization"] == "RMSNorm"),
        "add_bias_linear": ("linear layer", not inferred["add_bias_linear"]),
    }
    found = [
        what
        for name, (what, without) in without_biases.items()
        if without and name not in args.keys() | overrides.keys()
    ]
    if not found:
        return []
    read = " and ".join({"norm": "RMSNorm", "linear layer": "linear layers without biases"}[what] for what in found)
    text = f"no {' and no '.join(found)} has a bias, and no argument says so; read as {read}"
    return [f"{text}. If the model had biases, the file lacks them: copy it again"]


def iteration_notes(folder: str, content: Mapping[str, Any]) -> list[str]:
    """A note where the number in the name of a folder is not the iteration that its files hold."""
    number = re.fullmatch(r"(?:iter_|global_step)(\d+)", folder)
    found = content.get("iteration", content.get("total_iters"))
    if number is None or not isinstance(found, int) or found == int(number[1]):
        return []
    return [
        f"iteration: {folder} holds files of iteration {found}, which is used; the folder was renamed, or the files "
        f"are those of another folder{IF_WRONG_GIVE}--ckpt-step"
    ]


def check_same_names(shards: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError where a tensor-parallel rank lacks a tensor that another rank has."""
    first_rank = {name: rank for rank, shard in reversed(list(enumerate(shards))) for name in shard}
    missing = [(rank, name) for rank, shard in enumerate(shards) for name in first_rank.keys() - shard.keys()]
    if missing:
        rank, name = min(missing)
        rule = (
            f"must exist, because rank {first_rank[name]} has it and all ranks have shards of the same "
            f"{len(first_rank)} tensors ({len(missing)} are missing)"
        )
        what = f"{name} of tensor-parallel rank {rank}"
        raise CheckpointError(problem(what, Words("nothing"), rule, "Copy that rank's files again"))


def check_same_files(contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError where the files of the ranks, {name: content}, differ in step, version or model."""
    values_by_name: dict[str, dict[str, Any]] = {}
    for file, content in contents.items():
        args = unpickle.fields(content.get("args"))
        values = {name: value for name, value in args.items() if name == "padded_vocab_size" or _is_model_field(name)}
        values |= {name: content.get(name) for name in ("iteration", "checkpoint_version")}
        for name, value in values.items():
            if isinstance(value, (int, float, str)):
                values_by_name.setdefault(name, {})[file] = value
    for name, values in values_by_name.items():
        first, *others = values
        other = next((file for file in others if values[file] != values[first]), None)
        if other is not None:
            found = Words(f"{values[first]} in {first}, {values[other]} in {other}")
            rule = "must be the same in the files of all ranks, which are of one step of one model"
            raise CheckpointError(problem(name, found, rule, "Copy them again, of one step"))


def check_consecutive(what: str, numbers: Iterable[int], first: int = 0) -> None:
    """Raise CheckpointError where numbers are not counted without a gap from `first`, or if it is negative from any."""
    found = sorted(set(numbers))
    begin = found[0] if first < 0 and found else first
    missing = sorted(set(range(begin, found[-1] + 1)) - set(found)) if found else []
    if missing:
        names = f"{', '.join(map(str, missing[:8]))} {'is' if len(missing) == 1 else 'are'} missing"
        rule = f"must be numbered without a gap, but {names}"
        raise CheckpointError(problem(what, found, rule, "Copy the complete checkpoint again"))


def _is_model_field(argument: str) -> bool:
    """Whether an argument is a field of the model's config."""
    return argument in fields() and fields()[argument].section == "model"


def _flag_text(field: str, value: Any) -> str:
    """The flag that sets a field to a value."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{field.replace('_', '-')}"
    return f"--{field.replace('_', '-')} {value}"


def _comparable(value: Any) -> Any:
    """A value for comparison: versions differ in the case of norms' names."""
    return value.lower() if isinstance(value, str) else value
