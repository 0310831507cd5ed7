"""Model FLOPs: the arithmetic that the mathematics asks for, whatever the hardware does beside it.

A multiplication and the addition after it count as two. Per token and forward pass that is

    2 x elements of the weight matrices        (every matrix of every layer, and the output layer; not the look-up)
    + 4 x layers x heads x head width x keys   (q k^T and weights x v, over the keys that a query is multiplied with)

and the backward pass costs twice the forward pass, one product for the gradient of each factor. Recomputed activations
are not counted: they are no part of the model (Chowdhery et al., 2022, PaLM, appendix B). Norms, biases, softmax and
activation functions are left out, as everywhere. For the shape of GPT-2 the sum is Megatron's
72 l h^2 (1 + s/6h + V/12lh) per token (Narayanan et al., 2021, arXiv 2104.04473, section 5.1, without its factor 4/3
for recompute).

Grouped queries make the matrices of k and v smaller and change nothing else: every query head is still multiplied with
every key. A gated MLP has three matrices instead of two.

There are two conventions for causal attention, and both are printed. Full: `keys` is the sequence length (PaLM,
Megatron). Half: it is half of that, because a fused causal kernel skips what the mask hides. Half gives the smaller,
stricter number. BERT's attention is not causal, so that both are the same. Its pooler works on one token of a sequence,
and is left out. With a sliding window the length of the window replaces the sequence's, and half leaves out what the
first tokens lack.

Of a bi-encoder the FLOPs of a query and all its contexts, hard negatives among them, are counted for each of the
query's tokens.

Of an encoder-decoder model the FLOPs of a sample (an encoder's and a decoder's sequence) are counted for each of the
encoder's tokens, because these are the tokens of a step. Only the decoder's self-attention is causal.

Of Retro the FLOPs for a text's neighbours (their encoder, and the attention to them) are counted for each of the text's
tokens.
"""

from __future__ import annotations

from megalith.config.parameters import matrix_parameters, sizes
from megalith.config.sections.model import ModelConfig
from megalith.config.stages import keys_seen


def flops_per_token(
    model: ModelConfig, seq_length: int, causal_half: bool = False, decoder_seq_length: int | None = None,
    contexts: int = 1,
) -> float:  # fmt: skip
    """FLOPs of forward and backward pass for each token of a sequence of `seq_length` tokens. Needs vocab_size.

    decoder_seq_length: of the decoder's sequence, where there is a decoder (default: as long). contexts: of a
    bi-encoder, those that each query comes with.
    """
    flops = model.architecture.find("flops")
    return flops(model, seq_length, causal_half, decoder_seq_length or seq_length, contexts)


def one_stack(
    model: ModelConfig, seq_length: int, causal_half: bool, decoder_seq_length: int, contexts: int
) -> float:  # fmt: skip
    """As flops_per_token, for a model of one stack."""
    layers, _, heads, _ = sizes(model)
    keys = sum(keys_seen(seq_length, model.window(layer), causal_half and model.causal) for layer in range(layers))
    attention = 4 * heads * model.head_dim * keys
    return 3 * (2 * matrix_parameters(model) + attention)


def two_towers(
    model: ModelConfig, seq_length: int, causal_half: bool, decoder_seq_length: int, contexts: int
) -> float:  # fmt: skip
    """As flops_per_token, for a bi-encoder: for each token of a query also one of each context, which is as long."""
    layers, _, heads, _ = sizes(model)
    tower = matrix_parameters(model) // (1 if model.biencoder_shared_query_context_model else 2)
    return 3 * (1 + contexts) * (2 * tower + 4 * layers * heads * model.head_dim * seq_length)


def all_layers(
    model: ModelConfig, seq_length: int, causal_half: bool, decoder_seq_length: int, contexts: int
) -> float:  # fmt: skip
    """As flops_per_token, for a model whose layers differ: what its `layer_costs` say, in sum."""
    costs = model.architecture.find("layer_costs")(model, seq_length, decoder_seq_length, causal_half, look_up=0.0)
    return 6 * sum(costs) / seq_length
