"""What Megatron calls the parameters, and how it splits them: tables that import and export share.

Megatron's names here are those of its legacy models in the spelling of 2022, without `language_model.`; older, newer and
Megatron core's spellings are turned into them by `normal`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from megalith.checkpoint.patterns import numbers
from megalith.common.errors import CheckpointError, problem
from megalith.common.registry import load
from megalith.config.architectures import ARCHITECTURES, architecture


class Row(NamedTuple):
    """One tensor of Megatron's. `{layer}` is a layer's number over the whole model, `{expert}` an expert's in its
    layer.

    ours: the parameters that it holds. split: how it is split among tensor-parallel ranks, see layout.py.
    form: the models that have it under this name: gated or plain MLP, multihead or multiquery attention; "": all.
    summed: a bias of a layer that is split by inputs, of which ranks may hold addends (SUMMED).
    """

    theirs: str
    ours: tuple[str, ...]
    split: str
    form: str = ""
    summed: bool = False


class Table(NamedTuple):
    """The rows of a model, in the order of Megatron's modules; and what is assumed of a file without arguments."""

    rows: tuple[Row, ...]
    assumed: Mapping[str, Any] = {}


def _linear(theirs: str, ours: str, weight: str, bias: str, form: str = "") -> tuple[Row, Row]:
    names = ours.split()
    return (
        Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in names), weight, form),
        Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in names), bias, form, weight == "columns"),
    )


def _layer(theirs: str, ours: str, *parts: tuple[str, ...]) -> tuple[Row, ...]:
    return tuple(
        row for name, names, *split in parts
        for row in _linear(f"{theirs}.{name}", " ".join(f"{ours}.{each}" for each in names.split()), *split)
    )  # fmt: skip


