"""Families of Hugging Face models: the tables (families/*.py) by which config.json and weights are converted both ways.

llama = FAMILIES.find("llama")
values = llama.config_from_hf(config_json)            # {flat field of RunConfig: value}
config_json = llama.config_to_hf(config)
llama.rules                                           # names and layouts of the weights, see Rule

Here and in families/*.py `given` is the content of a config.json. `model_type` there names the family ("llama"); in
RunConfig it names megalith's model ("gpt"), which many families have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from megalith.checkpoint.patterns import match_numbers
from megalith.checkpoint.tensors.lazy import Lazy, cat
from megalith.common.errors import CheckpointError, problem
from megalith.common.registry import Registry
from megalith.config.identity import sized_by
from megalith.config.parameters import Shapes
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig
from megalith.config.source_fields import FieldType, RunField, checked

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
# Fields among config_fields in which null has a meaning (in CONFIG_SCHEMA: null=True); null in any other field there is
# as if config.json lacked it.
NULLABLE = ("num_key_value_heads", "head_dim", "sliding_window", "n_inner", "ffn_hidden_size", "num_decoder_layers")
ACTIVATION_KEYS = ("hidden_act", "hidden_activation", "activation", "activation_function", "feed_forward_proj")
BOOLEAN, STRING, SIZE = FieldType(bool), FieldType(str), FieldType(int, least=1, most=2**31)
BOOLEANS = (
    "tie_word_embeddings", "scale_decoder_outputs", "use_parallel_residual", "new_decoder_architecture", "multi_query",
    "parallel_attn", "alibi", "use_sliding_window", "attention_bias", "mlp_bias", "use_bidirectional_attention",
    "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "add_cross_attention", "is_decoder",
)  # fmt: skip
# Fields of any family's config.json that are read, beside those that equal a field of RunConfig (config_fields).
CONFIG_SCHEMA: dict[str, FieldType | RunField] = {
    "model_type": STRING, "architectures": FieldType(list, item=str), "transformers_weights": STRING,
    "quantization_config": FieldType(dict), "bos_token_id": FieldType(int, least=0), "pad_token_id": FieldType(int),
    **dict.fromkeys(ACTIVATION_KEYS, STRING), **dict.fromkeys(BOOLEANS, BOOLEAN),
    "position_embedding_type": STRING, "type_vocab_size": SIZE, "num_kv_heads": SIZE,
    "num_ln_in_parallel_attn": FieldType(int, choices=(1, 2)), "n_positions": SIZE,
    "max_window_layers": FieldType(int, least=0),
    "id2label": FieldType(dict), "classifier_dropout": RunField("classifier_dropout", null=True),
    "sliding_window": RunField("sliding_window", null=True),
    "layer_types": FieldType(list, item=str), "rope_theta": RunField("rotary_base"),
    "rotary_emb_base": RunField("rotary_base"), "rotary_pct": RunField("rotary_percent"),
    "dropout_rate": RunField("hidden_dropout"), "rope_scaling": FieldType(dict), "rope_parameters": FieldType(dict),
}  # fmt: skip
REQUIRED = object()  # a field of config.json without a default
NOT_IMPLEMENTED = "This model cannot be converted; ask for it in an issue"


class Conversion(NamedTuple):
    """How one tensor of Hugging Face becomes one or several of megalith, and back. For weights and biases alike.

    megalith's weights are [out, in], as nn.Linear's, with q, k and v apart, each with its heads in order.
    Both directions use only what lazy.py offers, so that a box of the result is read from a box of the source.
    """

    from_hf: Callable[[Lazy, ModelConfig], Sequence[Lazy]]
    to_hf: Callable[[Sequence[Lazy], ModelConfig], Lazy]


IDENTITY = Conversion(lambda tensor, model: [tensor], lambda parts, model: parts[0])
TRANSPOSED = Conversion(lambda tensor, model: [tensor.t()], lambda parts, model: parts[0].t())  # Conv1D has [in, out]
# GPT-2's c_attn: q, k and v side by side in the columns of one Conv1D, [in, 3 * out].
QKV_TRANSPOSED = Conversion(lambda tensor, model: tensor.t().chunk(3), lambda parts, model: cat(parts).t())


def _split_grouped_qkv(fused: Lazy, model: ModelConfig) -> list[Lazy]:
    per_group = model.num_attention_heads // model.num_kv_heads  # query heads of one key/value head
    rows = torch.arange(fused.shape[0]).unflatten(0, (model.num_kv_heads, per_group + 2, model.head_dim))
    return [fused.index_select(part.flatten()) for part in (rows[:, :per_group], rows[:, per_group:-1], rows[:, -1:])]


def _fuse_grouped_qkv(qkv: Sequence[Lazy], model: ModelConfig) -> Lazy:
    stacked = cat(qkv)
    rows = torch.arange(stacked.shape[0]).split([part.shape[0] for part in qkv])
    groups = [part.unflatten(0, (model.num_kv_heads, -1, model.head_dim)) for part in rows]
    return stacked.index_select(torch.cat(groups, dim=1).flatten())


# query_key_value of Bloom, Falcon, GPT-NeoX: for each key/value head the rows of its queries, of its key, of its value.
GROUPED_QKV = Conversion(_split_grouped_qkv, _fuse_grouped_qkv)


class Rule(NamedTuple):
    """A module of Hugging Face's model and megalith's module with the same weight and bias, laid out by `conversion`.

    `{layer}` in a name is a layer's number, `{expert}` an expert's.
    hf_module: its full name, with the family's prefix. modules: megalith's; several where one tensor of Hugging Face
        holds several of them (fused q, k, v).
    when: the models that have the module under this name.
    stack: encoder or decoder, where Hugging Face counts the layers of each from 0; megalith counts the decoder's on
        from the encoder's. kinds: weight, bias, or both (weight|bias).
    """

    hf_module: str
    modules: str | tuple[str, ...]
    conversion: Conversion = IDENTITY
    when: Callable[[ModelConfig], bool] = lambda model: True
    stack: str | None = None
    kinds: str = "weight|bias"

    def pairs(self, shapes: Shapes, model: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(name of Hugging Face's tensor, names of megalith's) for each that the model, with these shapes, has."""
        layers = {
            "encoder": range(model.num_layers or 0),
            "decoder": range(model.num_layers or 0, model.all_layers),
        }.get(self.stack or "")
        modules = (self.modules,) if isinstance(self.modules, str) else self.modules
        for name in shapes:
            module, _, kind = name.rpartition(".")
            found = match_numbers(modules[0], module) if kind in self.kinds.split("|") else None
            if found is None or (layers is not None and found["layer"] not in layers):
                continue
            in_stack = found | {"layer": found["layer"] - layers.start} if layers is not None else found
            names = tuple(f"{each.format(**found)}.{kind}" for each in modules)
            yield f"{self.hf_module.format(**in_stack)}.{kind}", names


