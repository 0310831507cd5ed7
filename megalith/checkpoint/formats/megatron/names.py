"""Megatron's names of the parameters, and how it splits them: tables that import and export share.

Megatron's names here are those of its legacy models in the spelling of 2022, without `language_model.`;
`normalize_name` turns older, newer and Megatron core's spellings into them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from megalith.checkpoint.patterns import match_numbers
from megalith.common.errors import CheckpointError, problem
from megalith.common.registry import load
from megalith.config.architectures import ARCHITECTURES, architecture
from megalith.config.parameter_kinds import tower_name


class ParamMapping(NamedTuple):
    """A tensor of Megatron and the parameters that it holds.

    `{layer}` in a name is a layer's number over the whole model, `{expert}` an expert's number in its layer. split: how
    the tensor is split among tensor-parallel ranks, see layout.py. form: the models that have it under this name: with
    a gated or an ungated MLP, with multihead or multiquery attention; "": all. summed: the bias of a row-parallel
    layer, of which ranks may hold addends (SUM_ROW_PARALLEL_BIASES).
    """

    megatron_name: str
    parameters: tuple[str, ...]
    split: str
    form: str = ""
    summed: bool = False


class ParamTable(NamedTuple):
    """The mappings of a model, in the order of Megatron's modules.

    assumed: config fields of files without arguments. writable: whether megalith writes such files too.
    """

    mappings: tuple[ParamMapping, ...]
    assumed: Mapping[str, Any] = {}
    writable: bool = True


def _linear(megatron_name: str, modules: str, weight: str, bias: str, form: str = "") -> tuple[ParamMapping, ...]:
    """The mappings of a module's weight and bias. modules: one or several names; weight, bias: their splits."""
    names = modules.split()
    return (
        ParamMapping(f"{megatron_name}.weight", tuple(f"{name}.weight" for name in names), weight, form),
        ParamMapping(f"{megatron_name}.bias", tuple(f"{name}.bias" for name in names), bias, form, weight == "columns"),
    )


def _layer(megatron_prefix: str, prefix: str, *modules: tuple[str, ...]) -> tuple[ParamMapping, ...]:
    """The mappings of the modules of a layer, each as arguments of `_linear`."""
    return tuple(
        mapping
        for name, names, *split in modules
        for mapping in _linear(
            f"{megatron_prefix}.{name}", " ".join(f"{prefix}.{each}" for each in names.split()), *split
        )
    )


