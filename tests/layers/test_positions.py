"""Rotary embedding against complex numbers and against the published code's conventions; ALiBi's published slopes."""

import pytest
import torch
from torch import Tensor
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary
from transformers.models.t5.modeling_t5 import T5Attention

from megalith.layers.positions import alibi_slopes, distance_buckets, rotary_table, rotate

WIDTH, LENGTH = 16, 9
POSITIONS = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) * 7 + 3])


def by_complex_numbers(x: Tensor, positions: Tensor, base: float, width: int, interleaved: bool) -> Tensor:
    """Channel pair i of a token at position p, as a complex number, times exp(i p base^(-2i/width))."""
    out = x.double().clone()
    for i in range(width // 2):
        pair = (2 * i, 2 * i + 1) if interleaved else (i, i + width // 2)
        turn = torch.polar(torch.ones(()).double(), positions.double() * base ** (-2 * i / width))[:, None]
        z = torch.complex(x[..., pair[0]].double(), x[..., pair[1]].double()) * turn
        out[..., pair[0]], out[..., pair[1]] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("percent, width", [(1.0, 16), (0.5, 8), (0.4, 6)])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_equals_complex_multiplication(base: float, percent: float, width: int, interleaved: bool) -> None:
    x = torch.randn(2, 3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
    got = rotate(x, rotary_table(POSITIONS, WIDTH, base=base, percent=percent), interleaved)
    torch.testing.assert_close(
        got.double(), by_complex_numbers(x, POSITIONS, base, width, interleaved), rtol=1e-5, atol=2e-5
    )
    assert torch.equal(got[..., width:], x[..., width:])


def test_halves_equal_llama() -> None:
    x = torch.randn(2, 3, LENGTH, WIDTH)
    cos, sin = rotary_table(POSITIONS, WIDTH, base=10000.0)
    correct, _ = llama_rotary(x, x, torch.cat((cos, cos), -1)[:, 0], torch.cat((sin, sin), -1)[:, 0])
    torch.testing.assert_close(rotate(x, (cos, sin)), correct)


def test_interleaved_equals_gptj() -> None:
    x = torch.randn(2, 3, LENGTH, WIDTH)
    cos, sin = rotary_table(POSITIONS, WIDTH, base=10000.0)
    correct = gptj_rotary(x.transpose(1, 2), sin[:, 0], cos[:, 0]).transpose(1, 2)  # it wants [b, s, heads, d]
    torch.testing.assert_close(rotate(x, (cos, sin), interleaved=True), correct)


def test_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, WIDTH, dtype=torch.float64), torch.randn(1, 1, 1, WIDTH, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        turned = [rotate(x, rotary_table(torch.tensor([[p]]), WIDTH, base=10000.0)) for x, p in ((q, i), (k, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(5, 2) == pytest.approx(product(45, 42), abs=1e-5)
    assert product(5, 2) != pytest.approx(product(5, 3), abs=1e-5)


def test_half_precision_is_rotated_in_float32() -> None:
    x = torch.randn(1, 1, 1, WIDTH, dtype=torch.bfloat16)
    table = rotary_table(torch.tensor([[4001]]), WIDTH, base=10000.0)
    got = rotate(x, table)
    assert got.dtype == torch.bfloat16 and table[0].dtype == torch.float32
    assert torch.equal(got, rotate(x.float(), table).bfloat16())


def test_alibi_slopes_are_the_published_ones() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]  # section 3 of the paper
    assert alibi_slopes(16).tolist() == pytest.approx([2.0 ** (-i / 2) for i in range(1, 17)])
    # The paper's code for other counts: the slopes of the power of two below, then every second one of the power above.
    assert alibi_slopes(12).tolist() == pytest.approx(alibi_slopes(8).tolist() + alibi_slopes(16).tolist()[0:8:2])
    assert alibi_slopes(1).tolist() == [2.0**-8]


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 16, 20, 112])
def test_alibi_slopes_equal_bloom(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    correct = build_alibi_tensor(torch.ones(1, 3), heads, torch.float32).view(heads, 3)
    torch.testing.assert_close(alibi_slopes(heads), correct[:, 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("number", "farthest"), [(32, 128), (8, 20), (4, 3)])
def test_distance_buckets_are_the_originals(bidirectional: bool, number: int, farthest: int) -> None:
    distance = torch.arange(-299, 300)
    wanted = T5Attention._relative_position_bucket(distance, bidirectional, number, farthest)
    device = torch.device("cpu")
    found = distance_buckets(300, device, number=number, max_distance=farthest, bidirectional=bidirectional)
    assert torch.equal(found, wanted)
