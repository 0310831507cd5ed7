"""Kinds of parameters: how they start, whether they decay, what decides their sizes and their presence.

A table gives the kind of every parameter that a form of a model may have: {"layers.{layer}.mlp.up.weight": MLP_INPUT}.
Numbers in a parameter's name are written in its pattern as {layer} and, a second one, as {expert}. No torch.
"""

from __future__ import annotations

import dataclasses
import re

# The sizes of a parameter of no known kind.
EVERY_SIZE = ("hidden_size", "ffn_hidden_size", "vocab_size", "max_position_embeddings", "kv_channels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterKind:
    """A kind of parameter.

    initial: zeros, ones, norm (ones, or zeros where weights of norms are stored minus one), embedding (normal),
        matrix (normal, or Xavier's where the config asks for it),
        residual (a matrix that writes to the residual stream: a smaller normal),
        kaiming (uniform in +- 1 / sqrt(inputs), whatever the config).
    decays: whether weight decay applies. multiplies: whether each token is multiplied with it, for FLOPs.
    sizes: fields of the config that its sizes come from, the likeliest first.
    presence: fields that decide whether it is there.
    """

    name: str
    initial: str
    decays: bool = True
    multiplies: bool = False
    sizes: tuple[str, ...] = EVERY_SIZE
    presence: tuple[str, ...] = ()


Kinds = dict[str, ParameterKind]
# Low-rank adapters of linear layers, by the end of their names, whatever the model (config/adapters.py).
ADAPTERS: Kinds = {
    ".lora.a": ParameterKind(name="adapter A", initial="kaiming"),
    ".lora.b": ParameterKind(name="adapter B", initial="zeros"),
    ".lora.m": ParameterKind(name="magnitude", initial="ones", decays=False),  # of DoRA
}
WIDTH = ("hidden_size",)
KEYS = ("hidden_size", "num_query_groups", "kv_channels")
QUERIES = ("hidden_size", "num_attention_heads", "kv_channels")
INNER, VOCABULARY = ("hidden_size", "ffn_hidden_size"), ("vocab_size", "hidden_size")
NORM_TYPE = ("normalization",)  # what decides whether norms have biases
DECODER = ("model_type", "decoder_num_layers", "num_layers")  # what decides whether there is cross attention

NORM = ParameterKind(name="norm", initial="norm", decays=False, sizes=WIDTH)
HEAD_NORM = ParameterKind(name="head norm", initial="ones", decays=False, sizes=QUERIES, presence=("qk_layernorm",))
BIAS = ParameterKind(name="bias", initial="zeros", decays=False, presence=("add_bias_linear",))
EMBEDDING = ParameterKind(name="embedding", initial="embedding", sizes=VOCABULARY)
MATRIX = ParameterKind(name="matrix", initial="matrix", multiplies=True, sizes=WIDTH)
QUERY = dataclasses.replace(MATRIX, name="query", sizes=QUERIES)
KEY_VALUE = dataclasses.replace(MATRIX, name="key/value", sizes=KEYS)
ATTENTION_OUTPUT = dataclasses.replace(MATRIX, name="attention output", initial="residual", sizes=QUERIES)
MLP_INPUT = dataclasses.replace(MATRIX, name="mlp input", sizes=INNER)
MLP_GATE = dataclasses.replace(MLP_INPUT, presence=("swiglu", "glu_activation"))
MLP_OUTPUT = dataclasses.replace(MATRIX, name="mlp output", initial="residual", sizes=INNER)
UNTIED = ("untie_embeddings_and_output_weights",)
OUTPUT_LAYER = dataclasses.replace(MATRIX, name="output layer", sizes=VOCABULARY, presence=UNTIED)


def present_if(kind: ParameterKind, *presence: str) -> ParameterKind:
    """The same kind of a parameter whose presence these fields decide."""
    return dataclasses.replace(kind, presence=presence)


def norm_kinds(module: str, *presence: str, bias: tuple[str, ...] = ()) -> Kinds:
    """Weight and bias of a norm of the residual stream.

    presence: fields that decide whether the norm is there. bias: those that decide on the bias, where they are others.
    """
    biased = dataclasses.replace(BIAS, sizes=WIDTH, presence=bias or presence)
    return {f"{module}.weight": present_if(NORM, *presence), f"{module}.bias": biased}


def linear_kinds(module: str, weight: ParameterKind, *presence: str) -> Kinds:
    """Weight and bias of a linear layer. presence: what decides on the bias."""
    bias = dataclasses.replace(BIAS, sizes=weight.sizes, presence=presence or BIAS.presence)
    return {f"{module}.weight": weight, f"{module}.bias": bias}


def pattern_of(name: str) -> str:
    """layers.3.mlp.experts.7.up.weight -> layers.{layer}.mlp.experts.{expert}.up.weight."""
    words = iter(("{layer}", "{expert}"))
    return re.sub(r"\.\d+(?=\.)", lambda number: f".{next(words, number[0][1:])}", name)


LAYERS: Kinds = {
    **norm_kinds("layers.{layer}.attention_norm", bias=NORM_TYPE),
    **linear_kinds("layers.{layer}.attention.q", QUERY),
    **linear_kinds("layers.{layer}.attention.k", KEY_VALUE),
    **linear_kinds("layers.{layer}.attention.v", KEY_VALUE),
    "layers.{layer}.attention.q_norm.weight": HEAD_NORM,
    "layers.{layer}.attention.k_norm.weight": dataclasses.replace(HEAD_NORM, sizes=KEYS),
    **linear_kinds("layers.{layer}.attention.out", ATTENTION_OUTPUT),
    **norm_kinds("layers.{layer}.mlp_norm", "parallel_attn", "parallel_layernorm", bias=NORM_TYPE),
    **linear_kinds("layers.{layer}.mlp.gate", MLP_GATE, *MLP_GATE.presence),
    **linear_kinds("layers.{layer}.mlp.up", MLP_INPUT),
    **linear_kinds("layers.{layer}.mlp.down", MLP_OUTPUT),
}
EMBEDDINGS: Kinds = {
    "embedding.weight": EMBEDDING,
    "position_embedding.weight": dataclasses.replace(
        EMBEDDING, sizes=("max_position_embeddings", "hidden_size"), presence=("position_embedding_type",)
    ),
}
GPT: Kinds = {
    **EMBEDDINGS,
    **norm_kinds("embedding_norm", "embed_layernorm"),
    **LAYERS,
    **norm_kinds("final_norm", bias=NORM_TYPE),
    "head.weight": OUTPUT_LAYER,
}
POOLED = dataclasses.replace(MATRIX, multiplies=False)  # of what works on one token of a sequence
BERT_ENCODER: Kinds = {
    **EMBEDDINGS,
    "token_type_embedding.weight": dataclasses.replace(EMBEDDING, sizes=WIDTH, presence=("bert_no_binary_head",)),
    **norm_kinds("embedding_norm", "norm_after_residual"),
    **LAYERS,
    **norm_kinds("final_norm", "norm_after_residual", bias=NORM_TYPE),
    **linear_kinds("pooler", present_if(POOLED, "bert_no_binary_head"), "bert_no_binary_head"),
}
BERT: Kinds = {
    **BERT_ENCODER,
    **linear_kinds("head_dense", present_if(MATRIX, "model_type"), "model_type"),
    **norm_kinds("head_norm", "model_type"),
    **linear_kinds("head", OUTPUT_LAYER, "model_type"),
    **linear_kinds("order_head", present_if(POOLED, "bert_no_binary_head"), "bert_no_binary_head"),
}
PROJECTION = dataclasses.replace(
    POOLED, name="projection", sizes=("biencoder_projection_dim", "hidden_size"), presence=("biencoder_projection_dim",)
)


def tower_kinds(tower: str, *presence: str) -> Kinds:
    """Of a tower of a bi-encoder: a BERT without pooler, and a projection. presence: what decides on the tower."""
    found: Kinds = {}
    for name, kind in BERT_ENCODER.items():
        if not name.startswith("pooler."):
            found[tower_name(tower, name)] = kind
    found |= linear_kinds(f"{tower}_head.projection", PROJECTION, *PROJECTION.presence)
    return {name: present_if(kind, *kind.presence, *presence) for name, kind in found.items()}


def tower_name(tower: str, name: str) -> str:
    """The name of a BERT's parameter in a tower of a bi-encoder.

    layers.3.mlp.up.weight -> layers.3.query.mlp.up.weight, embedding.weight -> query_embeddings.embedding.weight,
    final_norm.weight -> query_head.final_norm.weight.
    """
    if name.startswith("layers."):
        layers, number, rest = name.split(".", 2)
        return f"{layers}.{number}.{tower}.{rest}"
    return f"{tower}_{'head' if name.startswith('final_norm.') else 'embeddings'}.{name}"


SHARED_TOWER = "biencoder_shared_query_context_model"
BIENCODER: Kinds = {**tower_kinds("query"), **tower_kinds("context", SHARED_TOWER)}
CLASSIFIER = dataclasses.replace(
    present_if(POOLED, "model_type"), name="classifier", sizes=("num_classes", "hidden_size")
)
BERT_CLASSIFIER: Kinds = {**BERT_ENCODER, **linear_kinds("classifier", CLASSIFIER, "model_type")}
RELATIVE = dataclasses.replace(
    MATRIX, name="relative bias", multiplies=False, sizes=("relative_attention_num_buckets", "num_attention_heads"),
    presence=("position_embedding_type",),
)  # fmt: skip


def cross_kinds(layer: str, *presence: str) -> Kinds:
    """Of a layer's cross attention, with its norm."""
    found = norm_kinds(f"{layer}.cross_norm", *presence)
    for name, kind in {"q": QUERY, "k": KEY_VALUE, "v": KEY_VALUE, "out": ATTENTION_OUTPUT}.items():
        found |= linear_kinds(f"{layer}.cross_attention.{name}", present_if(kind, *presence), *presence)
    return found


T5: Kinds = {
    **EMBEDDINGS,
    **LAYERS,
    **cross_kinds("layers.{layer}", *DECODER),
    "encoder_bias.weight": RELATIVE,
    "decoder_bias.weight": RELATIVE,
    **norm_kinds("encoder_norm", "model_type"),
    **norm_kinds("final_norm", bias=NORM_TYPE),
    **linear_kinds("head", OUTPUT_LAYER),
}
RETRIEVAL = ("model_type", "retro_layer_numbers", "retro_encoder_layers", "num_layers")
NEIGHBOR_LAYER = "layers.{layer}.encoder.layers.{expert}"  # the second number of a name is called {expert}
RETRO: Kinds = {
    **GPT,
    **cross_kinds("layers.{layer}", *RETRIEVAL),
    **{
        name.replace("layers.{layer}", NEIGHBOR_LAYER): present_if(kind, *kind.presence, *RETRIEVAL)
        for name, kind in (LAYERS | cross_kinds("layers.{layer}")).items()
    },
    **norm_kinds("layers.{layer}.encoder.norm", *RETRIEVAL),
}