ATTENTION = (
    ("input_layernorm", "attention_norm", "whole", "whole"),
    ("self_attention.query_key_value", "attention.q attention.k attention.v", "qkv", "qkv", "multihead"),
    ("self_attention.query", "attention.q", "rows", "rows", "multiquery"),
    ("self_attention.key_value", "attention.k attention.v", "pair", "pair", "multiquery"),
    ("self_attention.q_layernorm", "attention.q_norm", "whole", "whole"),
    ("self_attention.k_layernorm", "attention.k_norm", "whole", "whole"),
    ("self_attention.dense", "attention.out", "columns", "whole"),
)
MLP = (  # a gated MLP has dense_h_to_4h as two halves
    ("post_attention_layernorm", "mlp_norm", "whole", "whole"),
    ("mlp.dense_h_to_4h", "mlp.gate mlp.up", "halves", "halves", "gated"),
    ("mlp.dense_h_to_4h", "mlp.up", "rows", "rows", "plain"),
    ("mlp.dense_4h_to_h", "mlp.down", "columns", "whole"),
)
EMBEDDINGS = (
    Row("embedding.word_embeddings.weight", ("embedding.weight",), "vocabulary"),
    Row("embedding.position_embeddings.weight", ("position_embedding.weight",), "whole"),
)
GPT_ROWS = (
    *EMBEDDINGS,
    *_linear("embedding.word_embeddings.norm", "embedding_norm", "whole", "whole"),  # BigScience's fork alone
    *_layer("encoder.layers.{layer}", "layers.{layer}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "final_norm", "whole", "whole"),
    Row("output_layer.weight", ("head.weight",), "vocabulary"),
)
BERT_ENCODER = (
    *EMBEDDINGS,
    Row("embedding.tokentype_embeddings.weight", ("token_type_embedding.weight",), "whole"),
    *_layer("encoder.layers.{layer}", "layers.{layer}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "final_norm", "whole", "whole"),
    *_linear("pooler.dense", "pooler", "whole", "whole"),
)
BERT_ROWS = (
    *BERT_ENCODER,
    Row("lm_head.bias", ("head.bias",), "vocabulary"),
    *_linear("lm_head.dense", "head_dense", "whole", "whole"),
    *_linear("lm_head.layernorm", "head_norm", "whole", "whole"),
    *_linear("binary_head", "order_head", "whole", "whole"),
)
CROSS = (  # in a decoder the norm after attention comes before cross attention, and another one before the MLP
    ("post_attention_layernorm", "cross_norm", "whole", "whole"),
    ("inter_attention.query", "cross_attention.q", "rows", "rows"),
    ("inter_attention.key_value", "cross_attention.k cross_attention.v", "pair", "pair"),
    ("inter_attention.dense", "cross_attention.out", "columns", "whole"),
    ("post_inter_attention_layernorm", "mlp_norm", "whole", "whole"),
)
T5_ROWS = (  # layers of the decoder have the numbers after the encoder's, on both sides of the table
    *EMBEDDINGS,
    *_layer("encoder.layers.{layer}", "layers.{layer}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "encoder_norm", "whole", "whole"),
    *_layer("decoder.layers.{layer}", "layers.{layer}", *ATTENTION, *CROSS, *MLP[1:]),
    *_linear("decoder.final_layernorm", "final_norm", "whole", "whole"),
    GPT_ROWS[-1],
    Row("lm_head.bias", ("head.bias",), "vocabulary"),
)
BERT_CLASSIFICATION = Table((*BERT_ENCODER, *_linear("classification_head", "classifier", "whole", "whole")))
BERT_MULTIPLE_CHOICE = Table((*BERT_ENCODER, *_linear("multichoice_head", "classifier", "whole", "whole")))
GPT = Table(GPT_ROWS, {"openai_gelu": True})
BERT = Table(BERT_ROWS)
T5 = Table(T5_ROWS)
HEADS = ("lm_head", "binary_head", "classification_head", "multichoice_head")  # beside language_model, not in it
TIED = "word_embeddings_for_head.weight"  # the last stage's copy of the word embedding
SUMMED = (
    "sums_row_parallel_biases"  # an argument of ours: tensor-parallel ranks hold addends of those biases, not copies
)

_SPELLINGS = [  # (pattern, what the spelling of 2022 says), one after another
    (r"^(module\.)+", ""),
    (r"^language_model\.", ""),
    (r"^transformer\.", "encoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\b(input|post_attention|post_inter_attention|final)_norm\b", r"\1_layernorm"),
    (r"^lm_head\.(norm|layer_norm)\.", "lm_head.layernorm."),
    (r"^output_layer\.bias$", "lm_head.bias"),
    (r"^(tied_modules\.embed\.)", "embedding."),
    (
        r"\.linear_qkv\.layer_norm_(weight|bias)$",
        r"._input_layernorm.\1",
    ),  # Transformer Engine fuses the norm into what follows
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


def normal(name: str) -> str:
    """A name in the spelling of 2022."""
    for pattern, word in _SPELLINGS:
        name = re.sub(pattern, word, name)
    return name


def normal_names(names: Iterable[str]) -> dict[str, str]:
    """{name as it is: in the spelling of 2022}. Megatron core calls the only stack of a GPT `decoder`, and has one norm of another name."""
    found = {name: normal(name) for name in names}
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


def known() -> dict[str, Table]:
    """The models of ours that Megatron has, in the order of ARCHITECTURES."""
    return {name: table_of(name) for name in ARCHITECTURES if "megatron" in architecture(name).names}


def model_type(names: Collection[str]) -> str:
    """The model of ours whose table is nearest to these names.

    A name that it lacks weighs as much as two of its rows that no name has: a damaged file lacks some.
    """

    def distance(table: Table) -> int:
        patterns = {row.theirs for row in table.rows}
        found = [{each for each in patterns if numbers(each, name) is not None} for name in names]
        return 2 * found.count(set()) + len(patterns.difference(*found))

    tables = known()
    return min(tables, key=lambda kind: distance(tables[kind]))


def table_of(kind: str) -> Table:
    """Megatron's names of a model, which may be one's own. Raises CheckpointError where its record has none."""
    record = architecture(kind)
    if "megatron" not in record.names:
        rule = f"those known are {', '.join(sorted(known()))}"
        raise CheckpointError(problem("model of the Megatron family", kind, rule, "Convert it to one of them first"))
    return load("Megatron's names", record.names["megatron"])


def rows_of(kind: str, *, gated: bool, multiquery: bool) -> tuple[Row, ...]:
    """The rows of a model: some parameters are written in two ways, of which a model has one."""
    forms = ("", "gated" if gated else "plain", "multiquery" if multiquery else "multihead")
    return tuple(row for row in table_of(kind).rows if row.form in forms)


def row_of(rows: Iterable[Row], name: str) -> Row | None:
    """The row of a name of Megatron's with its numbers in it; None where there is none."""
    for row in rows:
        if (found := numbers(row.theirs, name)) is not None:
            return row._replace(theirs=name, ours=tuple(each.format(**found) for each in row.ours))
    return None


def rows_of_theirs(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The rows of these names of Megatron's. Raises CheckpointError for a name that no row has."""
    rows, found = list(rows), []
    for name in names:
        if (row := row_of(rows, name)) is None:
            raise CheckpointError(
                problem(
                    "parameter", name, "no model of Megatron that is known here has it",
                    "If a feature brings it (experts, adapters, ...), train without that, or drop it from the source",
                )
            )  # fmt: skip
        found.append(row)
    return found


def rows_of_ours(rows: Iterable[Row], names: Iterable[str], encoder_layers: int) -> list[Row]:
    """The rows that hold these parameters of ours, in Megatron's order of modules. Raises CheckpointError for one that none holds.

    encoder_layers: layers from this number on are the decoder's.
    """
    names = set(names)
    found, taken = [], set[str]()
    for stack, block in itertools.groupby(rows, key=lambda row: row.theirs.rpartition(".layers.{layer}.")[0]):
        placed = [
            (each.get("layer", 0), number, each.get("expert", 0), row, each)
            for number, row in enumerate(block)
            for each in (numbers(row.ours[0], name) for name in names)
            if each is not None and (not stack or (each["layer"] < encoder_layers) is stack.startswith("encoder"))
        ]
        for *_, row, each in sorted(placed, key=lambda place: place[:3]):
            ours = tuple(name.format(**each) for name in row.ours)
            if names.issuperset(ours):
                found.append(row._replace(theirs=row.theirs.format(**each), ours=ours))
                taken.update(ours)
    if names - taken:
        rule = "Megatron's model has no place for it"
        raise CheckpointError(problem("parameter", min(names - taken), rule, "Export to another format"))
    return found
