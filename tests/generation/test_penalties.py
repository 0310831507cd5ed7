"""Penalties, logit bias and banned tokens, against a token-by-token reference and against transformers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError, DataError
from megalith.generation.params import SamplingParams
from megalith.generation.penalties import apply_penalties, check_tokens
from megalith.generation.sampling import SamplingState, sample

V = 12
INFINITY = float("inf")
LOGITS = torch.tensor([2.0, -1.0, 0.0, 3.0, -1.5, 2.5, 0.5, 1.0, -INFINITY, -0.25, 4.0, 1.25])


def state(prompt: Sequence[int] = (), new: Sequence[int] = (), banned_after: Any = None, **options: Any):
    return SamplingState(
        params=SamplingParams(**options), key=0, prompt_ids=prompt, first_position=len(prompt), new_ids=list(new),
        banned_after=banned_after or {},
    )  # fmt: skip


def expected_logits(logits: list[float], of: SamplingState) -> list[float]:
    """What should become of a row, token by token."""
    p, made = of.params, []
    text = [*of.prompt_ids, *of.new_ids]
    for token, logit in enumerate(logits):
        logit += p.logit_bias.get(token, 0.0)
        if token in text:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        if token in of.new_ids:
            logit -= p.presence_penalty + p.frequency_penalty * of.new_ids.count(token)
        stopped_early = token in p.stop_token_ids and len(of.new_ids) < p.min_new_tokens
        if stopped_early or (text and token in of.banned_after.get(text[-1], ())):
            logit = -INFINITY
        made.append(logit)
    return made


TOKENS = st.lists(st.integers(0, V - 1), max_size=8)
STATES = st.builds(
    state,
    TOKENS,
    TOKENS,
    st.dictionaries(st.integers(0, V - 1), TOKENS, max_size=5),
    repetition_penalty=st.sampled_from((1.0, 1.3, 0.5)),
    presence_penalty=st.sampled_from((0.0, 0.7, -2.0)),
    frequency_penalty=st.sampled_from((0.0, 0.4, -0.3)),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.sampled_from((-INFINITY, -5.0, 0.5, 100.0)), max_size=4),
    min_new_tokens=st.sampled_from((0, 3)),
    stop_token_ids=st.sampled_from(((), (3,), (0, 11, 500, -7))),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(STATES, min_size=1, max_size=5), st.sampled_from((torch.float32, torch.bfloat16)))
def test_rows_equal_the_reference(states: list[SamplingState], dtype: torch.dtype) -> None:
    """Of any mixture of requests; the model's own logits stay as they are."""
    logits = torch.stack([LOGITS + row for row in range(len(states))]).to(dtype)
    before = logits.clone()
    found = apply_penalties(logits, states)
    assert torch.equal(logits, before)
    for row, each in enumerate(states):
        expected = torch.tensor(expected_logits(before[row].tolist(), each))
        torch.testing.assert_close(found[row].float(), expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(found[row].float(), apply_penalties(logits[row : row + 1], [each])[0].float())


def test_logits_without_penalties_are_not_copied() -> None:
    logits = torch.randn(2, V)
    plain = [state([1], [2]), state([1], [2], {3: [4]}, min_new_tokens=1, stop_token_ids=(5,), top_k=3)]
    assert apply_penalties(logits, plain) is logits
    mixed = apply_penalties(logits, [plain[0], state([1], [2], presence_penalty=1.0)])
    assert mixed is not logits and torch.equal(mixed[0], logits[0]) and not torch.equal(mixed[1], logits[1])


@pytest.mark.parametrize("penalty", [0.5, 1.7])
def test_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    prompt, new = [1, 3, 3, 9], [4, 3, 8]
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + new]), LOGITS[None].clone()
    )
    assert torch.equal(apply_penalties(LOGITS[None], [state(prompt, new, repetition_penalty=penalty)]), expected)
    assert not torch.equal(expected[0], LOGITS)


