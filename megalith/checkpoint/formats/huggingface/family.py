"""What a family's table says (families/*.py): how config.json and names of weights become ours, and ours theirs.

llama = FAMILIES.find("llama")
values = llama.to_ours(config_json)            # {flat field: value}
config_json = llama.to_theirs(config)
llama.names, see Rule
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from megalith.checkpoint.patterns import numbers
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.common.errors import CheckpointError, problem
from megalith.common.registry import Registry
from megalith.config.identity import sized_by
from megalith.config.parameters import Shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.source_fields import Kind, Ours, checked

FAMILIES = Registry(  # config.json's model_type -> table; in the order in which an export looks for one that fits
    "Hugging Face family",
    {
        "bert": "megalith.checkpoint.formats.huggingface.families.bert:BERT",
        "megatron-bert": "megalith.checkpoint.formats.huggingface.families.bert:MEGATRON_BERT",
        "gpt2": "megalith.checkpoint.formats.huggingface.families.gpt2:GPT2",
        "llama": "megalith.checkpoint.formats.huggingface.families.llama:LLAMA",
        "mistral": "megalith.checkpoint.formats.huggingface.families.llama:MISTRAL",
        "qwen2": "megalith.checkpoint.formats.huggingface.families.llama:QWEN2",
        "qwen3": "megalith.checkpoint.formats.huggingface.families.llama:QWEN3",
        "gemma": "megalith.checkpoint.formats.huggingface.families.llama:GEMMA",
        "bloom": "megalith.checkpoint.formats.huggingface.families.bloom:BLOOM",
        "falcon": "megalith.checkpoint.formats.huggingface.families.falcon:FALCON",
        "gpt_neox": "megalith.checkpoint.formats.huggingface.families.neox:NEOX",
        "t5": "megalith.checkpoint.formats.huggingface.families.t5:T5",
        "mt5": "megalith.checkpoint.formats.huggingface.families.t5:MT5",
    },
)
NULLS = (
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "n_inner",
    "ffn_hidden_size",
    "num_decoder_layers",
)  # null has a meaning
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation", "activation_function", "feed_forward_proj")
FLAG, WORD, SIZE = Kind(bool), Kind(str), Kind(int, least=1, most=2**31)
KINDS: dict[str, Kind | Ours] = {  # fields of any family's config.json that are read, beside those that are a field of ours (settings)
    "model_type": WORD, "architectures": Kind(list, item=str), "transformers_weights": WORD, "quantization_config": Kind(dict),
    "bos_token_id": Kind(int, least=0), "pad_token_id": Kind(int),
    **dict.fromkeys(ACTIVATIONS, WORD),
    "tie_word_embeddings": FLAG, "scale_decoder_outputs": FLAG, "use_parallel_residual": FLAG, "new_decoder_architecture": FLAG,
    "multi_query": FLAG, "parallel_attn": FLAG, "alibi": FLAG, "use_sliding_window": FLAG, "attention_bias": FLAG, "mlp_bias": FLAG,
    "use_bidirectional_attention": FLAG, "scale_attn_weights": FLAG, "scale_attn_by_inverse_layer_idx": FLAG,
    "add_cross_attention": FLAG, "is_decoder": FLAG, "position_embedding_type": WORD, "type_vocab_size": SIZE,
    "num_kv_heads": SIZE, "num_ln_in_parallel_attn": Kind(int, choices=(1, 2)), "n_positions": SIZE,
    "max_window_layers": Kind(int, least=0),
    "id2label": Kind(dict), "classifier_dropout": Ours("classifier_dropout", null=True),
    "sliding_window": Ours("sliding_window", null=True),
    "layer_types": Kind(list, item=str), "rope_theta": Ours("rotary_base"), "rotary_emb_base": Ours("rotary_base"),
    "rotary_pct": Ours("rotary_percent"), "dropout_rate": Ours("hidden_dropout"), "rope_scaling": Kind(dict), "rope_parameters": Kind(dict),
}  # fmt: skip
REQUIRED = object()  # a field of config.json without a default


class Form(NamedTuple):
    """A reversible change between one tensor of theirs and one or several of ours. It takes weights and biases alike.

    apart(theirs, model) -> ours; together(ours, model) -> theirs. Both are made of what lazy.py has, so that a box of
    the result is read from a box of the source.
    """

    apart: Callable[[Lazy, ModelConfig], Sequence[Lazy]]
    together: Callable[[Sequence[Lazy], ModelConfig], Lazy]


SAME = Form(lambda theirs, model: [theirs], lambda ours, model: ours[0])
TRANSPOSED = Form(lambda theirs, model: [theirs.t()], lambda ours, model: ours[0].t())  # GPT-2's Conv1D keeps [in, out]
THIRDS_TRANSPOSED = Form(lambda theirs, model: theirs.t().chunk(3), lambda ours, model: cat(ours).t())


def _groups_apart(theirs: Lazy, model: ModelConfig) -> list[Lazy]:
    queries = model.num_attention_heads // model.num_kv_heads
    rows = torch.arange(theirs.shape[0]).unflatten(0, (model.num_kv_heads, queries + 2, model.head_dim))
    return [theirs.index_select(part.flatten()) for part in (rows[:, :queries], rows[:, queries:-1], rows[:, -1:])]


def _groups_together(ours: Sequence[Lazy], model: ModelConfig) -> Lazy:
    whole = cat(ours)
    rows = torch.arange(whole.shape[0]).split([part.shape[0] for part in ours])
    groups = [part.unflatten(0, (model.num_kv_heads, -1, model.head_dim)) for part in rows]
    return whole.index_select(torch.cat(groups, dim=1).flatten())


GROUPS = Form(_groups_apart, _groups_together)  # rows of each key head's queries, then its key, then its value


class Rule(NamedTuple):
    """Modules of theirs and of ours with the same weight and bias; `{layer}` is a layer's number, `{expert}` an
    expert's.

    ours: several, where one tensor of theirs is several of ours. when: which models have it under this name.
    stack: encoder or decoder, whose layers theirs counts from 0 each. kinds: which of weight and bias it is about.
    """

    theirs: str
    ours: str | tuple[str, ...]
    form: Form = SAME
    when: Callable[[ModelConfig], bool] = lambda model: True
    stack: str | None = None
    kinds: str = "weight|bias"

    def pairs(self, shapes: Shapes, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(their tensor, our tensors) for each that the model, with these shapes, has."""
        layers = {
            "encoder": range(model.num_layers or 0),
            "decoder": range(model.num_layers or 0, model.all_layers),
        }.get(self.stack or "")
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        for name in shapes:
            module, _, kind = name.rpartition(".")
            found = numbers(ours[0], module) if kind in self.kinds.split("|") else None
            if found is None or (layers is not None and found["layer"] not in layers):
                continue
            there = found | {"layer": found["layer"] - layers.start} if layers is not None else found
            yield f"{self.theirs.format(**there)}.{kind}", tuple(f"{each.format(**found)}.{kind}" for each in ours)


