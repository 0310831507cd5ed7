"""Why a checkpoint does not fit, as text: which parameter, both shapes, and the flag that would cure it. No torch."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.store.facts import part_of
from megalith.common.errors import ConfigError
from megalith.config.architectures import architecture
from megalith.config.flags.loading import from_yaml
from megalith.config.flags.text import flag, value_text
from megalith.config.flags.values import fields
from megalith.config.identity import change_text
from megalith.config.identity import differences as differences_of
from megalith.config.megatron.counts import NUMERIC_TOKENIZERS, embedding_rows, vocab_size_of_rows
from megalith.config.parameter_kinds import EVERY_SIZE, ParameterKind, pattern_of
from megalith.config.sections.model import ModelConfig

MODEL_FIELDS = {name: field for name, field in fields().items() if field.section == "model"}
MAX_LINES = 20  # lines of a report; a wrong model differs in every layer, and each line would say the same

SHAPE_FIELDS = (
    "model_type", "num_layers", "decoder_num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size",
    "kv_channels", "attention_head_type", "num_query_groups", "max_position_embeddings", "position_embedding_type",
    "relative_attention_num_buckets", "normalization", "swiglu", "glu_activation", "embed_layernorm", "parallel_attn",
    "parallel_layernorm", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "norm_after_residual",
    "bert_no_binary_head", "num_classes", "biencoder_projection_dim",
    "biencoder_shared_query_context_model", "untie_embeddings_and_output_weights", "vocab_size",
)  # fmt: skip


def model_section(text: str, *, vocab_size_as_flag: bool = False) -> dict[str, Any]:
    """{field: value} of the fields that decide shapes in a config's YAML text, derived sizes filled in.

    {} where the text cannot be read. vocab_size_as_flag: vocab_size is as --vocab-size means it, not the rows that a
    checkpoint has.
    """
    if not text.strip():
        return {}
    try:
        run_config = from_yaml(text)
        config, tokenizer = run_config.model, run_config.data.tokenizer_type
    except ConfigError:  # a config of another release; shapes are compared without it
        return {}
    model = {name: getattr(config, name) for name in SHAPE_FIELDS} | {"tokenizer_type": tokenizer}
    model["vocab_extra_ids"] = run_config.data.vocab_extra_ids
    if vocab_size_as_flag and config.vocab_size:
        model["vocab_size"] = embedding_rows(config.vocab_size, tokenizer)
    if config.hidden_size and config.num_attention_heads:
        model |= {
            "ffn_hidden_size": config.ffn_size,
            "kv_channels": config.head_dim,
            "num_query_groups": config.num_kv_heads,
        }
    return model | {"position_embedding_type": config.positions, "normalization": config.norm}


def differences(
    asked: Mapping[str, list[int]], found: Mapping[str, list[int]], model: Mapping[str, Any], *, strict: bool = True
) -> list[str]:
    """Lines that say why tensors `asked` for cannot be filled with those `found` in a checkpoint written by `model`.

    strict: names that only one side has are differences too, in the parts that are asked for at all.
    """
    common = [list(found[name]) for name, shape in asked.items() if name in found and list(found[name]) == list(shape)]
    if any(model.get("hidden_size") in shape for shape in common):  # hidden_size fits, so it explains no difference
        model = {**model, "hidden_size": None}
    lines = []
    for name, shape in sorted(asked.items()):
        if name in found and list(found[name]) != list(shape):
            advice = _advice(cure_of_shape(name, found[name], shape, model))
            lines.append(f"{name}: the checkpoint has {found[name]}, asked for is {shape}{advice}")
    if strict:
        asked_parts, found_parts = {part_of(name) for name in asked}, {part_of(name) for name in found}
        # No parameter is at fault where a whole part is missing, such as another optimizer's state.
        only = f"asked for, the checkpoint has no such part, only {', '.join(sorted(found_parts))}"
        lines += [f"{part}: {only}" for part in sorted(asked_parts - found_parts)]
        missing = sorted(name for name in asked.keys() - found.keys() if part_of(name) in found_parts)
        lines += [
            f"{name}: asked for, not in the checkpoint{_advice(cure_of_presence(name, found, model))}"
            for name in missing
        ]
        unused = sorted(name for name in found.keys() - asked.keys() if part_of(name) in asked_parts)
        lines += [
            f"{name}: in the checkpoint, not asked for{_advice(cure_of_presence(name, asked, model))}"
            for name in unused
        ]
    return lines


def describe_model_difference(source: object, now: ModelConfig, then: ModelConfig) -> str | None:
    """What makes a run's model another one than that of a checkpoint, as text; None where nothing does."""
    another = differences_of(now, then).incompatible
    if not another:
        return None
    changes = "; ".join(change_text(*each) for each in another)
    return (
        f"{source} holds another model: {changes}. Its weights mean nothing in "
        f"this one, even where their shapes fit. Give {', '.join(as_flag(name, old) for name, _, old in another)}, or "
        f"--use-checkpoint-args with --load, which takes the model from there, or train another model in a folder of "
        f"its own (--run-dir)."
    )


