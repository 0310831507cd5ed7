"""BERT (Devlin et al., 2019) and Megatron's form of it: transformers' BertForPreTraining and MegatronBertForPreTraining.

Without binary head they are called ForMaskedLM there; with a head that classifies, ForSequenceClassification and
ForMultipleChoice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from megalith.checkpoint.formats.huggingface.family import (
    PLAIN,
    TAKE,
    Copy,
    Family,
    Rule,
    Setting,
    activation,
    activation_name,
)
from megalith.checkpoint.tensors.lazy import Index, Lazy, slices
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig

GELUS = {
    name: fields for name, fields in PLAIN.items() if "gelu" in name
}  # the head has the same, and there nothing else is built


def _class(given: Mapping[str, Any]) -> str:
    """The class in transformers that a config.json names."""
    return (given.get("architectures") or ["BertForPreTraining"])[0]


# Ends of names of classes -> models of ours.
HEADED = {"ForSequenceClassification": "bert_classification", "ForMultipleChoice": "bert_multiple_choice"}


def _more_ours(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = next((ours for end, ours in HEADED.items() if _class(given).endswith(end)), "bert")
    classes = {"num_classes": len(given.get("id2label") or "01")} if kind == "bert_classification" else {}
    return {
        **activation(GELUS, given.get("hidden_act", "gelu")),
        "model_type": kind,
        "bert_no_binary_head": _class(given).endswith("MaskedLM"),
        "untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", True),
        **classes,
        **({"classifier_dropout": given.get("classifier_dropout")} if kind != "bert" else {}),
    }


def _more_theirs(prefix: str, config: RunConfig) -> dict[str, Any]:
    """prefix: of the names of classes."""
    model, kind = config.model, config.model.model_type
    pretraining = "ForMaskedLM" if model.bert_no_binary_head else "ForPreTraining"
    end = next((end for end, ours in HEADED.items() if ours == kind), pretraining)
    classes = model.num_classes if kind == "bert_classification" else 0
    labels = {number: f"LABEL_{number}" for number in range(classes)}
    return {
        "architectures": [prefix + end], "hidden_act": activation_name(GELUS, model),
        "type_vocab_size": 2, "pad_token_id": 0, "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        **({"id2label": labels, "label2id": {label: number for number, label in labels.items()}} if labels else {}),
        **({"classifier_dropout": model.classifier_dropout} if kind != "bert" else {}),
    }  # fmt: skip


CLASSIFIERS = tuple(HEADED)
HEADS = {
    "bert.pooler.": ("PreTraining", *CLASSIFIERS), "cls.predictions.": ("PreTraining", "MaskedLM"),
    "cls.seq_relationship.": ("PreTraining",), "classifier.": CLASSIFIERS,
}  # fmt: skip
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


def _heads(given: Mapping[str, Any]) -> tuple[str, ...]:
    """BertModel, BertForMaskedLM, BertForSequenceClassification, ... have not all of ours."""
    return tuple(head for head, classes in HEADS.items() if not _class(given).endswith(classes))


def _binary(found: Mapping[str, Any]) -> dict[str, Any]:
    """Without a pooler it is a model without binary head; with one it is not, even if called MaskedLM as bert-base-uncased is."""
    return {"bert_no_binary_head": not any("pooler.dense" in name or "seq_relationship" in name for name in found)}


def _one_segment(found: dict[str, Lazy], model: ModelConfig) -> tuple[dict[str, Lazy], tuple[str, ...]]:
    """A model without binary head has one segment and no embedding of it: the first one's becomes part of the positions'."""
    prefix = "" if TYPES in found else "bert."
    if not model.bert_no_binary_head or not {prefix + POSITIONS, prefix + TYPES} <= found.keys():
        return found, ()
    positions, types = found[prefix + POSITIONS], found[prefix + TYPES]

    def part(index: Index = ()) -> torch.Tensor:
        rows, columns = slices(positions.shape, index)
        return positions.part((rows, columns)) + types.part((slice(0, 1), columns))

    others = {name: lazy for name, lazy in found.items() if name != prefix + TYPES}
    note = (
        "no binary head in it: imported without, for one segment, whose embedding was added to those of the positions"
    )
    made = Lazy(shape=positions.shape, dtype=positions.dtype, read=part, box=part)
    return {**others, prefix + POSITIONS: made}, (note,)


def _no_segments(model: ModelConfig) -> dict[str, Lazy]:
    """The embedding of segments that theirs has and a model without binary head has not: nothing is added by zeros."""
    shape = (2, model.hidden_size)
    return (
        {f"bert.{TYPES}": Lazy(shape=shape, dtype=torch.float32, read=lambda: torch.zeros(shape))}
        if model.bert_no_binary_head
        else {}
    )


_make = functools.partial(
    Family,
    models=("bert", *HEADED.values()),
    prefix="bert.",
    settings=(
        Setting("num_hidden_layers", "num_layers"),
        Setting("hidden_size", "hidden_size"),
        Setting("num_attention_heads", "num_attention_heads"),
        Setting("intermediate_size", "ffn_hidden_size", 3072),
        Setting("max_position_embeddings", "max_position_embeddings", 512),
        Setting("vocab_size", "vocab_size"),
        Setting("layer_norm_eps", "layernorm_epsilon", 1e-12),
        Setting("hidden_dropout_prob", "hidden_dropout", 0.1),
        Setting("attention_probs_dropout_prob", "attention_dropout", 0.1),
        Setting("initializer_range", "init_method_std", 0.02),
    ),
    only={
        "type_vocab_size": (2,), "position_embedding_type": ("absolute",), "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    more_ours=_more_ours,
    of_tensors=_binary,
    heads=_heads,
    adapt=_one_segment,
    added=_no_segments,
    copies={
        "cls.predictions.decoder.weight": Copy("bert.embeddings.word_embeddings.weight"),
        "cls.predictions.decoder.bias": Copy("cls.predictions.bias", TAKE),
    },
    surplus=(r"(bert\.)?embeddings\.position_ids",),
)  # fmt: skip
NAMES = (
    Rule("bert.embeddings.word_embeddings", "embedding"),
    Rule("bert.embeddings.position_embeddings", "position_embedding"),
    Rule("bert.embeddings.token_type_embeddings", "token_type_embedding"),
    Rule("bert.encoder.layer.{layer}.attention.self.query", "layers.{layer}.attention.q"),
    Rule("bert.encoder.layer.{layer}.attention.self.key", "layers.{layer}.attention.k"),
    Rule("bert.encoder.layer.{layer}.attention.self.value", "layers.{layer}.attention.v"),
    Rule("bert.encoder.layer.{layer}.attention.output.dense", "layers.{layer}.attention.out"),
    Rule("bert.encoder.layer.{layer}.intermediate.dense", "layers.{layer}.mlp.up"),
    Rule("bert.encoder.layer.{layer}.output.dense", "layers.{layer}.mlp.down"),
    Rule("bert.pooler.dense", "pooler"),
    Rule("cls.predictions.transform.dense", "head_dense"),
    Rule("cls.predictions.transform.LayerNorm", "head_norm"),
    Rule("cls.predictions", "head", kinds="bias"),
    Rule("cls.predictions.decoder", "head", kinds="weight"),  # where it is not the embedding
    Rule("cls.seq_relationship", "order_head"),
    Rule("classifier", "classifier"),
)
BERT = _make(
    architecture="BertForPreTraining",
    more_theirs=functools.partial(_more_theirs, "Bert"),
    always={"norm_after_residual": True},
    names=(
        *NAMES,
        Rule("bert.embeddings.LayerNorm", "embedding_norm"),
        Rule("bert.encoder.layer.{layer}.attention.output.LayerNorm", "layers.{layer}.attention_norm"),
        Rule("bert.encoder.layer.{layer}.output.LayerNorm", "layers.{layer}.mlp_norm"),
    ),
)
MEGATRON_BERT = _make(
    architecture="MegatronBertForPreTraining",
    more_theirs=functools.partial(_more_theirs, "MegatronBert"),
    names=(
        *NAMES,
        Rule("bert.encoder.layer.{layer}.attention.ln", "layers.{layer}.attention_norm"),
        Rule("bert.encoder.layer.{layer}.ln", "layers.{layer}.mlp_norm"),
        Rule("bert.encoder.ln", "final_norm"),
    ),
)
