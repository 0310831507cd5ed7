"""Folders of GPT-NeoX (EleutherAI): DeepSpeed's layer files with other names, arguments and biases.

global_step100/configs/*.yml                        the model, as NeoX's arguments (its neox_arguments/neox_args.py)
global_step100/mp_rank_00_model_states.pt           args: eight of them; without pipeline also the model, as
                                                    sequential.N.<parameter>
global_step100/layer_00-model_00-model_states.pt    embedding; layers from 02 on; norm.weight; final_linear.weight

With gpt_j_residual each tensor-parallel rank adds its biases of attention.dense and mlp.dense_4h_to_h before the
all-reduce (ParallelTransformerLayer.forward), so the model's bias is their sum; without it biases are added after the
all-reduce, and are copies.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import yaml

from megalith.checkpoint.formats import DeepSpeedOptions
from megalith.checkpoint.formats.megatron.names import SUM_ROW_PARALLEL_BIASES
from megalith.checkpoint.formats.megatron.vocabulary import NO_ACTION_NEEDED
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.tensors.unpickle import fields
from megalith.common.errors import CheckpointError, problem
from megalith.config.flags.text import Words

NEOX_ONLY = re.compile(r"(^|\.)norm\.(weight|bias|scale)$|(^|\.)final_linear\.|\.rotary_emb\.inv_freq$")
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.alibi_embed\.\w+$")
FREQUENCIES = "attention.rotary_emb.inv_freq"
POSITIONS = {"learned": "learned_absolute", "rotary": "rope", "alibi": "alibi", "none": "none"}
ACCEPTED: dict[str, tuple[Any, ...]] = {  # argument: values that can be read, besides None, False and 0; default first
    "norm": ("layernorm",), "pos_emb": tuple(POSITIONS), "activation": ("gelu", "relu"), "mlp_type": ("regular",),
    "gpt_j_tied": (), "use_mup": (), "opt_pos_emb_offset": (), "moe_num_experts": (1,), "sliding_window_width": (),
    "use_qk_layernorm": (), "te_layernorm_mlp": (), "model_arch": ("gpt2",), "mlp_multiple_of": (1,),
}  # fmt: skip
SAME_NAMES = (  # arguments that have the names of config fields
    "num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "make_vocab_size_divisible_by",
    "padded_vocab_size", "layernorm_epsilon", "hidden_dropout", "attention_dropout", "init_method_std", "seq_length",
    "bias_gelu_fusion", "apply_residual_connection_post_layernorm",
)  # fmt: skip
BIASES = {  # argument: a bias in a layer that exists where it is True
    "use_bias_in_attn_linear": "attention.query_key_value.bias", "use_bias_in_norms": "input_layernorm.bias",
    "use_bias_in_mlp": "mlp.dense_h_to_4h.bias",
}  # fmt: skip
REQUIRED_FIELDS = ("position_embedding_type", "rotary_percent", "parallel_attn")  # those that no tensor determines
CURE = "Train without it, or convert with GPT-NeoX's own tools"


class HasTensors(Protocol):
    """A module of the pipeline on one rank."""

    @property
    def tensors(self) -> dict[str, Lazy]:
        """Its tensors by name."""


def recognises(content: Mapping[str, Any], modules: Sequence[HasTensors]) -> bool:
    """Whether the modules are those of GPT-NeoX, which has its own names of the last norm and the output layer."""
    return any(NEOX_ONLY.search(name) for each in modules for name in each.tensors)


def without_buffers(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The tensors without the buffers that NeoX saves too."""
    return {name: tensor for name, tensor in tensors.items() if not BUFFERS.search(name)}


def megatron_arguments(
    folder: pathlib.Path,
    content: Mapping[str, Any],
    modules: Sequence[HasTensors],
    options: DeepSpeedOptions,
    notes: list[str],
) -> dict[str, Any]:
    """NeoX's arguments, translated to Megatron's.

    Raises CheckpointError for missing arguments, and for models that cannot be read.
    """
    files = sorted(
        file
        for parent in (folder, folder.parent)
        for file in (parent / "configs").glob("*")
        if file.suffix in (".yml", ".yaml", ".json")
    )
    sources: dict[str, tuple[Any, str]] = {}
    for where, values in [
        ("args of the model states", fields(content.get("args"))),
        *((str(file), _yaml(file)) for file in files),
    ]:
        for name, value in values.items():
            name = name.replace("-", "_")
            if name in sources and sources[name][0] != value:
                text = f"{sources[name][0]!r} in {sources[name][1]}, {value!r} in {where}"
                rule = "must be the same in all files"
                raise CheckpointError(
                    problem(f"{name} of GPT-NeoX", Words(text), rule, "Correct the one that is wrong")
                )
            sources.setdefault(name, (value, where))
    args = {name: value for name, (value, _) in sources.items()}
    _check_supported(args, modules)
    overrides = options.overrides
    missing = [f"--{name.replace('_', '-')}" for name in REQUIRED_FIELDS if name not in overrides]
    if not files and missing:
        rule = "must have its configs/*.yml, because no tensor determines everything that it computes"
        flags = f"{', '.join(missing)} (where NeoX had gpt-j-residual, else --no-parallel-attn)"
        cure = f"Copy configs/ along, or give {flags}"
        raise CheckpointError(problem(f"The model of GPT-NeoX in {folder}", Words("none"), rule, cure))
    positions = POSITIONS[args.get("pos_emb") or "learned"]
    parallel = overrides.get("parallel_attn", bool(args.get("gpt_j_residual")))
    found = {name: args[name] for name in SAME_NAMES if args.get(name) is not None} | {
        "tensor_model_parallel_size": args.get("model_parallel_size"),
        "position_embedding_type": positions,
        "rotary_percent": args.get("rotary_pct", 1.0),
        "rotary_base": args.get("rotary_emb_base", 10000),
        "parallel_attn": parallel,
        "parallel_layernorm": parallel,
        "relu": args.get("activation") == "relu",
        SUM_ROW_PARALLEL_BIASES: parallel,
    }
    if not files:
        text = (
            "GELU, layernorm_epsilon 1e-05 and standard attention are assumed. To be done: give values that differ as "
            "flags"
        )
        notes.append(f"GPT-NeoX without its configs/: {text} (--openai-gelu where it had bias_gelu_fusion)")
    else:
        found["untie_embeddings_and_output_weights"] = bool(args.get("no_weight_tying"))
    if args.get("tokenizer_type") == "GPT2BPETokenizer":
        found |= {name: args[name] for name in ("tokenizer_type", "vocab_file", "merge_file") if args.get(name)}
    if args.get("bias_gelu_fusion"):
        text = "GELU by its tanh approximation, as NeoX trained; its own converter writes hidden_act gelu"
        notes.append(f"bias_gelu_fusion: {text}{NO_ACTION_NEEDED}")
    if args.get("openai_gelu"):
        found |= {"openai_gelu": True, "bias_gelu_fusion": False}
        notes.append("openai_gelu: GELU by its tanh approximation" + NO_ACTION_NEEDED)
    if parallel and len(_ranks(modules)) > 1:
        text = "biases of attention.dense and mlp.dense_4h_to_h are summed over tensor-parallel ranks, as NeoX does"
        notes.append(f"gpt_j_residual: {text}{NO_ACTION_NEEDED}")
    _check_frequencies({**found, **overrides}, modules)
    return found