def test_logit_bias_is_that_of_transformers() -> None:
    bias = {0: -3.5, 4: 7.0, 10: -INFINITY}
    processor = transformers.SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = processor(torch.tensor([[1, 2]]), LOGITS[None].clone())
    assert torch.equal(apply_penalties(LOGITS[None], [state([1, 2], logit_bias=bias)]), expected)
    both = transformers.RepetitionPenaltyLogitsProcessor(2.0)(torch.tensor([[0, 4]]), expected)  # in that order
    assert torch.equal(apply_penalties(LOGITS[None], [state([0, 4], logit_bias=bias, repetition_penalty=2.0)]), both)


@pytest.mark.parametrize("count", [0, 2, 3, 4])
def test_min_new_tokens_are_those_of_transformers(count: int) -> None:
    prompt, new = [1, 2], [4] * count
    processor = transformers.MinNewTokensLengthLogitsProcessor(len(prompt), 3, [3, 5], device="cpu")
    expected = processor(torch.tensor([prompt + new]), LOGITS[None].clone())
    found = apply_penalties(LOGITS[None], [state(prompt, new, min_new_tokens=3, stop_token_ids=(3, 5))])
    assert torch.equal(found, expected)
    assert found[0].isinf().sum() == (3 if count < 3 else 1)


def test_presence_and_frequency_count_new_tokens_alone() -> None:
    logits = torch.zeros(1, V)
    found = apply_penalties(logits, [state([1, 2, 2], [2, 5, 5, 5], presence_penalty=0.5, frequency_penalty=0.25)])[0]
    assert found.tolist() == [0, 0, -0.75, 0, 0, -1.25, 0, 0, 0, 0, 0, 0]


def test_banned_after_looks_at_the_last_token() -> None:
    banned = {7: [10, 5], 10: [3]}
    for prompt, new, out in (
        ([7], [], {10, 5}),
        ([7], [1], set()),
        ([1], [7], {10, 5}),
        ([], [], set()),
        ([], [10], {3}),
    ):
        found = apply_penalties(LOGITS[None], [state(prompt, new, banned)])[0]
        assert {token for token in range(V) if found[token] == -INFINITY} - {8} == out
    greedy = [state([7], new, banned, temperature=0.0) for new in ([], [1])]
    assert sample(LOGITS.expand(2, -1), greedy).tolist() == [3, 10]


def test_tokens_are_checked_against_the_vocabulary() -> None:
    for params, banned_after, name in (
        (SamplingParams(logit_bias={V: 1.0}), {}, "--logit-bias"),
        (SamplingParams(logit_bias={-1: 1.0}), {}, "--logit-bias"),
        (SamplingParams(), {3: [1, V]}, "banned_after"),
    ):
        with pytest.raises(DataError, match=f"^{name} must name tokens among the 12 .*; found (12|-1)"):
            check_tokens(params, banned_after, V)
    check_tokens(SamplingParams(logit_bias={V - 1: 1.0}, stop_token_ids=(V, -1), min_new_tokens=1), {3: [V - 1]}, V)


def test_a_token_must_be_left() -> None:
    bans = dict.fromkeys(range(V - 2), -INFINITY)
    check_tokens(SamplingParams(logit_bias=bans, stop_token_ids=(V - 2, V - 1)), {1: [V - 1], 2: [V - 2]}, V)
    for params, banned_after, names in (
        (SamplingParams(logit_bias=dict.fromkeys(range(V), -INFINITY)), {}, "--logit-bias"),
        (
            SamplingParams(logit_bias=bans, stop_token_ids=(V - 2, V - 1), min_new_tokens=1),
            {},
            "--logit-bias and --min-new-tokens",
        ),
        (SamplingParams(logit_bias=bans), {1: [V - 1], 2: [V - 2, V - 1]}, "--logit-bias and banned_after"),
        (SamplingParams(), {1: range(V)}, "banned_after"),
    ):
        with pytest.raises(ConfigError, match=f"^{names} must leave a token that can be drawn; found none"):
            check_tokens(params, banned_after, V)
