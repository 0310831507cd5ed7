"""T5, T5 v1.1 (Flan's form) and mT5, each against Hugging Face's own: logits, losses, every gradient, with padding."""

import re

import pytest
import torch
import transformers
from torch import Tensor

from megalith.config.parameters import parameter_count, parameter_shapes
from megalith.config.sections.model import ModelConfig
from megalith.models.t5 import T5

VOCAB, WIDTH, HEADS, LAYERS, DECODER, SOURCE, TARGET = 89, 32, 4, 2, 3, 40, 19
PARTS = {
    "layer.0.SelfAttention": "attention", "layer.0.layer_norm": "attention_norm",
    "layer.1.EncDecAttention": "cross_attention",
    "layer.1.layer_norm": "cross_norm", "DenseReluDense.wi_0": "mlp.gate", "DenseReluDense.wi_1": "mlp.up",
    "DenseReluDense.wi": "mlp.up",
    "DenseReluDense.wo": "mlp.down",
}  # fmt: skip
TOPS = {
    "shared.weight": "embedding.weight", "lm_head.weight": "head.weight",
    "encoder.final_layer_norm.weight": "encoder_norm.weight", "decoder.final_layer_norm.weight": "final_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "encoder_bias.weight",
    "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "decoder_bias.weight",
}  # fmt: skip
FORM = {
    "model_type": "t5", "num_layers": LAYERS, "decoder_num_layers": DECODER, "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "kv_channels": 12, "ffn_hidden_size": 56, "vocab_size": VOCAB, "position_embedding_type": "relative",
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6, "add_bias_linear": False, "softmax_scale": 1.0, "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "loss_chunk_tokens": 13,
    "initializer_factor": 1.0,
}  # fmt: skip
THEIRS = {
    "vocab_size": VOCAB, "d_model": WIDTH, "d_kv": 12, "d_ff": 56, "num_layers": LAYERS, "num_decoder_layers": DECODER,
    "num_heads": HEADS, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
UNTIED = {"glu_activation": "geglu_tanh", "untie_embeddings_and_output_weights": True}
CASES = {
    "t5": ("T5", {"feed_forward_proj": "relu"}, {"relu": True, "scale_output": True}),
    "t5 v1.1": ("T5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, UNTIED),
    "mt5": ("MT5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, UNTIED),
}


def ours(name: str) -> str | None:
    """Megalith's name of one of their parameters; None for a copy of another."""
    if name in TOPS:
        return TOPS[name]
    match = re.fullmatch(r"(encoder|decoder)\.block\.(\d+)\.(.+)\.weight", name)
    if match is None:
        return None
    number, rest = int(match[2]) + LAYERS * (match[1] == "decoder"), match[3]
    mlp = "layer.2" if match[1] == "decoder" else "layer.1"
    rest = rest.replace(f"{mlp}.layer_norm", "mlp_norm").replace(f"{mlp}.Dense", "Dense")
    for theirs, mine in PARTS.items():
        rest = rest.replace(theirs, mine)
    return f"layers.{number}.{re.sub(r'attention.o$', 'attention.out', rest)}.weight"


def original(case: str) -> transformers.PreTrainedModel:
    """Theirs, with random weights, norms too."""
    kind, theirs, form = CASES[case]
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForConditionalGeneration")(
        getattr(transformers, f"{kind}Config")(**THEIRS, **theirs)
    ).eval()
    if form is UNTIED:  # the files of this form have two matrices
        made.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn(VOCAB, WIDTH))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1 or "relative" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def pair(case: str) -> tuple[transformers.PreTrainedModel, T5]:
    """Theirs, and ours with the same weights."""
    theirs, model = original(case), T5(ModelConfig(**{**FORM, **CASES[case][2]})).eval()
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            mine.pop(ours(name)).copy_(parameter)
    assert not mine
    return theirs, model


def batch() -> dict[str, Tensor]:
    """Ids, and padding at the end of each sequence but the first."""
    drawn = torch.Generator().manual_seed(1)
    source, target = (torch.randint(VOCAB, (3, length), generator=drawn) for length in (SOURCE, TARGET))
    padding = torch.arange(SOURCE) < torch.tensor([SOURCE, 31, 7])[:, None]
    ends = torch.arange(TARGET) < torch.tensor([TARGET, 8, 12])[:, None]
    return {"inputs": source, "decoder_input_ids": target, "padding_mask": padding, "decoder_padding_mask": ends}


@pytest.mark.parametrize("backend", ["auto", "explicit"])
@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_gradients_equal_the_original(case: str, backend: str) -> None:
    theirs, model = pair(case)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    given = batch()
    source, target, padding, ends = given.values()
    logits = theirs(
        input_ids=source, decoder_input_ids=target, attention_mask=padding.long(), decoder_attention_mask=ends.long()
    ).logits
    assert (model(**given) - logits)[ends].abs().max() < 1e-5
    # The decoder is causal: no token attends to the padding after it.
    assert (model(**{**given, "decoder_padding_mask": None}) - logits)[ends].abs().max() < 1e-5
    labels = torch.where(ends, target.roll(-1, dims=1), -100)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / ends.sum()
    losses = model(**given, labels=labels, loss_weights=ends / ends.sum())
    assert abs(losses.sum().item() - wanted.item()) < 1e-5
    wanted.backward()
    losses.sum().backward()
    gradients = {ours(name): parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in model.named_parameters():
        assert gradients[name].norm() > 1e-4, name
        assert (parameter.grad - gradients[name]).abs().max() < 1e-5 * max(1.0, float(gradients[name].norm())), name


@pytest.mark.parametrize("case", CASES)
def test_initial_weights_have_the_originals_spread(case: str) -> None:
    """Their factors by name: the standard deviation of what their constructor drew, within a tenth."""
    kind, theirs, form = CASES[case]
    torch.manual_seed(0)
    sizes = {"d_model": 96, "d_ff": 160, "d_kv": 48}
    config = getattr(transformers, f"{kind}Config")(**{**THEIRS, **theirs, **sizes})
    drawn = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    model = T5(ModelConfig(**{**FORM, **form, "hidden_size": 96, "ffn_hidden_size": 160, "kv_channels": 48}))
    for name, parameter in drawn.named_parameters():
        rule, value = model.initial(ours(name))
        if rule == "constant":
            assert torch.all(parameter == value), name
        elif parameter.numel() > 1000 and name != "lm_head.weight":
            assert value == pytest.approx(parameter.std().item(), rel=0.1), name


def test_t5_large_has_its_published_size() -> None:
    """By the values of its config.json, built on meta.

    They are: d_model 1024, d_ff 4096, 24 layers each, 16 heads of 64, relu, 32128 tokens.
    """
    large = ModelConfig(**{
        **FORM, **CASES["t5"][2], "num_layers": 24, "decoder_num_layers": None, "hidden_size": 1024,
        "num_attention_heads": 16,
        "kv_channels": 64, "ffn_hidden_size": 4096, "vocab_size": 32128, "relative_attention_num_buckets": 32,
    })  # fmt: skip
    with torch.device("meta"):
        model = T5(large)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(large) == 737_668_096
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == parameter_shapes(large)
