"""Sampling: the distributions that are promised, drawn by counter."""

import pytest
import torch

from megalith.common.errors import ConfigError
from megalith.generation.sampling import SamplingParams, filtered_probs, row_keys, sample

CPU = torch.device("cpu")
DRAWS = 20000
LOGITS = torch.tensor([2.0, 1.0, 0.0, 3.0, -1.0, 2.5, float("-inf"), 1.0])


def sampled_frequencies(params: SamplingParams, nth: int = 0, logits: torch.Tensor = LOGITS) -> torch.Tensor:
    """The relative frequency of each token among many rows."""
    tokens = sample(
        logits.expand(DRAWS, -1), params, row_keys(3, list(range(DRAWS)), CPU), torch.full((DRAWS,), 7), nth
    )
    return torch.bincount(tokens, minlength=len(logits)).double() / DRAWS


def is_close_to(frequencies: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether frequencies are within five standard deviations of the expected ones."""
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    return bool(((frequencies - expected).abs() <= 5 * deviation).all())  # zero stays exactly zero


def test_temperature() -> None:
    for temperature in (0.5, 1.0, 3.0):
        expected = (LOGITS.double() / temperature).softmax(-1)
        assert is_close_to(sampled_frequencies(SamplingParams(temperature=temperature)), expected)
    assert sampled_frequencies(SamplingParams(temperature=1e-40))[3] == 1.0  # no overflow


@pytest.mark.parametrize(
    "greedy", [SamplingParams(temperature=0.0), SamplingParams(top_k=1), SamplingParams(top_k=1, temperature=100.0)]
)
def test_greedy_takes_the_first_of_the_largest(greedy: SamplingParams) -> None:
    assert sampled_frequencies(greedy)[3] == 1.0
    assert sampled_frequencies(greedy, logits=torch.tensor([0.0, 5.0, 1.0, 5.0, 5.0]))[1] == 1.0


def test_top_k() -> None:
    # 1 and 7 are tied for the fourth place
    for k, kept in (
        (2, [3, 5]),
        (3, [0, 3, 5]),
        (4, [0, 1, 3, 5, 7]),
        (100, [0, 1, 2, 3, 4, 5, 7]),
    ):
        expected = torch.zeros(8).double()
        expected[kept] = LOGITS[kept].double().softmax(-1)
        assert is_close_to(sampled_frequencies(SamplingParams(top_k=k)), expected)


def test_top_p_keeps_the_token_that_crosses() -> None:
    probs = torch.tensor([0.1, 0.4, 0.25, 0.2, 0.05])
    for p, kept in (
        (0.3, [1]),
        (0.45, [1, 2]),
        (0.7, [1, 2, 3]),
        (0.9, [0, 1, 2, 3]),
        (0.999, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ):
        expected = torch.zeros(5).double()
        expected[kept] = (probs[kept] / probs[kept].sum()).double()
        assert is_close_to(sampled_frequencies(SamplingParams(top_p=p), logits=probs.log()), expected), p


def test_top_p_after_top_k_and_temperature() -> None:
    probs = torch.tensor([0.1, 0.4, 0.25, 0.2, 0.05])
    expected = torch.tensor([0, 0.4, 0.25, 0, 0]).double() / 0.65
    # Of .85, .4 and .25 reach .7
    assert is_close_to(sampled_frequencies(SamplingParams(top_p=0.7, top_k=3), logits=probs.log()), expected)
    flat = SamplingParams(top_p=0.7, temperature=1000.0)
    assert (sampled_frequencies(flat, logits=probs.log()) > 0).sum() == 4


def test_ties_of_top_p_go_by_token_number() -> None:
    probs, order = filtered_probs(torch.zeros(1, 6), SamplingParams(top_p=0.4))
    assert order[0].tolist() == [0, 1, 2, 3, 4, 5] and (probs[0] > 0).tolist() == [True] * 3 + [False] * 3


def test_top_p_decays_to_its_bound() -> None:
    sampling = SamplingParams(top_p=0.9, top_p_decay=0.5, top_p_bound=0.3)
    assert [sampling.top_p_at(n) for n in range(4)] == pytest.approx([0.9, 0.45, 0.3, 0.3])
    assert SamplingParams(top_p=0.8, top_p_decay=0.5).top_p_at(3) == pytest.approx(0.1)
    assert SamplingParams(top_p=0.8).top_p_at(50) == 0.8
    probs = torch.tensor([0.1, 0.4, 0.25, 0.2, 0.05]).log()
    assert (sampled_frequencies(sampling, 0, probs) > 0).sum() == 4 and (
        sampled_frequencies(sampling, 2, probs) > 0
    ).sum() == 1


def test_top_p_that_has_decayed_to_nothing_is_not_off() -> None:
    params = SamplingParams(top_p=0.9, top_p_decay=0.1)
    for nth in (100, 400):  # a number, then 0.0
        assert sampled_frequencies(params, nth)[3] == 1.0


def test_a_draw_belongs_to_seed_row_and_place() -> None:
    logits, positions = torch.zeros(50, 1000), torch.arange(50)
    plain, rows = SamplingParams(), list(range(50))
    first = sample(logits, plain, row_keys(1, rows, CPU), positions)
    assert torch.equal(first, sample(logits, plain, row_keys(1, rows, CPU), positions))
    assert torch.equal(first[20:30], sample(logits[:10], plain, row_keys(1, rows[20:30], CPU), positions[20:30]))
    for other in (row_keys(2, rows, CPU), row_keys(1, [r + 50 for r in rows], CPU)):
        assert (first == sample(logits, plain, other, positions)).sum() < 5
    assert (first == sample(logits, plain, row_keys(1, rows, CPU), positions + 1)).sum() < 5


def test_bfloat16_logits_are_sampled_in_full_precision() -> None:
    assert is_close_to(sampled_frequencies(SamplingParams(), logits=LOGITS.bfloat16()), LOGITS.double().softmax(-1))


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
