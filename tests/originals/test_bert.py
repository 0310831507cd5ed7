"""BERT in both forms against transformers' own: logits of both heads, both losses, every gradient, with padding."""

import re
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megalith.config.model import ModelConfig
from megalith.models.bert import BERT
from tests.originals.conftest import OURS, VOCAB

THEIRS: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
    "intermediate_size": 80, "initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
LENGTH = 33
NAMES = {  # their name -> ours
    "bert.embeddings.word_embeddings": "embedding",
    "bert.embeddings.position_embeddings": "position_embedding",
    "bert.embeddings.token_type_embeddings": "token_type_embedding",
    "bert.embeddings.LayerNorm": "embedding_norm",
    "bert.encoder.ln": "final_norm",
    "bert.pooler.dense": "pooler",
    "cls.predictions.transform.dense": "head_dense",
    "cls.predictions.transform.LayerNorm": "head_norm",
    "cls.predictions": "head",  # its bias
    "cls.seq_relationship": "order_head",
    "attention.self.query": "attention.q",
    "attention.self.key": "attention.k",
    "attention.self.value": "attention.v",
    "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
}
MEGATRON, GOOGLE = (
    {"attention.ln": "attention_norm", "ln": "mlp_norm"},
    {"attention.output.LayerNorm": "attention_norm", "output.LayerNorm": "mlp_norm"},
)
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any], dict[str, Any]]] = {  # kind, norms, their settings, ours
    "megatron": ("MegatronBert", MEGATRON, {}, {"layernorm_epsilon": 1e-12}),
    "megatron, tanh": ("MegatronBert", MEGATRON, {"hidden_act": "gelu_new"}, {"layernorm_epsilon": 1e-12, "openai_gelu": True}),
    "google": ("Bert", GOOGLE, {}, {"layernorm_epsilon": 1e-12, "norm_after_residual": True}),
}  # fmt: skip


def renamed(theirs: dict[str, Tensor], norms: dict[str, str]) -> dict[str, Tensor]:
    """Their parameters, or gradients, under our names."""
    made = {}
    for name, value in theirs.items():
        match = re.match(r"bert\.encoder\.layer\.(\d+)\.(.+)", name)
        layer, rest = (f"layers.{match[1]}.", match[2]) if match else ("", name)
        stem, kind = rest.rsplit(".", 1)
        made[f"{layer}{(NAMES | norms)[stem]}.{kind}"] = value
    return made


@pytest.mark.parametrize("case", CASES)
def test_logits_losses_and_gradients_equal_the_original(case: str) -> None:
    kind, norms, settings, form = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**THEIRS, **settings)
    original = getattr(transformers, f"{kind}ForPreTraining")(config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = BERT(ModelConfig(**{**OURS, "ffn_hidden_size": 80, **form}))
    made, mine = renamed(dict(original.named_parameters()), norms), dict(model.named_parameters())
    assert set(made) == set(mine), set(made) ^ set(mine)
    with torch.no_grad():
        for name, value in made.items():
            mine[name].copy_(value)

    drawn = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(VOCAB, (2, 3, LENGTH), generator=drawn)
    types = (torch.arange(LENGTH) > torch.tensor([[9], [20], [5]])).long()
    padding = (torch.arange(LENGTH) < torch.tensor([[33], [28], [12]])).long()
    labels = torch.where((torch.rand(3, LENGTH, generator=drawn) < 0.3) & (padding > 0), labels, -1)
    order = torch.tensor([0, 1, 1])
    given = {"token_types": types, "padding_mask": padding}
    theirs = original(
        ids, token_type_ids=types, attention_mask=padding, labels=torch.where(labels < 0, -100, labels), next_sentence_label=order
    )
    tokens, orders = model(ids, **given)
    assert ((tokens - theirs.prediction_logits) * padding[..., None]).abs().max() < 1e-5
    assert (orders - theirs.seq_relationship_logits).abs().max() < 1e-5

    masked = (labels >= 0).float()
    weights = {"loss_weights": masked / masked.sum(), "order_weights": torch.full((3,), 1 / 3)}
    losses = model(ids, **given, labels=labels, sentence_order=order, **weights)
    total = losses[0].sum() + losses[1].sum()
    assert abs(total - theirs.loss) < 1e-5
    total.backward()
    theirs.loss.backward()
    for name, gradient in renamed({name: parameter.grad for name, parameter in original.named_parameters()}, norms).items():
        assert gradient.norm() > 1e-4 or name.endswith("k.bias"), name  # a key bias shifts all scores alike: its gradient is zero
        assert (mine[name].grad - gradient).abs().max() < 1e-5, name
