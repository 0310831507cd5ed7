"""Hash dropout: the right fraction, and the same mask on whichever rank and in whatever pieces."""

import pytest
import torch
from torch import Tensor

from megalith.layers.dropout import Dropout, row_keys

WIDTH, LENGTH = 256, 64
SAMPLES = torch.tensor([3, 900, 2**33 + 7, 12])


def keys(seed: int = 5, step: int = 17, samples: Tensor = SAMPLES, coordinates: Tensor | None = None) -> Tensor:
    return row_keys(seed, torch.tensor(step), samples, torch.arange(LENGTH) if coordinates is None else coordinates)


def kept(rows: Tensor, p: float = 0.3, site: str = "layers.0.mlp", first: int = 0, width: int = WIDTH) -> Tensor:
    """The mask, by dropping ones."""
    layer = Dropout(p, site)
    layer.first_column = first
    return layer(torch.ones(*rows.shape, width), rows) != 0


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    out = Dropout(p, "a")(torch.ones(4, LENGTH, WIDTH), keys())
    assert out.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    count = out.numel()
    assert abs((out == 0).float().mean().item() - p) < 5 * (p * (1 - p) / count) ** 0.5
    for axis in ((0, 1), (0, 2), (1, 2)):  # no row, column or sample is favoured
        fraction = (out == 0).float().mean(dim=axis)
        assert (fraction - p).abs().max() < 6 * (p * (1 - p) / (count / fraction.numel())) ** 0.5


def test_any_piece_equals_the_whole() -> None:
    whole = kept(keys())
    assert torch.equal(kept(keys(samples=SAMPLES[1:3])), whole[1:3])  # micro-batches
    assert torch.equal(kept(keys(coordinates=torch.arange(20, 40))), whole[:, 20:40])  # rows of a sequence shard
    zigzag = torch.tensor([5, 4, 63, 0])
    assert torch.equal(kept(keys(coordinates=zigzag)), whole[:, zigzag])  # context parallelism's order
    assert torch.equal(kept(keys(coordinates=torch.arange(LENGTH).expand(4, -1))), whole)  # coordinates per sample
    assert torch.equal(kept(keys(), first=100, width=50), whole[:, :, 100:150])  # columns of a tensor shard


def test_everything_in_the_key_matters() -> None:
    masks = [
        kept(keys(), p=0.5),
        kept(keys(seed=6), p=0.5),
        kept(keys(step=18), p=0.5),
        kept(keys(samples=SAMPLES + 1), p=0.5),
        kept(keys(), p=0.5, site="layers.1.mlp"),
        kept(keys(), p=0.5, site="layers.0.attention"),
        kept(keys(coordinates=torch.arange(LENGTH) + 1), p=0.5),
    ]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs((one == other).float().mean().item() - 0.5) < 0.01  # independent masks agree half the time
    mask = masks[0].float() - 0.5
    rows = mask.view(-1, WIDTH)
    # Neighbours
    assert (rows[:-1] * rows[1:]).mean().abs() < 0.003 and (mask[..., :-1] * mask[..., 1:]).mean().abs() < 0.003


def test_gradient_is_masked_and_scaled_alike() -> None:
    x = torch.randn(4, LENGTH, WIDTH, requires_grad=True)
    layer, rows = Dropout(0.3, "layers.0.mlp"), keys()
    layer(x, rows).sum().backward()
    torch.testing.assert_close(x.grad, kept(rows) / 0.7)


def test_nothing_is_dropped_without_rows_in_evaluation_or_at_rate_zero() -> None:
    x, layer = torch.randn(4, LENGTH, WIDTH), Dropout(0.3, "a")
    assert layer(x, None) is x
    assert Dropout(0.0, "a")(x, keys()) is x
    assert layer.eval()(x, keys()) is x


def test_keys_and_input_are_left_alone() -> None:
    """The mixer works in place; nothing that a caller holds may change."""
    samples, coordinates, step = (
        SAMPLES.int(),
        torch.arange(LENGTH, dtype=torch.int32),
        torch.tensor(17, dtype=torch.int32),
    )
    before = samples.clone(), coordinates.clone(), step.clone()
    rows = row_keys(5, step, samples, coordinates)
    copy, x = rows.clone(), torch.ones(4, LENGTH, WIDTH, dtype=torch.bfloat16)
    out = Dropout(0.5, "a")(x, rows)
    assert torch.equal(rows, copy) and (x == 1).all() and out.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(before, (samples, coordinates, step)))
