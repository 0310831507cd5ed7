"""BERT (Devlin et al., 2019) and Megatron's variant: transformers' BertForPreTraining and MegatronBertForPreTraining.

Without binary head the classes are called ForMaskedLM there; with a classification head, ForSequenceClassification and
ForMultipleChoice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from megalith.checkpoint.formats.huggingface.family import (
    MLP_ACTIVATIONS,
    USE_TIED,
    ConfigField,
    Family,
    Rule,
    TiedTo,
    activation_fields,
    activation_name,
)
from megalith.checkpoint.tensors.lazy import Index, Lazy, slices
from megalith.config.run import RunConfig
from megalith.config.sections.model import ModelConfig

# The head over the vocabulary has the same activation as the MLPs, and there only GELU is implemented.
GELU_ACTIVATIONS = {name: fields for name, fields in MLP_ACTIVATIONS.items() if "gelu" in name}


def _class_name(given: Mapping[str, Any]) -> str:
    """The class in transformers that a config.json names."""
    return (given.get("architectures") or ["BertForPreTraining"])[0]


# End of the class's name in transformers -> megalith's model_type.
CLASSIFIER_MODELS = {"ForSequenceClassification": "bert_classification", "ForMultipleChoice": "bert_multiple_choice"}


def _from_hf(given: Mapping[str, Any]) -> dict[str, Any]:
    kind = next((name for end, name in CLASSIFIER_MODELS.items() if _class_name(given).endswith(end)), "bert")
    classes = {"num_classes": len(given.get("id2label") or "01")} if kind == "bert_classification" else {}
    return {
        **activation_fields(GELU_ACTIVATIONS, given.get("hidden_act", "gelu")),
        "model_type": kind,
        "bert_no_binary_head": _class_name(given).endswith("MaskedLM"),
        "untie_embeddings_and_output_weights": not given.get("tie_word_embeddings", True),
        **classes,
        **({"classifier_dropout": given.get("classifier_dropout")} if kind != "bert" else {}),
    }


def _to_hf(prefix: str, config: RunConfig) -> dict[str, Any]:
    """prefix: of the class names in transformers, Bert or MegatronBert."""
    model, kind = config.model, config.model.model_type
    pretraining = "ForMaskedLM" if model.bert_no_binary_head else "ForPreTraining"
    end = next((end for end, name in CLASSIFIER_MODELS.items() if name == kind), pretraining)
    classes = model.num_classes if kind == "bert_classification" else 0
    labels = {number: f"LABEL_{number}" for number in range(classes)}
    return {
        "architectures": [prefix + end], "hidden_act": activation_name(GELU_ACTIVATIONS, model),
        "type_vocab_size": 2, "pad_token_id": 0, "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        **({"id2label": labels, "label2id": {label: number for number, label in labels.items()}} if labels else {}),
        **({"classifier_dropout": model.classifier_dropout} if kind != "bert" else {}),
    }  # fmt: skip


CLASSIFIERS = tuple(CLASSIFIER_MODELS)
CLASSES_WITH_HEAD = {
    "bert.pooler.": ("PreTraining", *CLASSIFIERS), "cls.predictions.": ("PreTraining", "MaskedLM"),
    "cls.seq_relationship.": ("PreTraining",), "classifier.": CLASSIFIERS,
}  # fmt: skip
POSITIONS, TYPES = "embeddings.position_embeddings.weight", "embeddings.token_type_embeddings.weight"


def _lacked_heads(given: Mapping[str, Any]) -> tuple[str, ...]:
    """The heads of megalith's models that BertModel, BertForMaskedLM, BertForSequenceClassification, ... lack."""
    return tuple(head for head, classes in CLASSES_WITH_HEAD.items() if not _class_name(given).endswith(classes))


def _binary_head_from_tensors(found: Mapping[str, Any]) -> dict[str, Any]:
    """A folder without a pooler is a model without binary head.

    One with a pooler has the binary head, even if its class is called MaskedLM, as bert-base-uncased's is.
    """
    return {"bert_no_binary_head": not any("pooler.dense" in name or "seq_relationship" in name for name in found)}


