"""BERT in both forms against transformers' own: logits of both heads, both losses, every gradient, with padding."""

import pathlib

import pytest
import torch
import transformers

from megalith.checkpoint import formats
from megalith.checkpoint.formats.huggingface.conversion import parameter_rules
from megalith.checkpoint.formats.huggingface.family import FAMILIES
from megalith.runtime.build import build_model
from tests.originals.families import BERTS, bert

VOCAB, LENGTH = 97, 33


def fused() -> transformers.PreTrainedModel:
    """Megatron's fused bias-GELU kernel computes GELU by tanh; the head over the vocabulary has the exact one."""
    original = bert("MegatronBert", hidden_act="gelu_new")()
    original.cls.predictions.transform.transform_act_fn = torch.nn.GELU()
    return original


CASES = {name: (make, {}) for name, make in BERTS.items()}  # and what config.json cannot say
CASES["megatron-bert, fused GELU"] = (fused, {"openai_gelu": False, "bias_gelu_fusion": True})


@pytest.mark.parametrize("name", CASES)
def test_logits_losses_and_gradients_equal_the_original(name: str, tmp_path: pathlib.Path) -> None:
    """Random weights, norms and biases too, and a batch with padding."""
    make, form = CASES[name]
    torch.manual_seed(0)
    original = make().eval()
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    original.save_pretrained(tmp_path)
    weights = formats.read(tmp_path)
    model = build_model(weights.config.replace(loss_chunk_tokens=13, **form).model, torch.device("cpu"))
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in mine:
            mine[parameter].copy_(weights[f"model/{parameter}"])

    drawn = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(VOCAB, (2, 3, LENGTH), generator=drawn)
    types = (torch.arange(LENGTH) > torch.tensor([[9], [20], [5]])).long()
    padding = (torch.arange(LENGTH) < torch.tensor([[33], [28], [12]])).long()
    labels = torch.where((torch.rand(3, LENGTH, generator=drawn) < 0.3) & (padding > 0), labels, -1)
    order = torch.tensor([0, 1, 1])
    given = {"token_types": types, "padding_mask": padding}
    answers = {"labels": torch.where(labels < 0, -100, labels), "next_sentence_label": order}
    theirs = original(ids, token_type_ids=types, attention_mask=padding, **answers)
    tokens, orders = model(ids, **given)
    assert ((tokens - theirs.prediction_logits) * padding[..., None]).abs().max() < 1e-5
    assert (orders - theirs.seq_relationship_logits).abs().max() < 1e-5

    masked = (labels >= 0).float()
    factors = {"loss_weights": masked / masked.sum(), "order_weights": torch.full((3,), 1 / 3)}
    losses = model(ids, **given, labels=labels, sentence_order=order, **factors)
    total = losses[0].sum() + losses[1].sum()
    assert abs(total - theirs.loss) < 1e-5
    total.backward()
    theirs.loss.backward()
    family = FAMILIES.find(original.config.model_type)
    pairs = [(their, ours[0]) for _, their, ours in parameter_rules(family, model.config)]
    assert len(pairs) == len(mine) == len(list(original.parameters()))
    for their, our in pairs:
        gradient = original.get_parameter(their).grad
        # A key bias shifts all scores alike: its gradient is zero.
        assert gradient.norm() > 1e-4 or our.endswith("k.bias"), our
        assert (mine[our].grad - gradient).abs().max() < 1e-5, our
