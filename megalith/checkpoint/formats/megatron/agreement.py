"""Where a checkpoint says the same thing twice, both must agree: arguments and the shapes of tensors, one rank's file and another's.

What is told by a shape is a fact, so an argument that says otherwise means that tensors are missing, or that the arguments are
another model's. Neither is guessed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats.megatron.vocabulary import IF_RIGHT
from megalith.checkpoint.tensors import unpickle
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.values import fields

ARGUMENTS = {  # our field: what versions and forks call the argument
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
HEADS = "num_attention_heads x kv_channels"
FLAGS = {  # that settle what is no number of one flag
    HEADS: "--num-attention-heads N --kv-channels M", "padded_vocab_size": "--vocab-size N", "swiglu": "--swiglu, or --glu-activation NAME",
    "position_embedding_type": "--position-embedding-type TYPE",
    "bert_binary_head": "--bert-no-binary-head, or --no-bert-no-binary-head",
}  # fmt: skip
CURE = "Part of the checkpoint may be missing: copy it again. If it is whole and its arguments are wrong, flags of the model say so: "


class Told(dict[str, tuple[Any, Any]]):
    """{field: (what the tensors say, what the arguments say)} of the disagreements met so far."""

    def compare(self, field: str, tensors: Any, argument: Any) -> None:
        """Note where an argument that is there says something else."""
        if argument is not None and _word(argument) != _word(tensors):
            self[field] = (tensors, argument)

    def check(self) -> None:
        """Raise CheckpointError with all of them, both values of each."""
        if self:
            lines = [
                f"{field}: the tensors have {found}, the arguments say {said}" for field, (found, said) in self.items()
            ]
            flags = [FLAGS.get(field) or _flag(field, found) for field, (found, _) in self.items()]
            raise CheckpointError(
                "\n".join(["tensors and arguments do not describe one model:", *lines, f"{CURE}{', '.join(flags)}."])
            )


def compare(
    told: Told, facts: Mapping[str, Any], args: Mapping[str, Any], overrides: Mapping[str, Any], positions: Any
) -> None:
    """Compare what shapes tell, by our fields, with the arguments; what a flag of the user's settles is left alone.

    positions: the argument position_embedding_type in our words.
    """
    for field, names in ARGUMENTS.items():
        if field in facts and field not in overrides:
            for name in names:
                told.compare(field, facts[field], args.get(name))
    if args.get("decoder_num_layers") is None and "decoder_num_layers" in facts.keys() - overrides.keys():
        told.compare(
            "decoder_num_layers", facts["decoder_num_layers"], args.get("num_layers")
        )  # that of both stacks, once
    if "bert_no_binary_head" in facts and "bert_no_binary_head" not in overrides:
        told.compare("bert_binary_head", not facts["bert_no_binary_head"], args.get("bert_binary_head"))
    gated = args.get("swiglu") or args.get("glu_activation")
    if facts.get("swiglu") and not gated and not {"swiglu", "glu_activation"} & overrides.keys():
        told.compare("swiglu", "two halves in dense_h_to_4h", args.get("swiglu"))
    if "position_embedding_type" not in overrides and not overrides.get("use_rotary_position_embeddings"):
        without = args.get("use_rotary_position_embeddings") or args.get("add_position_embedding") is False
        if "max_position_embeddings" in facts:
            none = "none (add_position_embedding is False)" if args.get("add_position_embedding") is False else None
            told.compare("position_embedding_type", "learned_absolute", none or positions)
        elif args and positions in (None, "learned_absolute") and not without:  # the oldest versions knew no other
            told["position_embedding_type"] = ("no position_embeddings", positions or "nothing of others")


def unsaid(facts: Mapping[str, Any], args: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """A note where biases are in no tensor and no argument, nor flag, says that the model has none: they may be missing."""
    lacking = {
        "normalization": ("norm", facts["normalization"] == "RMSNorm"),
        "add_bias_linear": ("linear layer", not facts["add_bias_linear"]),
    }
    found = [
        what for name, (what, without) in lacking.items() if without and name not in args.keys() | overrides.keys()
    ]
    if not found:
        return []
    read = " and ".join({"norm": "RMSNorm", "linear layer": "linear layers without biases"}[what] for what in found)
    text = f"no {' and no '.join(found)} has a bias, and no argument says so; read as {read}"
    return [f"{text}. Had the model biases, they are missing in the file: copy it again"]


def same_iteration(folder: str, content: Mapping[str, Any]) -> list[str]:
    """A note where the number in the name of a folder is not the iteration that its files hold."""
    number, found = (
        re.fullmatch(r"(?:iter_|global_step)(\d+)", folder),
        content.get("iteration", content.get("total_iters")),
    )
    if number is None or not isinstance(found, int) or found == int(number[1]):
        return []
    return [
        f"iteration: {folder} holds files of iteration {found}, which is taken; the folder was renamed, or they are "
        f"another's{IF_RIGHT}--ckpt-step"
    ]


def same_names(parts: Sequence[Mapping[str, Any]]) -> None:
    """Raise CheckpointError where a tensor-parallel rank lacks a tensor that another has."""
    every = {name: number for number, part in reversed(list(enumerate(parts))) for name in part}
    lacking = [(number, name) for number, part in enumerate(parts) for name in every.keys() - part.keys()]
    if lacking:
        number, name = min(lacking)
        rule = f"rank {every[name]} has it, and all have parts of the same {len(every)} tensors ({len(lacking)} are missing)"
        raise CheckpointError(
            problem(f"{name} of tensor-parallel rank {number}", "nothing", rule, "Copy that rank's files again")
        )


def same_files(contents: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise CheckpointError where the files of several ranks, {name: content}, are of different steps, versions or models."""
    said: dict[str, dict[str, Any]] = {}
    for file, content in contents.items():
        args = unpickle.fields(content.get("args"))
        values = {name: value for name, value in args.items() if name == "padded_vocab_size" or _of_model(name)}
        for name, value in (values | {name: content.get(name) for name in ("iteration", "checkpoint_version")}).items():
            if isinstance(value, (int, float, str)):
                said.setdefault(name, {})[file] = value
    for name, values in said.items():
        first, *others = values
        other = next((each for each in others if values[each] != values[first]), None)
        if other is not None:
            found = f"{values[first]} in {first}, {values[other]} in {other}"
            raise CheckpointError(
                problem(
                    name, found, "the files of all ranks are of one step of one model", "Copy them again, of one step"
                )
            )


def without_gap(where: str, numbers: Iterable[int], first: int = 0) -> None:
    """Raise CheckpointError where layers are not counted from `first` (that of any number, if it is negative) without a gap."""
    found = sorted(set(numbers))
    begin = found[0] if first < 0 and found else first
    missing = sorted(set(range(begin, found[-1] + 1)) - set(found)) if found else []
    if missing:
        rule = f"they are counted without a gap, and {', '.join(map(str, missing[:8]))} {'is' if len(missing) == 1 else 'are'} missing"
        raise CheckpointError(problem(where, found, rule, "Copy the checkpoint again, whole"))


def _of_model(argument: str) -> bool:
    """Whether an argument is one of the model's form."""
    return argument in fields() and fields()[argument].section == "model"


def _flag(field: str, value: Any) -> str:
    """A field with a value as it is typed."""
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{field.replace('_', '-')}"
    return f"--{field.replace('_', '-')} {value}"


def _word(value: Any) -> Any:
    """A value as it is compared: names of norms are written in both cases."""
    return value.lower() if isinstance(value, str) else value