def _yaml(file: pathlib.Path) -> dict[str, Any]:
    try:
        return fields(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} cannot be read: {' '.join(str(error).split())}. Copy it again.") from None


def _check_supported(args: Mapping[str, Any], modules: Sequence[HasTensors]) -> None:
    """Raise CheckpointError for a model that megalith does not have, or that arguments and tensors do not agree on."""
    for name, values in ACCEPTED.items():
        if args.get(name) and args[name] not in values:
            rule = f"must be {' or '.join(map(str, values))} to be read here" if values else "cannot be read here"
            raise CheckpointError(problem(f"{name} of GPT-NeoX", args[name], rule, CURE))
    kinds = set(_strings_in(args.get("attention_config"))) - {"global", "flash"}
    for name, suffix in BIASES.items():
        has = any(each.endswith(suffix) for module in modules for each in module.tensors)
        if args.get(name) is not None and bool(args[name]) is not has:
            found = Words(f"{args[name]}, and the tensors have {'' if has else 'no '}{suffix}")
            rule, cure = "must agree with the tensors", "Correct configs/, or copy the folder again"
            raise CheckpointError(problem(f"{name} of GPT-NeoX", found, rule, cure))
    if args.get("openai_gelu") and args.get("activation") not in (None, "gelu"):
        found = Words(f"{args['activation']}, and openai_gelu is {args['openai_gelu']}")
        rule = "must agree with openai_gelu, because a model has one activation"
        raise CheckpointError(problem("Activation of GPT-NeoX", found, rule, "Correct the one that is wrong"))
    usual = {"num_kv_heads": args.get("num_attention_heads"), "num_unique_layers": args.get("num_layers")}
    others = {name: args[name] for name, value in usual.items() if args.get(name) not in (None, value)}
    others |= {"attention_config": sorted(kinds)} if kinds else {}
    others |= {"soft_prompt_tuning": True} if fields(args.get("soft_prompt_tuning")).get("enabled") else {}
    width = next(
        (t.shape[1] for each in modules for name, t in each.tensors.items() if name.endswith("word_embeddings.weight")),
        None,
    )
    head = next(
        (t.shape[1] for each in modules for name, t in each.tensors.items() if name.endswith("final_linear.weight")),
        None,
    )
    others |= {"output_layer_parallelism": "row"} if head not in (None, width) else {}
    for name, value in others.items():
        raise CheckpointError(problem(f"{name} of GPT-NeoX", value, "cannot be read here", CURE))


def _check_frequencies(args: Mapping[str, Any], modules: Sequence[HasTensors]) -> None:
    """Raise CheckpointError where the saved frequencies of the rotary positions are not those of the arguments."""
    saved = next((each.tensors[FREQUENCIES] for each in modules if FREQUENCIES in each.tensors), None)
    heads, hidden = args.get("num_attention_heads"), args.get("hidden_size")
    if saved is None or not (heads and hidden):
        return
    dims = (
        int(hidden // heads * float(args["rotary_percent"]))
        if args["position_embedding_type"] in ("rope", "rotary")
        else 0
    )
    wanted = 1.0 / float(args["rotary_base"]) ** (torch.arange(0, dims, 2) / max(dims, 1))
    found = saved.read().float()
    if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-2):
        stored = Words(f"{len(found)} frequencies down to {float(found[-1]):.3g}")
        lowest = f" down to {float(wanted[-1]):.3g}" if dims else ""
        rule = f"must be {len(wanted)} frequencies{lowest}, as pos_emb, rotary_pct and rotary_emb_base give"
        cure = "Give the right --position-embedding-type rope, --rotary-percent and --rotary-base"
        raise CheckpointError(problem(f"{FREQUENCIES} of GPT-NeoX", stored, rule, cure))


def _strings_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    for each in value if isinstance(value, (list, tuple)) else ():
        yield from _strings_in(each)


def _ranks(modules: Sequence[Any]) -> set[int]:
    return {each.rank for each in modules}
