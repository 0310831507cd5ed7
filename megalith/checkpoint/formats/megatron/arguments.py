"""From the arguments that Megatron stores (an argparse.Namespace) to our config, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats.megatron.agreement import HEADS, Told, compare, unsaid
from megalith.checkpoint.formats.megatron.names import table_of
from megalith.checkpoint.formats.megatron.vocabulary import IF_RIGHT, true_size
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.unpickle import Stand
from megalith.common.errors import CheckpointError, problem
from megalith.config.architectures import architecture
from megalith.config.checks.checks import limit
from megalith.config.checks.model import form_problems
from megalith.config.flags.text import fail, flag
from megalith.config.flags.values import convert, fields
from megalith.config.megatron.counts import words_asked
from megalith.config.run import RunConfig
from megalith.config.sections.data import DataConfig
from megalith.config.sections.model import GLU_ACTIVATIONS
from megalith.config.source_fields import Kind, Ours, checked

POSITIONS = {
    1: "rope",
    2: "learned_absolute",
    3: "alibi",
    "rotary": "rope",
    "absolute": "learned_absolute",
}  # of PositionEmbeddingType
RENAMED = {  # what other versions and forks call a field of ours
    "rotary_position_embeddings_theta": "rotary_base", "rope_theta": "rotary_base", "norm_epsilon": "layernorm_epsilon",
    "num_key_value_heads": "num_query_groups",
}  # fmt: skip
DATA = {"seq_length", "tokenizer_type", "split", "reset_position_ids", "reset_attention_mask", "eod_mask_loss", "vocab_extra_ids",
        "mask_prob", "short_seq_prob", "decoder_seq_length"}  # fmt: skip
PRECISION = {"bf16", "fp16", "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"}
SECTIONS = {"model", "optimizer", "schedule", "batch"}
LEFT = {
    "model_type",
    "num_classes",
    "vocab_size",
    "group_query_attention",
    "attention_backend",
    "optimizer",
    "num_query_groups",
}  # read by rules of their own
UNSUPPORTED = {  # argument -> why a model trained with it cannot be one of ours; it may be off, see OFF
    "num_experts": "there are no mixture-of-experts layers here",
    "multi_latent_attention": "there is no multi-latent attention here",
    "qk_l2_norm": "there is no such norm of queries and keys here",
    "rope_type": "of Megatron's rotary positions only plain ones are read",
    "position_embedding_type": "of Megatron's rotary positions only plain ones are read",
    "no_rope_freq": "all layers have rotary positions here, or none",
    "mrope_section": "there are no positions in several dimensions here",
    "attn_logit_softcapping": "no logits are capped here",
    "final_logit_softcapping": "no logits are capped here",
    "softmax_type": "there is only the plain softmax here",
    "attention_output_gate": "the attention's output has no gate here",
    "quick_geglu": "the activation is not built here",
    "glu_linear_offset": "the activation is not built here",
    "activation_func_clamp_value": "the activation is not built here",
}
OFF: dict[str, tuple[Any, ...]] = {  # what those read, besides None, False, 0 and [], in a model that does without
    "num_experts": (1, [1]), "rope_type": ("rope",), "softmax_type": ("vanilla",),
    "position_embedding_type": (*POSITIONS, *POSITIONS.values(), "relative", "none"),
}  # fmt: skip


COUNT = Kind(int, least=0, most=2**31)
OWN: dict[str, Kind | Ours] = {  # arguments that are read and are no field of ours, or not in the same sense
    **dict.fromkeys(("tensor_model_parallel_size", "model_parallel_size", "pipeline_model_parallel_size"), COUNT),
    **dict.fromkeys(("vocab_size", "orig_vocab_size", "padded_vocab_size", "vocab_extra_ids"), COUNT),
    "num_query_groups": COUNT, "num_key_value_heads": COUNT, "rotary_seq_len_interpolation_factor": Kind(float, least=0.0),
    "window_size": Kind(list, item=int), "untie_embeddings_and_output_weights": Kind(bool), "use_rope_scaling": Kind(bool),
}  # fmt: skip
CURE = "Give the right value as a flag, or copy the file again"


def plain(value: Any) -> Any:
    """A value of the arguments without its class: an enum's member by its name or number."""
    return (
        value.args[0]
        if isinstance(value, Stand) and len(value.args) == 1
        else None
        if isinstance(value, Stand)
        else value
    )