def _merge_segment_embedding(found: dict[str, Lazy], model: ModelConfig) -> tuple[dict[str, Lazy], tuple[str, ...]]:
    """For a model without binary head: the first segment's embedding is added to the positions' embeddings.

    Such a model has one segment, and no embedding of it.
    """
    prefix = "" if TYPES in found else "bert."
    if not model.bert_no_binary_head or not {prefix + POSITIONS, prefix + TYPES} <= found.keys():
        return found, ()
    positions, types = found[prefix + POSITIONS], found[prefix + TYPES]

    def read_sum(index: Index = ()) -> torch.Tensor:
        rows, columns = slices(positions.shape, index)
        return positions.part((rows, columns)) + types.part((slice(0, 1), columns))

    others = {name: lazy for name, lazy in found.items() if name != prefix + TYPES}
    note = (
        "no binary head in it: imported without, for one segment, whose embedding was added to those of the positions"
    )
    merged = Lazy(shape=positions.shape, dtype=positions.dtype, read=read_sum, box=read_sum)
    return {**others, prefix + POSITIONS: merged}, (note,)


def _zero_segment_embedding(model: ModelConfig) -> dict[str, Lazy]:
    """For the export of a model without binary head, which has no embedding of segments: one of zeros adds nothing."""
    shape = (2, model.hidden_size)
    return (
        {f"bert.{TYPES}": Lazy(shape=shape, dtype=torch.float32, read=lambda: torch.zeros(shape))}
        if model.bert_no_binary_head
        else {}
    )


_family = functools.partial(
    Family,
    model_types=("bert", *CLASSIFIER_MODELS.values()),
    prefix="bert.",
    config_fields=(
        ConfigField("num_hidden_layers", "num_layers"),
        ConfigField("hidden_size", "hidden_size"),
        ConfigField("num_attention_heads", "num_attention_heads"),
        ConfigField("intermediate_size", "ffn_hidden_size", 3072),
        ConfigField("max_position_embeddings", "max_position_embeddings", 512),
        ConfigField("vocab_size", "vocab_size"),
        ConfigField("layer_norm_eps", "layernorm_epsilon", 1e-12),
        ConfigField("hidden_dropout_prob", "hidden_dropout", 0.1),
        ConfigField("attention_probs_dropout_prob", "attention_dropout", 0.1),
        ConfigField("initializer_range", "init_method_std", 0.02),
    ),
    supported={
        "type_vocab_size": (2,), "position_embedding_type": ("absolute",), "is_decoder": (False,),
        "add_cross_attention": (False,),
    },
    more_from_hf=_from_hf,
    config_from_tensors=_binary_head_from_tensors,
    lacked_heads=_lacked_heads,
    adapt_tensors=_merge_segment_embedding,
    added_tensors=_zero_segment_embedding,
    tied={
        "cls.predictions.decoder.weight": TiedTo("bert.embeddings.word_embeddings.weight"),
        "cls.predictions.decoder.bias": TiedTo("cls.predictions.bias", USE_TIED),
    },
    merged={f"bert.{TYPES}": f"bert.{POSITIONS}"},
    ignored=(r"(bert\.)?embeddings\.position_ids",),
)  # fmt: skip
RULES = (
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
BERT = _family(
    architecture="BertForPreTraining",
    more_to_hf=functools.partial(_to_hf, "Bert"),
    constants={"norm_after_residual": True},
    rules=(
        *RULES,
        Rule("bert.embeddings.LayerNorm", "embedding_norm"),
        Rule("bert.encoder.layer.{layer}.attention.output.LayerNorm", "layers.{layer}.attention_norm"),
        Rule("bert.encoder.layer.{layer}.output.LayerNorm", "layers.{layer}.mlp_norm"),
    ),
)
MEGATRON_BERT = _family(
    architecture="MegatronBertForPreTraining",
    more_to_hf=functools.partial(_to_hf, "MegatronBert"),
    rules=(
        *RULES,
        Rule("bert.encoder.layer.{layer}.attention.ln", "layers.{layer}.attention_norm"),
        Rule("bert.encoder.layer.{layer}.ln", "layers.{layer}.mlp_norm"),
        Rule("bert.encoder.ln", "final_norm"),
    ),
)
