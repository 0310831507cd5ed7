"""From the arguments that Megatron stores (an argparse.Namespace) to a RunConfig, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats.megatron.agreement import (
    HEADS_TIMES_CHANNELS,
    Disagreements,
    compare_arguments,
    missing_bias_notes,
)
from megalith.checkpoint.formats.megatron.names import FIRST_TOWERS, table_of
from megalith.checkpoint.formats.megatron.vocabulary import IF_WRONG_GIVE, true_vocab_size
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.unpickle import StandIn
from megalith.common.errors import CheckpointError, problem
from megalith.config.architectures import architecture
from megalith.config.checks.checks import violated_limit
from megalith.config.checks.model import form_problems
from megalith.config.flags.text import Words, fail, flag
from megalith.config.flags.values import convert, fields
from megalith.config.megatron.counts import vocab_size_of_rows
from megalith.config.run import RunConfig
from megalith.config.sections.data import DataConfig
from megalith.config.sections.model import GLU_ACTIVATIONS
from megalith.config.source_fields import FieldType, RunField, checked

POSITIONS = {  # numbers and names of Megatron's PositionEmbeddingType -> position_embedding_type
    1: "rope",
    2: "learned_absolute",
    3: "alibi",
    "rotary": "rope",
    "absolute": "learned_absolute",
}
RENAMED = {  # what other versions and forks call a config field
    "rotary_position_embeddings_theta": "rotary_base", "rope_theta": "rotary_base", "norm_epsilon": "layernorm_epsilon",
    "num_key_value_heads": "num_query_groups",
}  # fmt: skip
DATA_FIELDS = {
    "seq_length", "tokenizer_type", "split", "reset_position_ids", "reset_attention_mask", "eod_mask_loss",
    "vocab_extra_ids", "mask_prob", "short_seq_prob", "decoder_seq_length",
}  # fmt: skip
PRECISION_FIELDS = {
    "bf16", "fp16", "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis",
}  # fmt: skip
SECTIONS = {"model", "optimizer", "schedule", "batch"}
SPECIAL_FIELDS = {  # those with rules of their own
    "model_type",
    "num_classes",
    "vocab_size",
    "group_query_attention",
    "attention_backend",
    "optimizer",
    "num_query_groups",
}
UNSUPPORTED = {  # argument -> why a model trained with it cannot be read; for models without it see OFF_VALUES
    "num_experts": "there are no mixture-of-experts layers here",
    "multi_latent_attention": "there is no multi-latent attention here",
    "qk_l2_norm": "there is no such norm of queries and keys here",
    "rope_type": "only the standard ones of Megatron's rotary positions are read",
    "position_embedding_type": "only the standard ones of Megatron's rotary positions are read",
    "no_rope_freq": "all layers have rotary positions here, or none",
    "mrope_section": "there are no positions in several dimensions here",
    "attn_logit_softcapping": "no logits are capped here",
    "final_logit_softcapping": "no logits are capped here",
    "softmax_type": "there is only the standard softmax here",
    "attention_output_gate": "the attention's output has no gate here",
    "quick_geglu": "there is no such activation here",
    "glu_linear_offset": "there is no such activation here",
    "activation_func_clamp_value": "there is no such activation here",
}
OFF_VALUES: dict[str, tuple[Any, ...]] = {  # their values, besides None, False, 0 and [], in a model without them
    "num_experts": (1, [1]), "rope_type": ("rope",), "softmax_type": ("vanilla",),
    "position_embedding_type": (*POSITIONS, *POSITIONS.values(), "relative", "none"),
}  # fmt: skip


COUNT = FieldType(int, least=0, most=2**31)
EXTRA_ARGUMENTS: dict[str, FieldType | RunField] = {  # read, but no config fields, or with another meaning than these
    **dict.fromkeys(("tensor_model_parallel_size", "model_parallel_size", "pipeline_model_parallel_size"), COUNT),
    **dict.fromkeys(("vocab_size", "orig_vocab_size", "padded_vocab_size", "vocab_extra_ids"), COUNT),
    "num_query_groups": COUNT,
    "num_key_value_heads": COUNT,
    "rotary_seq_len_interpolation_factor": FieldType(float, least=0.0),
    "window_size": FieldType(list, item=int),
    "untie_embeddings_and_output_weights": FieldType(bool),
    "use_rope_scaling": FieldType(bool),
}
CURE = "Give the right value as a flag, or copy the file again"


def without_class(value: Any) -> Any:
    """A value of the arguments without its pickled class: a member of an enum as its name or number."""
    if isinstance(value, StandIn):
        return value.args[0] if len(value.args) == 1 else None
    return value


def check_arguments(args: Mapping[str, Any], overrides: Collection[str] = ()) -> dict[str, Any]:
    """The arguments without their pickled classes and null ones, with all that are read checked by type and range.

    overrides: the config fields that the user sets; their arguments are not checked. Raises CheckpointError with all
    that are wrong.
    """
    args = {name: without_class(value) for name, value in args.items()}
    positions = "position_embedding_type"
    if not isinstance(value := args.get(positions), (str, int, type(None))):
        if positions not in overrides:
            rule = "must be a name, or the number of one"
            raise CheckpointError(problem(f"Arguments of the file: {positions}", value, rule, CURE))
        del args[positions]
    table: dict[str, FieldType | RunField] = dict(EXTRA_ARGUMENTS)
    for name in args.keys() - EXTRA_ARGUMENTS.keys() - UNSUPPORTED.keys():
        field = fields().get(RENAMED.get(name, name))
        if field and field.section == "model" and field.kind is not str:
            table[name] = RunField(field.name)
    table = {name: kind for name, kind in table.items() if RENAMED.get(name, name) not in overrides}
    return checked(args, table, "Arguments of the file", CURE)


def to_config(
    args: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    ranks: int,
    kind: str,
    overrides: Mapping[str, Any],
    notes: list[str],
    tokenizer_size: Callable[[DataConfig], int | None] = lambda data: None,
    assumed: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The config of a model with these arguments and these tensors (those of one tensor-parallel rank of `ranks`).

    Shapes are facts; other fields come from the arguments, or without arguments are assumed, with a note. Overrides go
    before all of these. tokenizer_size, assumed: vocabulary_size and assumed of MegatronReadOptions. Raises
    CheckpointError for models that megalith does not have.
    """
    args = check_arguments(args, overrides)
    for name, reason in UNSUPPORTED.items():
        if args.get(name) and args[name] not in OFF_VALUES.get(name, ()):
            rule, cure = f"cannot be read, because {reason}", "Train without it, or convert with its own tools"
            raise CheckpointError(problem(f"--{name.replace('_', '-')}", args[name], rule, cure))
    assumptions = {
        name: value
        for name, value in (assumed or {}).items()
        if not args and value is not None and name != "vocab_size"
    }
    values = _fields_from_arguments(args, notes) | assumptions | {"model_type": kind} | architecture(kind).defaults
    gates = {name: value for name, value in overrides.items() if name in ("swiglu", "glu_activation")}
    inferred = _fields_from_shapes(tensors, ranks, values | gates)
    disagreements, positions = Disagreements(), args.get("position_embedding_type")
    compare_arguments(disagreements, inferred, args, overrides, POSITIONS.get(positions, positions))
    notes += missing_bias_notes(inferred, args, overrides)
    values |= inferred
    if values.get("sliding_window"):
        skip = args.get("window_attn_skip_freq")
        values["full_attention_layers"] = _full_attention_layers(skip, values["num_layers"])
    if not args:
        values |= _assume_fields(kind, values, assumptions, overrides, notes)
    values |= overrides
    _set_heads(values, args, tensors, ranks, overrides, disagreements)
    padded = tensors["embedding.word_embeddings.weight"].shape[0] * ranks
    if "vocab_size" not in overrides:
        disagreements.compare("padded_vocab_size", padded, args.get("padded_vocab_size"))
    disagreements.check()
    if values.get("normalization") == "LayerNorm":  # ConversionPlan adds the 1 to the weights
        values.pop("apply_layernorm_1p", None)
    size = tokenizer_size(RunConfig().replace(**values).data)
    values["vocab_size"] = true_vocab_size(args, padded, ranks, overrides, notes, size)
    values.setdefault("make_vocab_size_divisible_by", 128)
    config = RunConfig().replace(**values)
    fail((f"Arguments of the file, or flags: {each.text}" for each in form_problems(config)), CheckpointError)
    return config