class ConfigField(NamedTuple):
    """A field of config.json (hf_name) with the value of a field of RunConfig (name, flat).

    default: what is taken where config.json lacks it, or has null; Family.hf_defaults go first where it is lacking, for
        a family that shares a table of fields with others and differs from them in a default.
    """

    hf_name: str
    name: str
    default: Any = REQUIRED


UNTIE, USE_TIED, REFUSE = "untie", "use_tied", "refuse"


class TiedTo(NamedTuple):
    """The tensor (original) that another one is tied to: an output layer's weight, only where config.json ties it.

    if_different: what a folder in which the two differ means. UNTIE (for output layers): the tied one is a head of its
    own; USE_TIED: the tied one is read, since transformers computes with it; REFUSE: an error. megalith's model has one
    parameter for both of a pair with USE_TIED or REFUSE, whatever config.json ties.
    """

    original: str
    if_different: str = UNTIE


def _no_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _unchanged(tensors: dict[str, Lazy], model: ModelConfig) -> tuple[dict[str, Lazy], tuple[str, ...]]:
    return tensors, ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of transformers, and how it is converted.

    architecture: class in transformers. model_types: megalith's (RunConfig's) model types that it corresponds to.
    prefix: beginning of the tensors' names that files of the base model leave out (transformers' base_model_prefix and
        a dot).
    config_fields: fields that config.json and RunConfig both have. constants: {field of RunConfig: its value in every
        model of the family}. supported: {field of config.json: the values it may have}; nothing else is implemented.
    aliases: {another name of a field of config.json: its name}, as transformers' attribute_map; where both are given
        the value of the other name is used.
    hf_defaults: what fields are where config.json lacks them; one of NULLABLE that is null there stays null.
    more_from_hf(config.json) and more_to_hf(config): fields that need code.
    config_from_tensors(tensors): fields of RunConfig that only the tensors show.
    lacked_heads(config.json): beginnings of names of the heads that a folder of its class lacks (a base model alone, a
        classifier).
    adapt_tensors(tensors, model): the tensors changed for a model that lacks some of them, and notes about it.
    added_tensors(model): for an export, tensors that Hugging Face's model has and megalith's does not need.
        (Tensors in these are under Hugging Face's names.)
    tied: {tensor: what it is tied to}, as transformers' _tied_weights_keys; see tied.py.
    merged: {tensor: the one that `adapt_tensors` adds it to, in a model without a parameter for it}.
    file_names: {name in the state_dict of transformers' module: name in files}, where they differ.
    rules: every parameter, see Rule.
    ignored: regular expressions for whole names of tensors in files that are no weights (masks, inverse frequencies).
    not_exported: as ignored, of parameters by megalith's names, which an export leaves out.
    """

    architecture: str
    model_types: tuple[str, ...] = ("gpt",)
    prefix: str = ""
    config_fields: tuple[ConfigField, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    supported: Mapping[str, tuple] = field(default_factory=dict)
    more_from_hf: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_fields
    more_to_hf: Callable[[RunConfig], dict[str, Any]] = lambda config: {}
    config_from_tensors: Callable[[Mapping[str, Any]], dict[str, Any]] = _no_fields
    lacked_heads: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda given: ()
    adapt_tensors: Callable[[dict[str, Lazy], ModelConfig], tuple[dict[str, Lazy], tuple[str, ...]]] = _unchanged
    added_tensors: Callable[[ModelConfig], dict[str, Lazy]] = lambda model: {}
    tied: Mapping[str, TiedTo] = field(default_factory=dict)
    merged: Mapping[str, str] = field(default_factory=dict)
    file_names: Mapping[str, str] = field(default_factory=dict)
    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    not_exported: tuple[str, ...] = ()

    def checked(self, given: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
        """A config.json whose fields have their type and range, each under its own name, also where an alias was given.

        With the family's hf_defaults for what it lacks.
        Raises CheckpointError with every field that is wrong.
        """
        fields = {each.hf_name: RunField(each.name, each.hf_name in NULLABLE) for each in self.config_fields}
        schema = {**CONFIG_SCHEMA, **fields}
        schema |= {alias: schema[name] for alias, name in self.aliases.items()}
        given = checked(given, schema, where)
        by_alias = {name: given[alias] for alias, name in self.aliases.items() if alias in given}
        return {**self.hf_defaults, **given, **by_alias}

    def config_from_hf(self, given: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
        """{flat field of RunConfig: value} of a config.json.

        Raises CheckpointError for what it lacks and for what is not implemented.
        """
        given = self.checked(given, where)
        for name, allowed in self.supported.items():
            if name in given and given[name] not in allowed:
                rule = f"must be {' or '.join(map(str, allowed))} for {self.architecture}: nothing else is implemented"
                raise CheckpointError(problem(f"{where}: {name}", given[name], rule, NOT_IMPLEMENTED))
        required = [each.hf_name for each in self.config_fields if each.default is REQUIRED]
        if missing := [name for name in required if given.get(name) is None]:
            rule = f"has no {', '.join(missing)}, which {self.architecture} needs"
            cure = "Add what is missing, or copy the original file again"
            raise CheckpointError(problem(where, sorted(given)[:20], rule, cure))
        values = {
            each.name: each.default
            if given.get(each.hf_name) is None and each.default is not REQUIRED
            else given[each.hf_name]
            for each in self.config_fields
        }
        return {"model_type": self.model_types[0], **self.constants, **values, **self.more_from_hf(given)}

    def config_to_hf(self, config: RunConfig) -> dict[str, Any]:
        """config.json's fields, without model_type, dtype and architectures, which conversion.py adds.

        BERT's have architectures, since its class depends on the heads.
        """
        flat = resolved_fields(config)
        return {**{each.hf_name: flat[each.name] for each in self.config_fields}, **self.more_to_hf(config)}


def resolved_fields(config: RunConfig) -> dict[str, Any]:
    """Every field by its flat name; the MLP's width, the head's and the key/value heads are numbers, never None."""
    model = config.model
    derived = {"ffn_hidden_size": model.ffn_size, "kv_channels": model.head_dim, "num_query_groups": model.num_kv_heads}
    return {**config.flat(), **derived}


# hidden_act and its like -> fields of RunConfig, for an MLP without gate and with one. Of several names for the same
# activation the first is written.
MLP_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "gelu": {"bias_gelu_fusion": False},
    "gelu_new": {"openai_gelu": True}, "gelu_pytorch_tanh": {"openai_gelu": True}, "gelu_fast": {"openai_gelu": True},
    "relu": {"relu": True}, "relu2": {"squared_relu": True},
}  # fmt: skip
GLU_ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"swiglu": True}, "swish": {"swiglu": True}, "gelu": {"glu_activation": "geglu"},
    "gelu_pytorch_tanh": {"glu_activation": "geglu_tanh"}, "relu": {"glu_activation": "reglu"},
}  # fmt: skip


def activation_fields(table: Mapping[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Fields of RunConfig for an activation named in config.json."""
    if name not in table:
        rule = f"must be one of {', '.join(table)}"
        raise CheckpointError(problem("config.json: activation", name, rule, NOT_IMPLEMENTED))
    return table[name]


def activation_name(table: Mapping[str, dict[str, Any]], model: ModelConfig) -> str | None:
    """Hugging Face's name of the model's activation, None where the table has none."""
    return next((name for name, fields in table.items() if ModelConfig(**fields).activation == model.activation), None)


POSITION_FIELDS = {
    "learned_absolute": ("max_position_embeddings",),
    "rope": ("rotary_base", "rotary_percent", "rotary_interleaved", "rope_scaling_type"),
    "alibi": ("scaled_alibi",),
    "relative": ("relative_attention_num_buckets", "relative_attention_max_distance"),
}
ROPE_SCALING_FIELDS = {
    "linear": ("rope_scaling_factor",),
    "llama3": (
        "rope_scaling_factor",
        "rope_original_max_position_embeddings",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
    ),
    "yarn": ("rope_scaling_factor", "rope_original_max_position_embeddings", "rope_beta_fast", "rope_beta_slow"),
}


def architecture_fields(model: ModelConfig) -> dict[str, Any]:
    """What a model's logits depend on besides the weights, by names of ModelConfig's fields and properties.

    Two models with equal ones compute the same, but for the activation in BERT's head (head_activation), for which
    config.json has no field of its own (conversion.py: export_notes).
    """
    names = [
        "norm_after_residual", "bert_no_binary_head",
        "model_type", "num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "head_dim", "ffn_size",
        "vocab_size", "norm", "positions", "activation", "layernorm_epsilon", "add_bias_linear", "qk_layernorm",
        "untie_embeddings_and_output_weights", "apply_residual_connection_post_layernorm", "embed_layernorm",
        "scale_embeddings", "parallel_attn", "two_norms", "decoder_layers", "softmax_scale", "scale_output",
        *POSITION_FIELDS.get(model.positions, ()),
        *ROPE_SCALING_FIELDS.get(model.rope_scaling_type, ()),
    ]  # fmt: skip
    found = {name: getattr(model, name) for name in names}
    found["num_classes"] = model.num_classes if sized_by(model, "num_classes") else None
    windows = [model.window(layer) for layer in range(model.num_layers)]
    return {**found, "qkv bias": model.add_bias_linear or model.add_qkv_bias, "windows": windows}
