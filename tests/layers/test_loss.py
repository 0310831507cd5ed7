"""TokenLoss against plain cross entropy: values, gradients, and what happens when it is misused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalith.layers.loss import TokenLoss, chunk_logits

BATCH, SEQUENCE, HIDDEN, VOCAB = 2, 7, 5, 11


def inputs(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias that want gradients, and labels."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(BATCH, SEQUENCE, HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, (BATCH, SEQUENCE), generator=draw)
    labels[0, 2] = labels[1, 5] = -1
    return hidden, weight, bias, labels


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, z_loss: float) -> Tensor:
    """The same losses with all logits at once."""
    logits = F.linear(hidden, weight, bias)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="none").view(
        labels.shape
    )
    return losses + torch.where(labels >= 0, z_loss * logits.logsumexp(-1).square(), 0.0)


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 3, 7, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_plain_cross_entropy(weighted: bool, with_bias: bool, chunk: int, z_loss: float) -> None:
    hidden, weight, bias, labels = inputs()
    weights = torch.rand(BATCH, SEQUENCE, generator=torch.Generator().manual_seed(1))  # float32, as datasets give them
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    losses = TokenLoss(chunk, z_loss)(
        hidden, weight, labels, weights if weighted else None, bias if with_bias else None
    )
    expected = plain(hidden, weight, bias if with_bias else None, labels, z_loss) * (
        weights.double() if weighted else 1.0
    )
    assert losses.dtype == torch.float64
    assert (losses[labels < 0] == 0).all()
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(losses.sum() * 0.3, leaves)
    wanted = torch.autograd.grad(expected.sum() * 0.3, leaves)
    for actual, correct in zip(got, wanted):
        torch.testing.assert_close(actual, correct, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("labelled", [0, 1, 5, BATCH * SEQUENCE])
def test_few_labels_change_no_number(labelled: int) -> None:
    hidden, weight, bias, labels = inputs()
    order = torch.randperm(BATCH * SEQUENCE, generator=torch.Generator().manual_seed(2))
    labels = labels.clamp(min=0).flatten().index_fill(0, order[labelled:], -1).view(labels.shape)
    weights = torch.rand(BATCH, SEQUENCE, dtype=torch.float64)
    found, expected = (
        TokenLoss(3, 0.01, sparse_labels=few)(hidden, weight, labels, weights, bias) for few in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(
        *(torch.autograd.grad(each.sum() * 0.3, (hidden, weight, bias)) for each in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_free_form_passes_gradcheck(z_loss: float) -> None:
    hidden, weight, bias, labels = inputs()
    loss = TokenLoss(4, z_loss)
    assert torch.autograd.gradcheck(lambda h, w, b: loss(h, w, labels, None, b).square(), (hidden, weight, bias))


def test_weighted_gradients_become_nan_when_losses_are_used_otherwise() -> None:
    hidden, weight, _, labels = inputs()
    losses = TokenLoss()(hidden, weight, labels, torch.ones(BATCH, SEQUENCE))
    grads = torch.autograd.grad(losses.square().sum(), (hidden, weight))
    assert all(g.isnan().all() for g in grads)


def test_weighted_losses_allow_one_backward_pass() -> None:
    hidden, weight, _, labels = inputs()
    losses = TokenLoss()(hidden, weight, labels, torch.ones(BATCH, SEQUENCE)).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        losses.backward()


@pytest.mark.parametrize("weighted", [False, True])
def test_bfloat16_stays_near_float32(weighted: bool) -> None:
    hidden, weight, _, labels = inputs(torch.bfloat16)
    weights = torch.ones(BATCH, SEQUENCE) if weighted else None
    losses = TokenLoss(4)(hidden, weight, labels, weights)
    exact = plain(hidden.float(), weight.float(), None, labels, 0.0)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.02, atol=0.02)
    got = torch.autograd.grad(losses.sum(), (hidden, weight))
    wanted = torch.autograd.grad(exact.sum(), (hidden, weight))
    for actual, correct in zip(got, wanted):
        assert actual.dtype == torch.bfloat16
        assert (actual - correct).float().norm() < 0.02 * correct.float().norm()


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, _, labels = inputs()
    frozen = weight.detach()
    TokenLoss()(hidden, frozen, labels, torch.ones(BATCH, SEQUENCE)).sum().backward()
    assert hidden.grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not TokenLoss()(hidden, weight, labels, torch.ones(BATCH, SEQUENCE)).requires_grad


def test_large_logits_do_not_overflow() -> None:
    hidden = torch.full((1, 1, 1), 1e4, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    losses = TokenLoss()(hidden, weight, torch.tensor([[1]]), None)
    assert losses.item() == 2e4
    losses.sum().backward()
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()


def test_logits_of_a_chunk_are_float32() -> None:
    logits = chunk_logits(
        torch.ones(3, 4, dtype=torch.bfloat16),
        torch.ones(5, 4, dtype=torch.bfloat16),
        torch.ones(5, dtype=torch.bfloat16),
    )
    assert logits.dtype == torch.float32 and (logits == 5.0).all()
