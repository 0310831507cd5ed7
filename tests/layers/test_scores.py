"""TokenScores equals cross entropy and argmax of whole logits, chunk by chunk, and skips what has no label."""

import pytest
import torch
import torch.nn.functional as F

from megalith.layers.loss import TokenLoss
from megalith.layers.scores import TokenScores


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_equal_to_whole_logits(chunk: int, bias: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 9, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64)
    added = torch.randn(11, dtype=torch.float64) if bias else None
    logits = F.linear(hidden, weight, added)
    labels = torch.randint(0, 11, (3, 9))
    labels[0, 2:5] = logits[0, 2:5].argmax(dim=-1)
    labels[1] = -1
    scores = TokenScores(TokenLoss(chunk, z_loss=1.0))(hidden, weight, labels, bias=added)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten().clamp(min=0), reduction="none").view(3, 9)
    assert torch.allclose(scores[..., 0], expected.where(labels >= 0, 0.0))
    assert torch.equal(scores[..., 1] == 1, (logits.argmax(dim=-1) == labels) & (labels >= 0))
    assert scores[0, 2:5, 1].all() and scores.dtype == torch.float64


def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    weight = torch.tensor([[0.0], [1.0], [1.0], [0.5]])
    scores = TokenScores(TokenLoss())(torch.ones(1, 4, 1), weight, torch.tensor([[0, 1, 2, 3]]))
    assert scores[0, :, 1].tolist() == [0, 1, 0, 0]


def test_nothing_to_score_and_numbers_that_are_none() -> None:
    hidden, weight = torch.ones(1, 2, 1, dtype=torch.float16), torch.ones(3, 1, dtype=torch.float16)
    scores = TokenScores(TokenLoss())
    assert torch.equal(scores(hidden, weight, torch.tensor([[-1, -1]])), torch.zeros(1, 2, 2))
    assert scores(hidden * float("nan"), weight, torch.tensor([[-1, 1]]))[0, :, 0].isnan().tolist() == [False, True]