def _fields_from_arguments(args: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The config fields that the arguments set."""
    values: dict[str, Any] = {}
    for name, value in args.items():
        field = fields().get(RENAMED.get(name, name))
        used = field and (field.section in SECTIONS or field.name in DATA_FIELDS or field.name in PRECISION_FIELDS)
        if not used or field is None or value is None or field.name in SPECIAL_FIELDS:
            continue
        if field.name == "position_embedding_type":
            value = POSITIONS.get(value, value)
        typed, trouble = convert(field, value, name)
        if trouble or violated_limit(field.name, typed):  # megalith's checkpoints are read back with the same limits
            notes.append(f"{name}: {value!r} has no counterpart here and was left out{IF_WRONG_GIVE}{flag(field.name)}")
        else:
            values[field.name] = typed
    if args.get("train_samples"):  # Megatron computes both; a RunConfig has only one of them
        for name in ("train_iters", "lr_decay_iters"):
            values.pop(name, None)
    if args.get("use_rope_scaling"):
        values["rope_scaling_type"] = "llama3"
    if factor := args.get("rotary_seq_len_interpolation_factor"):
        values |= {"rope_scaling_type": "linear", "rope_scaling_factor": float(factor)}
    if args.get("window_size"):
        values["sliding_window"] = int(args["window_size"][0]) + 1  # Megatron does not count the token itself
    values.setdefault("bias_gelu_fusion", False)  # in files from before it was an argument
    return values


def _full_attention_layers(skip: int | Sequence[int] | None, layers: int) -> list[int]:
    """The layers with full attention: every `skip`-th, or those where the list has a 0.

    See megatron/core/transformer/utils.py.
    """
    if (
        skip is not None
        and not isinstance(skip, int)
        and not (isinstance(skip, (list, tuple)) and all(each in (0, 1) for each in skip))
    ):
        rule = "must be a whole number, or a list with a 0 or a 1 for each layer"
        raise CheckpointError(problem("Arguments of the file: window_attn_skip_freq", skip, rule, CURE))
    pattern = skip if isinstance(skip, Sequence) else [number % skip for number in range(1, layers + 1)] if skip else []
    return [layer for layer, window in enumerate(pattern[:layers]) if not window]


def _fields_from_shapes(tensors: Mapping[str, Lazy], ranks: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that the shapes of the first stack's tensors determine, whatever the arguments say."""
    layer = {
        name.removeprefix("encoder.layers.0."): tensor
        for name, tensor in tensors.items()
        if name.startswith("encoder.layers.0.")
    }
    embeddings = tensors.get("embedding.word_embeddings.weight")
    needed = {"mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight", "self_attention.dense.weight"}
    if embeddings is None or not needed <= layer.keys():
        missing = (
            "embedding.word_embeddings.weight"
            if embeddings is None
            else "encoder.layers.0.mlp.dense_*.weight and self_attention.dense.weight"
        )
        rule, cure = f"must have {missing}, as every model of Megatron has", "Check that the checkpoint is complete"
        raise CheckpointError(problem("The model", sorted(tensors)[:3], rule, cure))
    inner, outer = layer["mlp.dense_4h_to_h.weight"].shape[1], layer["mlp.dense_h_to_4h.weight"].shape[0]
    gated = values.get("swiglu") or values.get("glu_activation") in GLU_ACTIVATIONS
    found: dict[str, Any] = {
        "hidden_size": embeddings.shape[1],
        "num_layers": 1
        + max(int(match[1]) for name in tensors if (match := re.match(r"encoder\.layers\.(\d+)\.", name))),
        "ffn_hidden_size": inner * ranks,
        "add_bias_linear": "self_attention.dense.bias" in layer,
        "add_qkv_bias": "self_attention.query_key_value.bias" in layer and "self_attention.dense.bias" not in layer,
        "embed_layernorm": "embedding.word_embeddings.norm.weight" in tensors,
        "qk_layernorm": "self_attention.q_layernorm.weight" in layer,
        "normalization": "LayerNorm" if "input_layernorm.bias" in layer else "RMSNorm",
        "attention_head_type": "multiquery" if "self_attention.query.weight" in layer else "multihead",
    }
    if architecture(values["model_type"]).decoder:
        layers = {name.split(".")[2] for name in tensors if name.startswith("decoder.layers.")}
        found["decoder_num_layers"] = len(layers)
    mappings = table_of(values["model_type"]).mappings
    if any(mapping.megatron_name == "binary_head.weight" for mapping in mappings):
        found["bert_no_binary_head"] = "binary_head.weight" not in tensors
    if any(mapping.megatron_name.startswith(FIRST_TOWERS) for mapping in mappings):  # a bi-encoder
        projection = tensors.get("projection_enc.weight")
        found["biencoder_projection_dim"] = None if projection is None else projection.shape[0]
        found["bert_no_binary_head"] = "embedding.tokentype_embeddings.weight" not in tensors
    if "classification_head.weight" in tensors:
        found["num_classes"] = tensors["classification_head.weight"].shape[0]
    if outer == 2 * inner and not gated:
        found["swiglu"] = True
    positions = tensors.get("embedding.position_embeddings.weight")
    if positions is not None:
        found |= {"max_position_embeddings": positions.shape[0], "position_embedding_type": "learned_absolute"}
    elif values.get("position_embedding_type", "learned_absolute") == "learned_absolute":
        found["position_embedding_type"] = "rope" if values.get("use_rotary_position_embeddings") else "none"
    return found


def _assume_fields(
    kind: str, values: Mapping[str, Any], assumptions: Mapping[str, Any], overrides: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The fields that are assumed for a file without arguments, beside the `assumptions` of the caller."""
    gelu = {"openai_gelu": False, "bias_gelu_fusion": False, **table_of(kind).assumed}
    assumed: dict[str, Any] = {} if values.get("swiglu") else gelu
    if values["position_embedding_type"] == "none":
        assumed["position_embedding_type"] = "rope"
    if values["hidden_size"] % 64 == 0 and values["hidden_size"] >= 512:  # the releases have heads of 64
        assumed["num_attention_heads"] = values["hidden_size"] // 64
    assumed = {"layernorm_epsilon": 1e-5, **assumed}
    assumed = {name: value for name, value in assumed.items() if name not in assumptions}
    if text := ", ".join(f"{name} {value}" for name, value in assumed.items() if name not in overrides):
        notes.append(f"the file holds no arguments; assumed: {text}. To be done: give values that differ as flags")
    return assumed


def _set_heads(
    values: dict[str, Any],
    args: Mapping[str, Any],
    tensors: Mapping[str, Lazy],
    ranks: int,
    overrides: Mapping[str, Any],
    disagreements: Disagreements,
) -> None:
    """Check the number of heads, and find the number of key/value heads from the rows of the fused weight."""
    heads = values.get("num_attention_heads")
    if not heads:
        rule = "must be given, because the file holds no arguments and shapes do not determine it"
        cure = "Give --num-attention-heads"
        raise CheckpointError(problem("The number of attention heads", Words("nothing"), rule, cure))
    channels = tensors["encoder.layers.0.self_attention.dense.weight"].shape[1] * ranks  # of all heads
    if not args and "kv_channels" not in overrides and channels != values["hidden_size"]:
        what = f"the channels of attention in the files of {ranks} tensor-parallel ranks"
        rule = f"must be as many as those of the model, {values['hidden_size']}, where no arguments say otherwise"
        cure = (
            "Copy the files of all tensor-parallel ranks; if none is missing, give "
            f"--kv-channels {max(1, channels // heads)}"
        )
        raise CheckpointError(problem(what, channels, rule, cure))
    width = values.get("kv_channels") or max(1, channels // heads)
    fused = tensors.get("encoder.layers.0.self_attention.query_key_value.weight")
    if fused is None:
        disagreements.compare(HEADS_TIMES_CHANNELS, channels, heads * width)
        values["kv_channels"] = width
        return
    rows = fused.shape[0] * ranks
    stated = overrides.get("num_query_groups") or args.get("num_key_value_heads")
    if not stated and args.get("group_query_attention") is not None:  # without it Megatron ignores num_query_groups
        stated = args.get("num_query_groups") if args["group_query_attention"] else heads
    groups = (rows // width - heads) // 2
    if rows % width or groups < 1 or heads % groups or (rows // width - heads) % 2:
        what = "encoder.layers.0.self_attention.query_key_value.weight"
        rule = f"must hold {heads} heads of {width} channels and their keys and values in {ranks} such shards"
        cure = "Give the right --num-attention-heads, --kv-channels"
        cure += f" (the arguments say {stated} groups)" if stated else ""
        raise CheckpointError(problem(what, list(fused.shape), rule, cure))
    disagreements.compare(HEADS_TIMES_CHANNELS, channels, heads * width)
    disagreements.compare("num_query_groups", groups, stated)
    if width != values["hidden_size"] // heads:
        values["kv_channels"] = width
    if groups != heads:
        values |= {"num_query_groups": groups, "group_query_attention": True}


def to_arguments(
    config: RunConfig,
    *,
    iteration: int,
    tensor: int,
    pipeline: int,
    split: int | None,
    virtual: int | None,
    data: int,
    padded: int,
) -> dict[str, Any]:
    """The arguments that Megatron's loaders compare and use, for a model in this layout."""
    model = config.model
    shared_fields = {
        name: value
        for name, value in config.flat().items()
        if fields()[name].section in SECTIONS or name in DATA_FIELDS | PRECISION_FIELDS
    }
    chunk = None if virtual is None else (model.num_layers or 0) // pipeline // virtual
    # In Megatron model_type is an enum, and num_classes belongs to vision models; here it is the rows of the head.
    del shared_fields["model_type"], shared_fields["num_classes"]
    if model.classifier_dropout is None:
        del shared_fields["classifier_dropout"]
    return shared_fields | {
        "encoder_num_layers": model.num_layers,
        "decoder_num_layers": model.decoder_layers or None,
        "pipeline_model_parallel_split_rank": split,
        "ffn_hidden_size": model.ffn_size,
        "kv_channels": model.head_dim,
        "position_embedding_type": model.positions,
        "num_query_groups": model.num_kv_heads,
        "num_key_value_heads": model.num_kv_heads,
        "group_query_attention": model.num_kv_heads not in (1, model.num_attention_heads)
        or bool(model.num_query_groups),
        "use_rotary_position_embeddings": model.positions == "rope",
        "rope_theta": model.rotary_base,
        "rotary_position_embeddings_theta": model.rotary_base,
        "normalization": {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}[model.norm],
        # Megatron refuses bias_gelu_fusion and openai_gelu together.
        "bias_gelu_fusion": model.activation == "gelu_tanh" and not model.openai_gelu,
        "bert_binary_head": not model.bert_no_binary_head,
        "vocab_size": vocab_size_of_rows(model.vocab_size or 0, config.data.tokenizer_type),
        "orig_vocab_size": model.vocab_size,
        "padded_vocab_size": padded,
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "virtual_pipeline_model_parallel_size": virtual,
        "num_layers_per_virtual_pipeline_stage": chunk,
        "data_parallel_size": data,
        "world_size": tensor * pipeline * data,
        "iteration": iteration,
        "vocab_file": config.data.vocab_file,
        "merge_file": config.data.merge_file,
    }
