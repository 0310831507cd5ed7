"""BERT with a classification and a multiple-choice head against transformers' own: logits, loss, every gradient,
with padding.
"""

import pathlib

import pytest
import torch
from torch import Tensor

from megalith.checkpoint import formats
from megalith.checkpoint.formats.huggingface.conversion import family_of, parameter_rules
from megalith.config.sections.model import ModelConfig
from megalith.runtime.build import build_model
from megalith.training.tasks_classification import Classification
from tests.originals.families import HEADED

TOLERANCE = 1e-5  # of norms; a key bias, whose gradient is zero, is judged against the norm of all


def batch(choices: tuple[int, ...], classes: int) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    length = torch.randint(9, 34, (3, *choices, 1), generator=drawn)
    return {
        # Not 0, the padding, whose embedding transformers gives no gradient.
        "input_ids": torch.randint(1, 97, (3, *choices, 33), generator=drawn),
        "padding_mask": (torch.arange(33) < length).long(),
        "token_types": (torch.arange(33) > length // 2).long(),
        "labels": torch.randint(classes, (3,), generator=drawn),
    }


@pytest.mark.parametrize("name", HEADED)
def test_logits_loss_and_gradients_equal_the_original(name: str, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    original = HEADED[name]().eval()
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    original.save_pretrained(tmp_path)
    weights = formats.read(tmp_path)
    model = build_model(weights.config.model, torch.device("cpu"))
    mine = dict(model.named_parameters())
    with torch.no_grad():
        for parameter in mine:
            mine[parameter].copy_(weights[f"model/{parameter}"])

    choice = weights.config.model.model_type == "bert_multiple_choice"
    given = batch((4,), 4) if choice else batch((), weights.config.model.num_classes)
    names = {"token_type_ids": "token_types", "attention_mask": "padding_mask", "labels": "labels"}
    theirs = original(given["input_ids"], **{their: given[our] for their, our in names.items()})
    task = Classification()
    counts = task.counts(given)
    arguments = task.inputs(given, counts)
    losses, logits = model(**arguments)
    del arguments["labels"], arguments["loss_weights"]
    for found in (logits, model(**arguments)):
        assert found.shape == theirs.logits.shape and (found - theirs.logits).abs().max() < 1e-5
    loss = task.losses((losses, logits), given, counts)["classification loss"]
    assert abs(loss - theirs.loss) < 1e-5
    loss.backward()
    theirs.loss.backward()
    _, family = family_of(original.config.to_dict(), tmp_path)
    pairs = [(their, ours[0]) for _, their, ours in parameter_rules(family, model.config)]
    assert len(pairs) == len(mine) == len(list(original.parameters()))
    total = torch.stack([parameter.grad.norm() for parameter in original.parameters()]).norm()
    for their, our in pairs:
        gradient = original.get_parameter(their).grad
        scale = gradient.norm() if gradient.norm() > 0.1 * TOLERANCE * total else total
        assert (mine[our].grad - gradient).norm() <= TOLERANCE * scale, our
        # These shift all scores, or all choices, alike.
        assert scale is not total or our.endswith("k.bias") or (choice and our == "classifier.bias"), our


def test_dropout_is_where_theirs_is() -> None:
    """Between the pooler and the classifier: with everything dropped the logits are the classifier's bias."""
    for name in ("bert classes", "bert choices"):
        original = HEADED[name]()
        assert [type(original.dropout), type(original.classifier)] == [torch.nn.Dropout, torch.nn.Linear]
    config = ModelConfig(
        model_type="bert_classification", num_layers=1, hidden_size=16, num_attention_heads=2,
        max_position_embeddings=16, vocab_size=97, classifier_dropout=0.999999,
    )  # fmt: skip
    model = build_model(config, torch.device("cpu"), seed=1).train()
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([1.0, 2.0]))
    ids, step, samples = torch.randint(97, (3, 9)), torch.tensor(0), torch.arange(3)
    assert torch.equal(model(ids, samples=samples, step=step), torch.tensor([[1.0, 2.0]] * 3))
    model.classifier_dropout.p = 0.0
    assert not torch.equal(model(ids, samples=samples, step=step), torch.tensor([[1.0, 2.0]] * 3))