def known(args: Mapping[str, Any], overrides: Collection[str] = ()) -> dict[str, Any]:
    """The arguments without their classes, each that is read of its type and in its range, null ones left out.

    overrides: our fields that the user gives; what they say is not judged. Raises CheckpointError with all that are wrong.
    """
    args = {name: plain(value) for name, value in args.items()}
    positions = "position_embedding_type"
    if not isinstance(said := args.get(positions), (str, int, type(None))):
        if positions not in overrides:
            raise CheckpointError(
                problem(f"arguments of the file: {positions}", said, "it is a name, or the number of one", CURE)
            )
        del args[positions]
    table: dict[str, Kind | Ours] = dict(OWN)
    for name in args:
        field = fields().get(RENAMED.get(name, name))
        if field and field.section == "model" and field.kind is not str and name not in OWN | UNSUPPORTED.keys():
            table[name] = Ours(field.name)
    table = {name: kind for name, kind in table.items() if RENAMED.get(name, name) not in overrides}
    return checked(args, table, "arguments of the file", CURE)


def to_config(
    args: Mapping[str, Any], parts: Mapping[str, Lazy], ranks: int, kind: str, overrides: Mapping[str, Any], notes: list[str],
    words: Callable[[DataConfig], int | None] = lambda data: None, assumed: Mapping[str, Any] | None = None,
) -> RunConfig:  # fmt: skip
    """The config of a model with these arguments and these tensors (those of one tensor-parallel rank of `ranks`).

    What shapes tell is a fact; the rest is the arguments', or assumed with a note where there are none; overrides win.
    words, assumed: see Options. Raises CheckpointError for what our models cannot be.
    """
    args = known(args, overrides)
    for name, reason in UNSUPPORTED.items():
        if args.get(name) and args[name] not in OFF.get(name, ()):
            raise CheckpointError(
                problem(
                    f"--{name.replace('_', '-')}", args[name], reason, "Train without it, or convert with its own tools"
                )
            )
    given = {
        name: each for name, each in (assumed or {}).items() if not args and each is not None and name != "vocab_size"
    }
    values = _of_arguments(args, notes) | given | {"model_type": kind} | architecture(kind).defaults
    gates = {name: value for name, value in overrides.items() if name in ("swiglu", "glu_activation")}
    facts = _of_shapes(parts, ranks, values | gates)
    told, said = Told(), args.get("position_embedding_type")
    compare(told, facts, args, overrides, POSITIONS.get(said, said))
    notes += unsaid(facts, args, overrides)
    values |= facts
    if values.get("sliding_window"):
        values["full_attention_layers"] = _without_window(args.get("window_attn_skip_freq"), values["num_layers"])
    if not args:
        values |= _assumed(kind, values, given, overrides, notes)
    values |= overrides
    _heads(values, args, parts, ranks, overrides, told)
    padded = parts["embedding.word_embeddings.weight"].shape[0] * ranks
    if "vocab_size" not in overrides:
        told.compare("padded_vocab_size", padded, args.get("padded_vocab_size"))
    told.check()
    if values.get("normalization") == "LayerNorm":  # whose weights are stored as they multiply here, see Plan
        values.pop("apply_layernorm_1p", None)
    values["vocab_size"] = true_size(args, padded, ranks, overrides, notes, words(RunConfig().replace(**values).data))
    values.setdefault("make_vocab_size_divisible_by", 128)
    config = RunConfig().replace(**values)
    fail((f"arguments of the file, or flags: {each.text}" for each in form_problems(config)), CheckpointError)
    return config


