"""Sampling: the distributions that are promised, drawn by counter."""

import pytest
import torch

from megalith.common.errors import ConfigError
from megalith.generation.sampling import SamplingParams, choose, filtered, row_keys

CPU = torch.device("cpu")
DRAWS = 20000
LOGITS = torch.tensor([2.0, 1.0, 0.0, 3.0, -1.0, 2.5, float("-inf"), 1.0])


def draw(params: SamplingParams, nth: int = 0, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """Shares of each token among many rows."""
    tokens = choose(
        logits.expand(DRAWS, -1), params, row_keys(3, list(range(DRAWS)), CPU), torch.full((DRAWS,), 7), nth
    )
    return torch.bincount(tokens, minlength=len(logits)).double() / DRAWS


def near(shares: torch.Tensor, expected: torch.Tensor) -> bool:
    spread = (expected * (1 - expected) / DRAWS).sqrt()
    return bool(((shares - expected).abs() <= 5 * spread).all())  # zero stays exactly zero


def test_temperature() -> None:
    for temperature in (0.5, 1.0, 3.0):
        assert near(draw(SamplingParams(temperature=temperature)), (LOGITS.double() / temperature).softmax(-1))
    assert draw(SamplingParams(temperature=1e-40))[3] == 1.0  # no overflow


@pytest.mark.parametrize(
    "greedy", [SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(top_k=1, temperature=100.0)]
)
def test_greedy_takes_the_first_of_the_largest(greedy: SamplingParams) -> None:
    assert draw(greedy)[3] == 1.0
    assert draw(greedy, logits=torch.tensor([0.0, 5.0, 1.0, 5.0, 5.0]))[1] == 1.0


def test_top_k() -> None:
    for k, kept in (
        (2, [3, 5]),
        (3, [0, 3, 5]),
        (4, [0, 1, 3, 5, 7]),
        (100, [0, 1, 2, 3, 4, 5, 7]),
    ):  # 1 and 7 are tied for the fourth place
        expected = torch.zeros(8).double()
        expected[kept] = LOGITS[kept].double().softmax(-1)
        assert near(draw(SamplingParams(top_k=k)), expected)


def test_top_p_keeps_the_token_that_crosses() -> None:
    chances = torch.tensor([0.1, 0.4, 0.25, 0.2, 0.05])
    for p, kept in (
        (0.3, [1]),
        (0.45, [1, 2]),
        (0.7, [1, 2, 3]),
        (0.9, [0, 1, 2, 3]),
        (0.999, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ):
        expected = torch.zeros(5).double()
        expected[kept] = (chances[kept] / chances[kept].sum()).double()
        assert near(draw(SamplingParams(top_p=p), logits=chances.log()), expected), p


def test_top_p_after_top_k_and_temperature() -> None:
    chances = torch.tensor([0.1, 0.4, 0.25, 0.2, 0.05])
    expected = torch.tensor([0, 0.4, 0.25, 0, 0]).double() / 0.65
    assert near(draw(SamplingParams(top_p=0.7, top_k=3), logits=chances.log()), expected)  # of .85, .4 and .25 reach .7
    flat = SamplingParams(top_p=0.7, temperature=1000.0)
    assert (draw(flat, logits=chances.log()) > 0).sum() == 4


def test_ties_of_top_p_go_by_token_number() -> None:
    chances, order = filtered(torch.zeros(1, 6), SamplingParams(top_p=0.4))
    assert order[0].tolist() == [0, 1, 2, 3, 4, 5] and (chances[0] > 0).tolist() == [True] * 3 + [False] * 3


def test_top_p_decays_to_its_bound() -> None:
    sampling = SamplingParams(top_p=0.9, top_p_decay=0.5, top_p_bound=0.3)
    assert [sampling.p_at(n) for n in range(4)] == pytest.approx([0.9, 0.45, 0.3, 0.3])
    assert SamplingParams(top_p=0.8, top_p_decay=0.5).p_at(3) == pytest.approx(0.1)
    assert SamplingParams(top_p=0.8).p_at(50) == 0.8
    chances = torch.tensor([0.1, 0.4, 0.25, 0.2, 0.05]).log()
    assert (draw(sampling, 0, chances) > 0).sum() == 4 and (draw(sampling, 2, chances) > 0).sum() == 1


def test_top_p_that_has_decayed_to_nothing_is_not_off() -> None:
    params = SamplingParams(top_p=0.9, top_p_decay=0.1)
    for nth in (100, 400):  # a number, then 0.0
        assert draw(params, nth)[3] == 1.0


def test_a_draw_belongs_to_seed_row_and_place() -> None:
    logits, places = torch.zeros(50, 1000), torch.arange(50)
    plain, rows = SamplingParams(), list(range(50))
    first = choose(logits, plain, row_keys(1, rows, CPU), places)
    assert torch.equal(first, choose(logits, plain, row_keys(1, rows, CPU), places))
    assert torch.equal(first[20:30], choose(logits[:10], plain, row_keys(1, rows[20:30], CPU), places[20:30]))
    for other in (row_keys(2, rows, CPU), row_keys(1, [r + 50 for r in rows], CPU)):
        assert (first == choose(logits, plain, other, places)).sum() < 5
    assert (first == choose(logits, plain, row_keys(1, rows, CPU), places + 1)).sum() < 5


def test_bfloat16_logits_are_sampled_in_full_precision() -> None:
    assert near(draw(SamplingParams(), logits=LOGITS.bfloat16()), LOGITS.double().softmax(-1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_k": -1},
        {"top_p": 1.5},
        {"top_p_decay": 2, "top_p": 0.5},
        {"top_p_bound": 0.6, "top_p": 0.5},
        {"max_new_tokens": 0},
    ],
)
def test_wrong_values_are_named(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="--" + next(iter(wrong)).replace("_", "-")):
        SamplingParams(**wrong)