def report(path: str | pathlib.Path, lines: list[str]) -> str:
    """The message of a CheckpointError: what does not fit, line by line, the first MAX_LINES of them."""
    rest = [f"... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    return "\n".join([f"{path} does not fit:", *(f"  {line}" for line in lines[:MAX_LINES] + rest)])


def cure_of_shape(name: str, found: list[int], asked: list[int], model: Mapping[str, Any]) -> list[str]:
    """Flags with the values of the checkpoint's `model` that explain the dimensions in which two shapes differ."""
    if len(found) != len(asked):
        return []
    sizes = _sizes(model)
    changed = [size for size, other in zip(found, asked) if size != other]
    kind = kind_of(name, model)
    likely = kind.sizes if kind else EVERY_SIZE
    cures = [next((field for field in likely if size in sizes.get(field, ())), None) for size in changed]
    return list(dict.fromkeys(cure(field, model, asked) for field in cures if field))


def kind_of(name: str, model: Mapping[str, Any]) -> ParameterKind | None:
    """What a parameter of the checkpoint's `model` is; None where such a model has none of the name, or is unknown."""
    try:
        kinds = architecture(model["model_type"]).find("kinds")
    except (KeyError, ConfigError):  # a config that cannot be read; a user's own model that is not installed here
        return None
    return kinds.get(pattern_of(name.rpartition("/")[2]))


def cure(field: str, model: Mapping[str, Any], asked: Sequence[int] = ()) -> str:
    """The flag for the checkpoint's value: with NullTokenizer the embedding has a row more than --vocab-size says."""
    if field != "vocab_size":
        return as_flag(field, model[field])
    rows = model[field]
    flags = as_flag(field, vocab_size_of_rows(rows, model.get("tokenizer_type")))
    if extra := model.get("vocab_extra_ids"):  # with more of them the tokenizer needs more rows than that
        flags = f"{as_flag('vocab_extra_ids', extra)} {flags}"
    # The run gave the checkpoint's number as --vocab-size, if its tokenizer is NullTokenizer.
    unsure = rows + 1 in asked and model.get("tokenizer_type") not in NUMERIC_TOKENIZERS
    alternative = (
        f" (--vocab-size {vocab_size_of_rows(rows, 'NullTokenizer')} with NullTokenizer, which has a row more)"
    )
    return flags + alternative * unsure


def cure_of_presence(name: str, others: Iterable[str], model: Mapping[str, Any]) -> list[str]:
    """Flags with the values of the checkpoint's `model` that decide whether a parameter exists; `others` lack it."""
    layer = re.search(r"layers\.\d+\.", name)
    if layer and not any(layer[0] in other for other in others):
        deciding: tuple[str, ...] = ("num_layers", "decoder_num_layers")
    else:
        kind = kind_of(name, model)
        deciding = kind.presence if kind else ("model_type",)  # no variant of the checkpoint's model type has it
    return [cure(field, model) for field in deciding if model.get(field) is not None]


def config_differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, left, right) for the fields that decide names and shapes and differ between two model sections.

    A vocabulary that one side leaves to its tokenizer is no difference.
    """
    values = [(field, left.get(field), right.get(field)) for field in SHAPE_FIELDS]
    return [(field, a, b) for field, a, b in values if a != b and not (field == "vocab_size" and None in (a, b))]


def as_flag(field: str, value: Any) -> str:
    """A field with a value as it is typed: --num-layers 24, --swiglu, --disable-bias-linear, no --qk-layernorm."""
    if value is True:
        return flag(field)
    if value is False:
        spellings = MODEL_FIELDS[field].metadata["flags"]
        return next((name for name in spellings if name.startswith(("--disable-", "--no-"))), f"no {flag(field)}")
    return f"{flag(field)} {value_text(value)}"


def _sizes(model: Mapping[str, Any]) -> dict[str, set[int]]:
    """{field: sizes of dimensions that come from it}."""
    single = (
        "hidden_size", "vocab_size", "max_position_embeddings", "ffn_hidden_size", "relative_attention_num_buckets",
        "num_classes",
    )  # fmt: skip
    sizes = {name: {model[name]} for name in single if model.get(name)}
    heads, groups, width = (model.get(name) for name in ("num_attention_heads", "num_query_groups", "kv_channels"))
    if heads and width:
        sizes |= {"num_attention_heads": {heads * width}, "kv_channels": {width, heads * width}}
        sizes["num_query_groups"] = {(groups or heads) * width}
    return sizes


def _advice(flags: list[str]) -> str:
    return f" -> {', '.join(flags)}" if flags else ""