ATTENTION = (
    ("input_layernorm", "attention_norm", "replicated", "replicated"),
    ("self_attention.query_key_value", "attention.q attention.k attention.v", "qkv", "qkv", "multihead"),
    ("self_attention.query", "attention.q", "rows", "rows", "multiquery"),
    ("self_attention.key_value", "attention.k attention.v", "pair", "pair", "multiquery"),
    ("self_attention.q_layernorm", "attention.q_norm", "replicated", "replicated"),
    ("self_attention.k_layernorm", "attention.k_norm", "replicated", "replicated"),
    ("self_attention.dense", "attention.out", "columns", "replicated"),
)
MLP = (  # a gated MLP has dense_h_to_4h as two halves
    ("post_attention_layernorm", "mlp_norm", "replicated", "replicated"),
    ("mlp.dense_h_to_4h", "mlp.gate mlp.up", "halves", "halves", "gated"),
    ("mlp.dense_h_to_4h", "mlp.up", "rows", "rows", "ungated"),
    ("mlp.dense_4h_to_h", "mlp.down", "columns", "replicated"),
)
EMBEDDINGS = (
    ParamMapping("embedding.word_embeddings.weight", ("embedding.weight",), "vocabulary"),
    ParamMapping("embedding.position_embeddings.weight", ("position_embedding.weight",), "replicated"),
)
GPT_MAPPINGS = (
    *EMBEDDINGS,
    # Only BigScience's fork has this norm.
    *_linear("embedding.word_embeddings.norm", "embedding_norm", "replicated", "replicated"),
    *_layer("encoder.layers.{layer}", "layers.{layer}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "final_norm", "replicated", "replicated"),
    ParamMapping("output_layer.weight", ("head.weight",), "vocabulary"),
)
BERT_ENCODER = (
    *EMBEDDINGS,
    ParamMapping("embedding.tokentype_embeddings.weight", ("token_type_embedding.weight",), "replicated"),
    *_layer("encoder.layers.{layer}", "layers.{layer}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "final_norm", "replicated", "replicated"),
    *_linear("pooler.dense", "pooler", "replicated", "replicated"),
)
BERT_MAPPINGS = (
    *BERT_ENCODER,
    ParamMapping("lm_head.bias", ("head.bias",), "vocabulary"),
    *_linear("lm_head.dense", "head_dense", "replicated", "replicated"),
    *_linear("lm_head.layernorm", "head_norm", "replicated", "replicated"),
    *_linear("binary_head", "order_head", "replicated", "replicated"),
)
CROSS_ATTENTION = (  # in a decoder post_attention_layernorm belongs to cross attention, and the MLP has another norm
    ("post_attention_layernorm", "cross_norm", "replicated", "replicated"),
    ("inter_attention.query", "cross_attention.q", "rows", "rows"),
    ("inter_attention.key_value", "cross_attention.k cross_attention.v", "pair", "pair"),
    ("inter_attention.dense", "cross_attention.out", "columns", "replicated"),
    ("post_inter_attention_layernorm", "mlp_norm", "replicated", "replicated"),
)
T5_MAPPINGS = (  # the decoder's layers are numbered after the encoder's, in both names
    *EMBEDDINGS,
    *_layer("encoder.layers.{layer}", "layers.{layer}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "encoder_norm", "replicated", "replicated"),
    *_layer("decoder.layers.{layer}", "layers.{layer}", *ATTENTION, *CROSS_ATTENTION, *MLP[1:]),
    *_linear("decoder.final_layernorm", "final_norm", "replicated", "replicated"),
    GPT_MAPPINGS[-1],
    ParamMapping("lm_head.bias", ("head.bias",), "vocabulary"),
)
BERT_CLASSIFICATION = ParamTable(
    (*BERT_ENCODER, *_linear("classification_head", "classifier", "replicated", "replicated"))
)
BERT_MULTIPLE_CHOICE = ParamTable(
    (*BERT_ENCODER, *_linear("multichoice_head", "classifier", "replicated", "replicated"))
)


def _tower(megatron_prefix: str, tower: str) -> tuple[ParamMapping, ...]:
    """The mappings of a tower of a bi-encoder: a BERT without pooler, and a projection."""
    bert = [mapping for mapping in BERT_ENCODER if not mapping.megatron_name.startswith("pooler.")]
    return (
        *(
            mapping._replace(
                megatron_name=f"{megatron_prefix}{mapping.megatron_name}",
                parameters=tuple(tower_name(tower, name) for name in mapping.parameters),
            )
            for mapping in bert
        ),
        *_linear(f"{megatron_prefix}projection_enc", f"{tower}_head.projection", "replicated", "replicated"),
    )


FIRST_TOWERS = ("query_model.", "shared_model.")  # one of them is in every bi-encoder
BIENCODER = ParamTable(
    (*_tower("query_model.", "query"), *_tower("context_model.", "context"), *_tower("shared_model.", "query")),
    writable=False,
)
GPT = ParamTable(GPT_MAPPINGS, {"openai_gelu": True})
BERT = ParamTable(BERT_MAPPINGS)
T5 = ParamTable(T5_MAPPINGS)
HEADS = ("lm_head", "binary_head", "classification_head", "multichoice_head")  # beside language_model, not in it
TIED_EMBEDDING = "word_embeddings_for_head.weight"  # the last stage's copy of the word embedding
# An argument that the reader of GPT-NeoX adds: tensor-parallel ranks hold addends of those biases, not copies.
SUM_ROW_PARALLEL_BIASES = "sums_row_parallel_biases"

_SPELLINGS = [  # (pattern, the spelling of 2022), applied one after another
    (r"^(module\.)+", ""),
    (r"^((?:query|context|shared)_model\.)?language_model\.", r"\1"),
    (r"^((?:query|context|shared)_model\.)?transformer\.", r"\1encoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\b(input|post_attention|post_inter_attention|final)_norm\b", r"\1_layernorm"),
    (r"^lm_head\.(norm|layer_norm)\.", "lm_head.layernorm."),
    (r"^output_layer\.bias$", "lm_head.bias"),
    (r"^(tied_modules\.embed\.)", "embedding."),
    # Transformer Engine fuses a norm into the linear layer that follows it.
    (r"\.linear_qkv\.layer_norm_(weight|bias)$", r"._input_layernorm.\1"),
    (r"\.self_attention\._input_layernorm\.", ".input_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".post_attention_layernorm.\1"),
    (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
    (r"\.linear_qkv\.", ".query_key_value."),
    (r"\.self_attention\.linear_proj\.", ".self_attention.dense."),
    (r"\.mlp\.linear_fc1\.", ".mlp.dense_h_to_4h."),
    (r"\.mlp\.linear_fc2\.", ".mlp.dense_4h_to_h."),
    (r"\.pre_cross_attn_layernorm\.", ".post_attention_layernorm."),
    (r"\.cross_attention\.linear_q\.", ".inter_attention.query."),
    (r"\.cross_attention\.linear_kv\.", ".inter_attention.key_value."),
    (r"\.cross_attention\.linear_proj\.", ".inter_attention.dense."),
]


def normalize_name(name: str) -> str:
    """A name in the spelling of 2022."""
    for pattern, word in _SPELLINGS:
        name = re.sub(pattern, word, name)
    return name


def normalize_names(names: Iterable[str]) -> dict[str, str]:
    """{name as it is: in the spelling of 2022}.

    Megatron core calls the only stack of a GPT `decoder`, and has another name for one norm of a decoder with cross
    attention.
    """
    found = {name: normalize_name(name) for name in names}
    if not any(".linear_qkv." in name for name in found):
        return found
    if any(".cross_attention." in name for name in found):
        return {
            name: each.replace(".post_attention_", ".post_inter_attention_")
            if "pre_cross_attn" not in name and each.startswith("decoder.")
            else each
            for name, each in found.items()
        }
    return {name: re.sub(r"^decoder\.", "encoder.", each) for name, each in found.items()}


def first_tower(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tensors of the query's tower, or of both, of a bi-encoder, by the names of a BERT; all of another model's."""
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items() for prefix in FIRST_TOWERS if name.startswith(prefix)
    }  # fmt: skip
    return found or tensors


def megatron_tables() -> dict[str, ParamTable]:
    """The tables of the models that Megatron has too, in the order of ARCHITECTURES."""
    return {name: table_of(name) for name in ARCHITECTURES if "megatron" in architecture(name).names}


def infer_model_type(names: Collection[str]) -> str:
    """The model type whose table fits these names best.

    A name that the table lacks counts twice as much as a missing tensor of the table: a damaged file lacks some.
    """

    def distance(table: ParamTable) -> int:
        patterns = {mapping.megatron_name for mapping in table.mappings}
        found = [{each for each in patterns if match_numbers(each, name) is not None} for name in names]
        return 2 * found.count(set()) + len(patterns.difference(*found))

    tables = megatron_tables()
    return min(tables, key=lambda kind: distance(tables[kind]))


def table_of(kind: str) -> ParamTable:
    """Megatron's names of a model, which may be a user's. Raises CheckpointError where its record has none."""
    record = architecture(kind)
    if "megatron" not in record.names:
        rule = f"must be one of {', '.join(sorted(megatron_tables()))}"
        raise CheckpointError(problem("A model in Megatron's format", kind, rule, "Convert it to one of them first"))
    return load("Megatron's names", record.names["megatron"])


def mappings_of_model(kind: str, *, gated: bool, multiquery: bool) -> tuple[ParamMapping, ...]:
    """The mappings of a model: some parameters have two, and a model uses one of them."""
    forms = ("", "gated" if gated else "ungated", "multiquery" if multiquery else "multihead")
    return tuple(mapping for mapping in table_of(kind).mappings if mapping.form in forms)


def mapping_of_name(mappings: Iterable[ParamMapping], name: str) -> ParamMapping | None:
    """The mapping of a name of Megatron, with its numbers inserted; None where there is none."""
    for mapping in mappings:
        if (found := match_numbers(mapping.megatron_name, name)) is not None:
            parameters = tuple(each.format(**found) for each in mapping.parameters)
            return mapping._replace(megatron_name=name, parameters=parameters)
    return None


def mappings_of_names(mappings: Iterable[ParamMapping], names: Iterable[str]) -> list[ParamMapping]:
    """The mappings of these names of Megatron. Raises CheckpointError for a name that has none."""
    mappings, found = list(mappings), []
    for name in names:
        if (mapping := mapping_of_name(mappings, name)) is None:
            raise CheckpointError(
                problem(
                    "Every parameter",
                    name,
                    "must belong to a model of Megatron that is known here",
                    "If a feature brings it (experts, adapters, ...), train without that, or drop it from the source",
                )
            )
        found.append(mapping)
    return found


def mappings_of_parameters(
    mappings: Iterable[ParamMapping], names: Iterable[str], encoder_layers: int
) -> list[ParamMapping]:
    """The mappings of these parameters, in Megatron's order of modules.

    encoder_layers: layers from this number on are the decoder's. Raises CheckpointError for a parameter that has no
    mapping.
    """
    names = set(names)
    found, mapped = [], set[str]()
    for stack, block in itertools.groupby(mappings, key=_stack):
        numbered = [
            (numbers.get("layer", 0), index, numbers.get("expert", 0), mapping, numbers)
            for index, mapping in enumerate(block)
            for numbers in (match_numbers(mapping.parameters[0], name) for name in names)
            if numbers is not None and (not stack or (numbers["layer"] < encoder_layers) is stack.startswith("encoder"))
        ]
        for *_, mapping, numbers in sorted(numbered, key=lambda entry: entry[:3]):
            parameters = tuple(name.format(**numbers) for name in mapping.parameters)
            if names.issuperset(parameters):
                megatron_name = mapping.megatron_name.format(**numbers)
                found.append(mapping._replace(megatron_name=megatron_name, parameters=parameters))
                mapped.update(parameters)
    if names - mapped:
        rule = "must have a counterpart in Megatron's model"
        raise CheckpointError(problem("Every parameter", min(names - mapped), rule, "Export to another format"))
    return found


def _stack(mapping: ParamMapping) -> str:
    """Megatron's name of the stack of layers that a mapping belongs to; "" outside of layers."""
    return mapping.megatron_name.rpartition(".layers.{layer}.")[0]
