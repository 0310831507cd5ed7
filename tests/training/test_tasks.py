"""What each task divides by, on batches made by hand."""

import pytest
import torch

from megalith.config.sections.model import ModelConfig
from megalith.models.bert import BERT
from megalith.runtime.initialize import initialize
from megalith.testing import parity
from megalith.training.tasks import TASKS, MaskedLanguageModelling
from tests.parity.cases import config_of


def test_losses_of_bert_are_means_over_masked_tokens_and_over_samples():
    batch = parity.batch(config_of("bert"))
    model = BERT(config_of("bert").model)
    initialize(model, 1)
    task = MaskedLanguageModelling()
    counts = task.counts(batch)
    assert counts["sop loss"] == 4 and counts["lm loss"] == batch["loss_mask"].sum() > 0
    found = task.losses(model(**task.inputs(batch, counts)), batch, counts)
    tokens, order = model(batch["input_ids"], token_types=batch["token_types"], padding_mask=batch["padding_mask"])
    lm = torch.nn.functional.cross_entropy(tokens.flatten(0, 1), batch["labels"].flatten(), ignore_index=-1)
    torch.testing.assert_close(
        found, {"lm loss": lm, "sop loss": torch.nn.functional.cross_entropy(order, batch["sentence_order"])}
    )


@pytest.mark.parametrize("form", ["bert", "bert classes"])
def test_samples_that_do_not_count(form):
    """The loss is that of a batch without them."""
    batch = parity.batch(config_of(form))
    config = config_of(form).replace(hidden_dropout=0.0, classifier_dropout=0.0).model
    model = config.architecture.find("model")(config)
    initialize(model, 1)
    task = TASKS.find(config_of(form).data.loss)()
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0])
    unused = (
        {"order_mask": mask, "loss_mask": batch["loss_mask"] * mask[:, None]} if form == "bert" else {"loss_mask": mask}
    )
    found = []
    for each in (batch | unused, {name: tensor[:3] for name, tensor in batch.items()}):
        counts = task.counts(each)
        output = model(**task.inputs(each, counts))
        found.append(task.losses(output, each, counts))
        accuracy = task.metrics(output, each)
    torch.testing.assert_close(*found)
    assert not accuracy or accuracy["accuracy"][1] == 3


@pytest.mark.parametrize("first", [0, 3])
def test_a_sample_counts_where_its_first_token_is(first):
    batch = parity.batch(config_of("bert")) | {"coordinates": torch.arange(first, first + 16)}
    assert MaskedLanguageModelling().counts(batch)["sop loss"] == (4 if first == 0 else 0)


def test_without_the_binary_head_there_is_one_loss():
    batch = parity.batch(config_of("bert no order"))
    task, model = MaskedLanguageModelling(), BERT(config_of("bert no order").model)
    counts = task.counts(batch)
    assert list(counts) == ["lm loss"] == list(task.losses(model(**task.inputs(batch, counts)), batch, counts))


def test_no_masked_token_is_a_loss_of_zero():
    batch = parity.batch(config_of("bert"))
    batch |= {"loss_mask": torch.zeros_like(batch["loss_mask"])}
    task, model = MaskedLanguageModelling(), BERT(ModelConfig(**vars(config_of("bert").model)))
    counts = task.counts(batch)
    assert task.losses(model(**task.inputs(batch, counts)), batch, counts)["lm loss"] == 0
