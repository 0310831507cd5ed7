"""Metrics of classification and regression: of sums over any split of the samples, against formulas and numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.config.run import RunConfig
from megalith.training.tasks_classification import Classification, Regression, matthews, pearson


def task_with(names, classes=2, kind=Classification):
    task = kind()
    task.metric_names, task.classes = names, classes
    task.metric_sizes = {"f1": 3, "matthews": classes**2, "pearson": 6}
    return task


def measured(task, outputs, labels, cuts, mask=None):
    """Metrics of all samples, added up over parts that end at `cuts`."""
    mask = torch.ones(len(labels)) if mask is None else mask
    sums = dict.fromkeys(task.metric_names, 0.0)
    for first, last in zip([0, *cuts], [*cuts, len(labels)]):
        batch = {"labels": labels[first:last], "loss_mask": mask[first:last], "input_ids": labels[first:last]}
        part = outputs[first:last]
        for name, each in task.metrics(part if isinstance(task, Regression) else (None, part), batch).items():
            sums[name] = sums[name] + torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in each])
    return task.metrics_of([number for each in sums.values() for number in each.tolist()])


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=20), st.integers(0, 20))
def test_two_classes(pairs, cut):
    labels, predicted = (torch.tensor(column) for column in zip(*pairs))
    task = task_with(("f1", "accuracy", "matthews"))
    found = measured(task, torch.nn.functional.one_hot(predicted, 2).float(), labels, [min(cut, len(pairs))])
    tp, fp, fn = (int(((labels == t) & (predicted == p)).sum()) for t, p in ((1, 1), (0, 1), (1, 0)))
    assert found["accuracy"] == pytest.approx(float((labels == predicted).float().mean()))
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    varied = len(set(labels.tolist())) == 2 and len(set(predicted.tolist())) == 2
    expected = np.corrcoef(labels, predicted)[0, 1] if varied else 0.0  # of two classes it is Pearson's
    assert found["matthews"] == pytest.approx(expected, abs=1e-9)


def test_matthews_of_three_classes_is_gorodkins():
    """Worked by hand: 5 of 8 right; c s - sum t p = 40 - (3 2 + 3 4 + 2 2) = 18; (64 - 24) (64 - 22)."""
    cells = [2, 1, 0, 0, 2, 1, 0, 1, 1]
    assert matthews(cells, 3) == pytest.approx(18 / (40 * 42) ** 0.5)


def test_pearson_of_any_split_and_without_padding():
    drawn = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(40, generator=drawn) for _ in range(2))
    labels, mask = 2.5 + 0.3 * x + 0.1 * noise, (torch.arange(40) < 37).float()
    task = task_with(("pearson",), kind=Regression)
    found = measured(task, x[:, None] + 100.0, labels, [7, 21], mask)["pearson"]
    assert found == pytest.approx(np.corrcoef(x[:37], labels[:37])[0, 1], abs=1e-5)
    assert np.isnan(pearson([3, 3, 3, 3, 3, 3]))


def test_the_loss_of_a_number_is_the_mean_squared_error():
    task, logits = Regression(), torch.tensor([[1.0], [2.0], [9.0]], requires_grad=True)
    batch = {
        "input_ids": torch.zeros(3, 4),
        "labels": torch.tensor([0.0, 4.0, 0.0]),
        "loss_mask": torch.tensor([1.0, 1.0, 0]),
    }
    counts = task.counts(batch)
    assert task.inputs(batch, counts).keys() == {"inputs"}
    loss = task.losses(logits, batch, counts)["regression loss"]
    assert loss.item() == pytest.approx((1 + 4) / 2)
    loss.backward()
    assert logits.grad.flatten().tolist() == pytest.approx([1.0, -2.0, 0.0])


def test_the_metrics_are_those_of_the_task():
    task = Classification()
    task.setup(RunConfig().replace(task="mrpc", dataset="classification"), None, None)
    assert task.metric_names == ("f1", "accuracy") and task.best_metric == "f1"
    plain = Classification()
    plain.setup(RunConfig(), None, None)
    assert plain.metric_names == ("accuracy",)