def _of_arguments(args: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Our fields that the arguments set."""
    values: dict[str, Any] = {}
    for name, value in args.items():
        field = fields().get(RENAMED.get(name, name))
        taken = field and (field.section in SECTIONS or field.name in DATA or field.name in PRECISION)
        if not taken or field is None or value is None or field.name in LEFT:
            continue
        if field.name == "position_embedding_type":
            value = POSITIONS.get(value, value)
        typed, trouble = convert(field, value, name)
        if trouble or limit(field.name, typed):  # our checkpoints are read back by the same limits
            notes.append(f"{name}: {value!r} has no counterpart here and was left out{IF_RIGHT}{flag(field.name)}")
        else:
            values[field.name] = typed
    if args.get("train_samples"):  # Megatron works out both; here a run has one
        for name in ("train_iters", "lr_decay_iters"):
            values.pop(name, None)
    if args.get("use_rope_scaling"):
        values["rope_scaling_type"] = "llama3"
    if factor := args.get("rotary_seq_len_interpolation_factor"):
        values |= {"rope_scaling_type": "linear", "rope_scaling_factor": float(factor)}
    if args.get("window_size"):
        values["sliding_window"] = int(args["window_size"][0]) + 1  # there: tokens before the own one
    values.setdefault("bias_gelu_fusion", False)  # files from before it was an argument
    return values


def _without_window(skip: int | Sequence[int] | None, layers: int) -> list[int]:
    """The layers that see everything: every `skip`-th, or those where the list has a 0 (megatron/core/transformer/utils.py)."""
    if (
        skip is not None
        and not isinstance(skip, int)
        and not (isinstance(skip, (list, tuple)) and all(each in (0, 1) for each in skip))
    ):
        rule = "it is a whole number, or a 0 or a 1 for each layer"
        raise CheckpointError(problem("arguments of the file: window_attn_skip_freq", skip, rule, CURE))
    pattern = skip if isinstance(skip, Sequence) else [number % skip for number in range(1, layers + 1)] if skip else []
    return [layer for layer, window in enumerate(pattern[:layers]) if not window]


def _of_shapes(parts: Mapping[str, Lazy], ranks: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes of the first stack's tensors say, whatever the arguments say."""
    layer = {
        name.removeprefix("encoder.layers.0."): part
        for name, part in parts.items()
        if name.startswith("encoder.layers.0.")
    }
    words = parts.get("embedding.word_embeddings.weight")
    if (
        words is None
        or not {"mlp.dense_h_to_4h.weight", "mlp.dense_4h_to_h.weight", "self_attention.dense.weight"} <= layer.keys()
    ):
        lacking = (
            "embedding.word_embeddings.weight"
            if words is None
            else "encoder.layers.0.mlp.dense_*.weight and self_attention.dense.weight"
        )
        raise CheckpointError(
            problem(
                "model",
                sorted(parts)[:3],
                f"every model of Megatron has {lacking}",
                "Check that the path is of a whole checkpoint",
            )
        )
    inner, outer = layer["mlp.dense_4h_to_h.weight"].shape[1], layer["mlp.dense_h_to_4h.weight"].shape[0]
    gated = values.get("swiglu") or values.get("glu_activation") in GLU_ACTIVATIONS
    found: dict[str, Any] = {
        "hidden_size": words.shape[1],
        "num_layers": 1
        + max(int(match[1]) for name in parts if (match := re.match(r"encoder\.layers\.(\d+)\.", name))),
        "ffn_hidden_size": inner * ranks,
        "add_bias_linear": "self_attention.dense.bias" in layer,
        "add_qkv_bias": "self_attention.query_key_value.bias" in layer and "self_attention.dense.bias" not in layer,
        "embed_layernorm": "embedding.word_embeddings.norm.weight" in parts,
        "qk_layernorm": "self_attention.q_layernorm.weight" in layer,
        "normalization": "LayerNorm" if "input_layernorm.bias" in layer else "RMSNorm",
        "attention_head_type": "multiquery" if "self_attention.query.weight" in layer else "multihead",
    }
    if architecture(values["model_type"]).decoder:
        found["decoder_num_layers"] = len({name.split(".")[2] for name in parts if name.startswith("decoder.layers.")})
    if any(row.theirs == "binary_head.weight" for row in table_of(values["model_type"]).rows):
        found["bert_no_binary_head"] = "binary_head.weight" not in parts
    if "classification_head.weight" in parts:
        found["num_classes"] = parts["classification_head.weight"].shape[0]
    if outer == 2 * inner and not gated:
        found["swiglu"] = True
    positions = parts.get("embedding.position_embeddings.weight")
    if positions is not None:
        found |= {"max_position_embeddings": positions.shape[0], "position_embedding_type": "learned_absolute"}
    elif values.get("position_embedding_type", "learned_absolute") == "learned_absolute":
        found["position_embedding_type"] = "rope" if values.get("use_rotary_position_embeddings") else "none"
    return found


def _assumed(
    kind: str, values: Mapping[str, Any], given: Mapping[str, Any], overrides: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """What is assumed of a file without arguments, beside what is given."""
    gelu = {"openai_gelu": False, "bias_gelu_fusion": False, **table_of(kind).assumed}
    assumed: dict[str, Any] = {} if values.get("swiglu") else gelu
    if values["position_embedding_type"] == "none":
        assumed["position_embedding_type"] = "rope"
    if values["hidden_size"] % 64 == 0 and values["hidden_size"] >= 512:  # the releases have heads of 64
        assumed["num_attention_heads"] = values["hidden_size"] // 64
    assumed = {"layernorm_epsilon": 1e-5, **assumed}
    assumed = {name: value for name, value in assumed.items() if name not in given}
    if said := ", ".join(f"{name} {value}" for name, value in assumed.items() if name not in overrides):
        notes.append(f"the file holds no arguments; assumed: {said}. To be done: give what is otherwise as flags")
    return assumed


def _heads(
    values: dict[str, Any],
    args: Mapping[str, Any],
    parts: Mapping[str, Lazy],
    ranks: int,
    overrides: Mapping[str, Any],
    told: Told,
) -> None:
    """Check the number of heads, and find the number of key/value heads from the rows of the fused weight."""
    heads = values.get("num_attention_heads")
    if not heads:
        raise CheckpointError(
            problem(
                "number of attention heads",
                None,
                "the file holds no arguments, and shapes do not tell it",
                "Give --num-attention-heads",
            )
        )
    channels = parts["encoder.layers.0.self_attention.dense.weight"].shape[1] * ranks  # those of all heads
    if not args and "kv_channels" not in overrides and channels != values["hidden_size"]:
        rule = f"without arguments they are as many as those of the model, {values['hidden_size']}"
        cure = f"Copy the files of all tensor-parallel ranks; if none is missing, give --kv-channels {max(1, channels // heads)}"
        raise CheckpointError(
            problem(f"channels of attention in the files of {ranks} tensor-parallel ranks", channels, rule, cure)
        )
    width = values.get("kv_channels") or max(1, channels // heads)
    fused = parts.get("encoder.layers.0.self_attention.query_key_value.weight")
    if fused is None:
        told.compare(HEADS, channels, heads * width)
        values["kv_channels"] = width
        return
    rows = fused.shape[0] * ranks
    asked = overrides.get("num_query_groups") or args.get("num_key_value_heads")
    if not asked and args.get("group_query_attention") is not None:  # without it num_query_groups means nothing there
        asked = args.get("num_query_groups") if args["group_query_attention"] else heads
    groups = (rows // width - heads) // 2
    if rows % width or groups < 1 or heads % groups or (rows // width - heads) % 2:
        raise CheckpointError(
            problem(
                "encoder.layers.0.self_attention.query_key_value.weight", list(fused.shape),
                f"{ranks} such parts hold {heads} heads of {width} channels and their keys and values",
                f"Give the right --num-attention-heads, --kv-channels{f' (the arguments say {asked} groups)' if asked else ''}",
            )
        )  # fmt: skip
    told.compare(HEADS, channels, heads * width)
    told.compare("num_query_groups", groups, asked)
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
    kept = {
        name: value
        for name, value in config.flat().items()
        if fields()[name].section in SECTIONS or name in DATA | PRECISION
    }
    chunk = None if virtual is None else (model.num_layers or 0) // pipeline // virtual
    del (
        kept["model_type"],
        kept["num_classes"],
    )  # an enum there, and the classes of its vision models: ours are the head's rows
    if model.classifier_dropout is None:
        del kept["classifier_dropout"]
    return kept | {
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
        "bias_gelu_fusion": model.activation == "gelu_tanh"
        and not model.openai_gelu,  # Megatron refuses the two together
        "bert_binary_head": not model.bert_no_binary_head,
        "vocab_size": words_asked(model.vocab_size or 0, config.data.tokenizer_type),
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