class Setting(NamedTuple):
    """A field of config.json that has the value of a field of ours. default: what theirs is where config.json lacks it."""

    theirs: str
    ours: str
    default: Any = REQUIRED


UNTIE, TAKE, REFUSE = "untie", "take", "refuse"


class Copy(NamedTuple):
    """What a tensor of theirs is a copy of where config.json ties them.

    differing: of two that differ: UNTIE (a head of its own), TAKE (the copy, with which theirs computes), REFUSE.
    """

    original: str
    differing: str = UNTIE


def _nothing(given: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of Hugging Face's.

    architecture: class in transformers. models: those of ours that it is.
    prefix: of their names, which files of the bare model leave out.
    settings: fields that both sides have. always: ours that config.json does not have. only: values that theirs must have where
        they are given, because nothing else is built.
    aliases: {another name of a field of theirs: its name}; where both are given the other one counts (transformers' attribute_map).
    absent: what their fields are where config.json lacks them; one that is null there stays null.
    more_ours(config.json) and more_theirs(config): what no table says. of_tensors: what of ours their tensors alone tell.
    heads(config.json): beginnings of names of the heads that a folder of its class lacks (an encoder alone, a classifier).
    adapt(tensors, model): their tensors changed for a model that lacks some of them, and what to tell of it.
    added(model): tensors of theirs that a model without them does not need.
    copies: {their tensor: what it is a copy of}, as transformers' _tied_weights_keys; see huggingface_tied.py.
    in_memory: {name of a tensor of transformers' module: its name in files}, where they differ.
    names: see Rule. surplus: patterns of their tensors that are no weights (masks, inverse frequencies).
    """

    architecture: str
    models: tuple[str, ...] = ("gpt",)
    prefix: str = ""
    settings: tuple[Setting, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)
    more_ours: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    more_theirs: Callable[[RunConfig], dict[str, Any]] = lambda config: {}
    of_tensors: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    heads: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda given: ()
    adapt: Callable[[dict[str, Lazy], ModelConfig], tuple[dict[str, Lazy], tuple[str, ...]]] = lambda tensors, model: (
        tensors,
        (),
    )
    added: Callable[[ModelConfig], dict[str, Lazy]] = lambda model: {}
    copies: Mapping[str, Copy] = field(default_factory=dict)
    in_memory: Mapping[str, str] = field(default_factory=dict)
    names: tuple[Rule, ...]
    surplus: tuple[str, ...] = ()

    def checked(self, given: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
        """A config.json with every field that is read of its type and in its range, under its first name. Raises CheckpointError."""
        own: dict[str, Kind | Ours] = {each.theirs: Ours(each.ours) for each in self.settings}
        table = {
            **KINDS,
            **{name: Ours(kind.name, name in NULLS) for name, kind in own.items() if isinstance(kind, Ours)},
        }
        table |= {name: table[first] for name, first in self.aliases.items()}
        given = checked(given, table, where)
        return {**self.absent, **given, **{self.aliases[name]: given[name] for name in self.aliases if name in given}}

    def to_ours(self, given: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
        """{flat field of RunConfig: value} of a config.json. Raises CheckpointError for what it lacks or what is not built."""
        given = self.checked(given, where)
        for name, allowed in self.only.items():
            if name in given and given[name] not in allowed:
                rule = f"of {self.architecture} only {name} = {' or '.join(map(str, allowed))} is built here"
                raise CheckpointError(
                    problem(
                        f"{where}: {name}", given[name], rule, "This model cannot be converted; ask for it in an issue"
                    )
                )
        missing = [each.theirs for each in self.settings if each.default is REQUIRED and given.get(each.theirs) is None]
        if missing:
            rule = f"{self.architecture} has {', '.join(missing)} in it"
            raise CheckpointError(
                problem(where, sorted(given)[:20], rule, "Add what is missing, or copy the original file again")
            )
        values = {
            each.ours: each.default
            if given.get(each.theirs) is None and each.default is not REQUIRED
            else given[each.theirs]
            for each in self.settings
        }
        return {"model_type": self.models[0], **self.always, **values, **self.more_ours(given)}

    def to_theirs(self, config: RunConfig) -> dict[str, Any]:
        """config.json's fields, without those of transformers itself (model_type, dtype, architectures unless it is another class)."""
        flat = resolved(config)
        return {**{each.theirs: flat[each.ours] for each in self.settings}, **self.more_theirs(config)}


def resolved(config: RunConfig) -> dict[str, Any]:
    """Every field by its flat name, with what follows from others filled in."""
    model = config.model
    derived = {"ffn_hidden_size": model.ffn_size, "kv_channels": model.head_dim, "num_query_groups": model.num_kv_heads}
    return {**config.flat(), **derived}


# hidden_act and its like -> our fields, for an MLP without gate and with one. The first of several names is the one written.
PLAIN: dict[str, dict[str, Any]] = {
    "gelu": {"bias_gelu_fusion": False},
    "gelu_new": {"openai_gelu": True}, "gelu_pytorch_tanh": {"openai_gelu": True}, "gelu_fast": {"openai_gelu": True},
    "relu": {"relu": True}, "relu2": {"squared_relu": True},
}  # fmt: skip
GATED: dict[str, dict[str, Any]] = {
    "silu": {"swiglu": True}, "swish": {"swiglu": True}, "gelu": {"glu_activation": "geglu"},
    "gelu_pytorch_tanh": {"glu_activation": "geglu_tanh"}, "relu": {"glu_activation": "reglu"},
}  # fmt: skip


def activation(table: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Our fields for an activation of theirs."""
    if name not in table:
        rule = f"the activations known here are {', '.join(table)}"
        raise CheckpointError(
            problem("config.json: activation", name, rule, "This model cannot be converted; ask for it in an issue")
        )
    return table[name]


def activation_name(table: Mapping[str, dict[str, Any]], model: ModelConfig) -> str | None:
    """Their name of the model's activation, None where the table has none."""
    return next((name for name, fields in table.items() if ModelConfig(**fields).activation == model.activation), None)


OF_POSITIONS = {
    "learned_absolute": ("max_position_embeddings",),
    "rope": ("rotary_base", "rotary_percent", "rotary_interleaved", "rope_scaling_type"),
    "alibi": ("scaled_alibi",),
    "relative": ("relative_attention_num_buckets", "relative_attention_max_distance"),
}
OF_STRETCH = {
    "linear": ("rope_scaling_factor",),
    "llama3": (
        "rope_scaling_factor",
        "rope_original_max_position_embeddings",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
    ),
    "yarn": ("rope_scaling_factor", "rope_original_max_position_embeddings", "rope_beta_fast", "rope_beta_slow"),
}


def form(model: ModelConfig) -> dict[str, Any]:
    """All of a model that its logits depend on besides the weights: two with equal forms compute the same."""
    names = [
        "norm_after_residual", "bert_no_binary_head",
        "model_type", "num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size", "norm",
        "positions", "activation", "layernorm_epsilon", "add_bias_linear", "qk_layernorm", "untie_embeddings_and_output_weights",
        "apply_residual_connection_post_layernorm", "embed_layernorm", "scale_embeddings", "parallel_attn", "two_norms",
        "decoder_layers", "softmax_scale", "scale_output", *OF_POSITIONS.get(model.positions, ()),
        *OF_STRETCH.get(model.rope_scaling_type, ()),
    ]  # fmt: skip
    found = {name: getattr(model, name) for name in names}
    found["num_classes"] = model.num_classes if sized_by(model, "num_classes") else None
    windows = [model.window(layer) for layer in range(model.num_layers)]
    return {**found, "qkv bias": model.add_bias_linear or model.add_qkv_bias, "windows": windows}
