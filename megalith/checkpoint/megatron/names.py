"""What Megatron calls the parameters, and how it splits them: tables that import and export share.

Megatron's names here are those of its legacy models in the spelling of 2022, without `language_model.`; older, newer and
Megatron core's spellings are turned into them by `normal`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from megalith.common.errors import CheckpointError, problem


class Row(NamedTuple):
    """One tensor of Megatron's. `{}` is the layer's number over the whole model.

    ours: the parameters that it holds. split: how it is split among tensor-parallel ranks, see layout.py.
    """

    theirs: str
    ours: tuple[str, ...]
    split: str


def _linear(theirs: str, ours: str, weight: str, bias: str) -> tuple[Row, Row]:
    names = ours.split()
    return (
        Row(f"{theirs}.weight", tuple(f"{name}.weight" for name in names), weight),
        Row(f"{theirs}.bias", tuple(f"{name}.bias" for name in names), bias),
    )


def _layer(theirs: str, ours: str, *parts: tuple[str, str, str, str]) -> tuple[Row, ...]:
    return tuple(
        row for name, names, weight, bias in parts
        for row in _linear(f"{theirs}.{name}", " ".join(f"{ours}.{each}" for each in names.split()), weight, bias)
    )  # fmt: skip


ATTENTION = (  # query and key_value: multi-query attention
    ("input_layernorm", "attention_norm", "whole", "whole"),
    ("self_attention.query_key_value", "attention.q attention.k attention.v", "qkv", "qkv"),
    ("self_attention.query", "attention.q", "rows", "rows"),
    ("self_attention.key_value", "attention.k attention.v", "pair", "pair"),
    ("self_attention.q_layernorm", "attention.q_norm", "whole", "whole"),
    ("self_attention.k_layernorm", "attention.k_norm", "whole", "whole"),
    ("self_attention.dense", "attention.out", "columns", "whole"),
)
MLP = (  # a gated MLP has dense_h_to_4h as two halves
    ("post_attention_layernorm", "mlp_norm", "whole", "whole"),
    ("mlp.dense_h_to_4h", "mlp.gate mlp.up", "halves", "halves"),
    ("mlp.dense_h_to_4h", "mlp.up", "rows", "rows"),
    ("mlp.dense_4h_to_h", "mlp.down", "columns", "whole"),
)
EMBEDDINGS = (
    Row("embedding.word_embeddings.weight", ("embedding.weight",), "vocabulary"),
    Row("embedding.position_embeddings.weight", ("position_embedding.weight",), "whole"),
)
GPT = (
    *EMBEDDINGS,
    *_linear("embedding.word_embeddings.norm", "embedding_norm", "whole", "whole"),  # BigScience's fork alone
    *_layer("encoder.layers.{}", "layers.{}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "final_norm", "whole", "whole"),
    Row("output_layer.weight", ("head.weight",), "vocabulary"),
)
BERT = (
    *EMBEDDINGS,
    Row("embedding.tokentype_embeddings.weight", ("token_type_embedding.weight",), "whole"),
    *_layer("encoder.layers.{}", "layers.{}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "final_norm", "whole", "whole"),
    *_linear("pooler.dense", "pooler", "whole", "whole"),
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
T5 = (  # layers of the decoder have the numbers after the encoder's, on both sides of the table
    *EMBEDDINGS,
    *_layer("encoder.layers.{}", "layers.{}", *ATTENTION, *MLP),
    *_linear("encoder.final_layernorm", "encoder_norm", "whole", "whole"),
    *_layer("decoder.layers.{}", "layers.{}", *ATTENTION, *CROSS, *MLP[1:]),
    *_linear("decoder.final_layernorm", "final_norm", "whole", "whole"),
    GPT[-1],
    Row("lm_head.bias", ("head.bias",), "vocabulary"),
)
TABLES: dict[str, tuple[Row, ...]] = {"gpt": GPT, "bert": BERT, "t5": T5}
BERTS = {row.theirs for row in BERT} - {row.theirs for row in GPT} - {"lm_head.bias"}  # a GPT's output layer may have that
TIED = "word_embeddings_for_head.weight"  # the last stage's copy of the word embedding
SUMMED = "sums_row_parallel_biases"  # an argument of ours: tensor-parallel ranks hold addends of those biases, not copies

_SPELLINGS = [  # (pattern, what the spelling of 2022 says), one after another
    (r"^(module\.)+", ""),
    (r"^language_model\.", ""),
    (r"^transformer\.", "encoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\b(input|post_attention|post_inter_attention|final)_norm\b", r"\1_layernorm"),
    (r"^lm_head\.(norm|layer_norm)\.", "lm_head.layernorm."),
    (r"^output_layer\.bias$", "lm_head.bias"),
    (r"^(tied_modules\.embed\.)", "embedding."),
    (r"\.linear_qkv\.layer_norm_(weight|bias)$", r"._input_layernorm.\1"),  # Transformer Engine fuses the norm into what follows
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


def model_type(names: Iterable[str]) -> str:
    """gpt, bert or t5, by the parameters that only that one has."""
    known = set(names)
    if any(name.startswith("decoder.") for name in known):
        return "t5"
    return "bert" if known & BERTS else "gpt"


def table(kind: str, *, gated: bool, multiquery: bool) -> tuple[Row, ...]:
    """The rows of a model: some parameters are written in two ways, of which a model has one."""
    if kind not in TABLES:
        known = ", ".join(sorted(TABLES))
        raise CheckpointError(problem("model of the Megatron family", kind, f"those known are {known}", "Convert it to one of them first"))
    unused = {"halves"} if not gated else set()
    found = [row for row in TABLES[kind] if row.split not in unused]
    if gated:
        found = [row for row in found if not ("dense_h_to_4h" in row.theirs and row.split == "rows")]
    pattern = r"\.self_attention\.query_key_value\." if multiquery else r"\.self_attention\.(query|key_value)\."
    return tuple(row for row in found if not re.search(pattern, row.theirs))


def rows_of_theirs(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The rows of these names of Megatron's, layers counted out. Raises CheckpointError for a name that no row has."""
    by_name, found = {row.theirs: row for row in rows}, []
    for name in names:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        row = by_name.get(name.replace(layer[0], ".layers.{}.", 1) if layer else name)
        if row is None:
            raise CheckpointError(
                problem(
                    "parameter", name, "no model of Megatron that is known here has it",
                    "If a feature brings it (experts, adapters, ...), train without that, or drop it from the source",
                )
            )  # fmt: skip
        found.append(Row(name, tuple(each.format(layer[1] if layer else "") for each in row.ours), row.split))
    return found


def rows_of_ours(rows: Iterable[Row], names: Iterable[str], encoder_layers: int) -> list[Row]:
    """The rows that hold these parameters of ours, in Megatron's order of modules. Raises CheckpointError for one that none holds.

    encoder_layers: layers from this number on are the decoder's.
    """
    known = set(names)
    found, taken = [], set[str]()
    for group, several in itertools.groupby(rows, key=lambda row: row.theirs.partition(".{}.")[0] if "{}" in row.theirs else ""):
        block, numbers = list(several), [0]
        if group:
            every = {int(match[1]) for name in known if (match := re.match(r"layers\.(\d+)\.", name))}
            numbers = sorted(number for number in every if (number < encoder_layers) is group.startswith("encoder"))
        for number, row in itertools.product(numbers, block):
            ours = tuple(name.format(number) for name in row.ours)
            if known.issuperset(ours):
                found.append(Row(row.theirs.format(number), ours, row.split))
                taken.update(ours)
    if known - taken:
        raise CheckpointError(problem("parameter", min(known - taken), "Megatron's model has no place for it", "Export to another format"))
    return found
