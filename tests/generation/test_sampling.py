"""Sampling: the distributions that are promised, drawn by counter, each row as if it were alone."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megalith.common.errors import CheckpointError, ConfigError
from megalith.generation import sampling
from megalith.generation.params import SamplingParams
from megalith.generation.sampling import SamplingState, logprobs_of, sample, top_logprobs_of
from megalith.layers import random

DRAWS = 20000
INFINITY = float("inf")
LOGITS = torch.tensor([2.0, 1.0, 0.0, 3.0, -1.0, 2.5, -INFINITY, 1.0])
PROBS = torch.tensor([0.1, 0.4, 0.25, 0.2, 0.05])
THIRTY = torch.randn(30, generator=torch.Generator().manual_seed(4)) * 1.5


def state(row: int = 0, position: int = 7, nth: int = 0, seed: int = 3, **options: Any) -> SamplingState:
    """The state of a request after `nth` new tokens."""
    params, key = SamplingParams(**options, max_new_tokens=1000), random.key(seed, "sample", row)
    return SamplingState(params=params, key=key, prompt_ids=[], first_position=position, new_ids=[0] * nth)


def draw(logits: torch.Tensor, count: int = DRAWS, **options: Any) -> torch.Tensor:
    """The tokens of so many requests with the same logits [V]."""
    return sample(logits.expand(count, -1), [state(row, **options) for row in range(count)])


def expected_probs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0, min_p: float = 0.0
) -> list[float]:
    """The distribution to draw from, token by token, in float64."""
    logits = logits.double()
    if top_k:
        kth = sorted(logits.tolist(), reverse=True)[:top_k][-1]
        logits = logits.masked_fill(logits < kth, -INFINITY)
    probs = ((logits - logits.max()) / temperature).softmax(-1).tolist()
    kept = [
        each if (not top_p or sum(p for p in probs if p > each) <= top_p) and each >= min_p * max(probs) else 0.0
        for each in probs
    ]
    return [each / sum(kept) for each in kept]


def is_drawn_from(tokens: torch.Tensor, probs: Sequence[float]) -> bool:
    """Pearson's chi-square test at a level of about 10^-6 (Wilson and Hilferty's approximation of its bound); tokens
    that are expected less than 5 times are counted together, those without probability never come.
    """
    expected = torch.tensor(probs).double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    if counts[expected == 0.0].any():
        return False
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    statistic = ((counts - expected) ** 2 / expected.clamp(min=1.0)).sum()
    freedom = max(len(expected) - 2, 1)
    return bool(statistic < freedom * (1 - 2 / (9 * freedom) + 4.9 * (2 / (9 * freedom)) ** 0.5) ** 3)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 7},
    {"top_k": 29, "temperature": 5.0},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.05, "temperature": 20.0},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.7},
    {"top_p": 0.95, "min_p": 0.15},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies(options: dict[str, Any]) -> None:
    """Of many requests at one position, and of one request at many."""
    probs = expected_probs(THIRTY, **options)
    assert is_drawn_from(draw(THIRTY, **options), probs)
    states = [state(position=position, **options) for position in range(DRAWS)]
    assert is_drawn_from(sample(THIRTY.expand(DRAWS, -1), states), probs)


def test_the_test_of_frequencies_sees_small_differences() -> None:
    tokens = draw(THIRTY, top_p=0.9)
    assert is_drawn_from(tokens, expected_probs(THIRTY, top_p=0.9))
    assert not is_drawn_from(tokens, expected_probs(THIRTY, top_p=0.85))
    assert not is_drawn_from(tokens, expected_probs(THIRTY, top_p=0.9, temperature=1.05))


def test_frequencies_over_many_blocks() -> None:
    """1000 tokens, with most of the mass in the first and the last of eight blocks."""
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    logits[100:950] -= 3.0
    for options in ({}, {"top_k": 200}, {"top_p": 0.8}, {"min_p": 0.02}, {"top_k": 300, "top_p": 0.9}):
        assert is_drawn_from(draw(logits, 8000, **options), expected_probs(logits, **options)), options


class Aimed(SamplingState):
    """A request whose first random number is its key."""

    def uniform(self, attempt: int = 0) -> float:
        return super().uniform(attempt) if attempt else self.key


def drawable(logits: torch.Tensor, **options: Any) -> list[bool]:
    """Whether each token is accepted when the random number aims at the middle of its share."""
    options.setdefault("temperature", 1.0)
    probs = torch.tensor(expected_probs(logits, **{**options, "top_p": 0.0})).double()
    middle = (probs.cumsum(0) - probs / 2).clamp(max=1 - 2.0**-53).tolist()
    states = [Aimed(params=SamplingParams(**options), key=u, prompt_ids=[], first_position=0) for u in middle]
    tokens = sample(logits.expand(len(logits), -1), states)
    return ((tokens == torch.arange(len(logits))) & (probs > 0)).tolist()


def kept_by_transformers(logits: torch.Tensor, **options: Any) -> list[bool]:
    warpers = {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }
    scores = logits.double()[None]
    for name, warper in warpers.items():
        if name in options:
            scores = warper(options[name])(None, scores)
    return scores[0].isfinite().tolist()


@pytest.mark.parametrize("vocab_size", [30, 128, 300, 1025])
def test_the_tokens_that_can_be_drawn_are_those_of_transformers(vocab_size: int) -> None:
    generator, seen = torch.Generator().manual_seed(vocab_size), set()
    for top_k, top_p, min_p, temperature in itertools.product((0, 3, 25), (0.0, 0.35, 0.9), (0.0, 0.08), (0.7, 1.5)):
        options = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
        options = {name: value for name, value in options.items() if value}
        logits = torch.rand(vocab_size, generator=generator) * 4.0  # at rarer tokens float32 cannot be aimed
        found = drawable(logits, **options)
        assert found == kept_by_transformers(logits, **options), options
        assert found == [p > 0 for p in expected_probs(logits, **options)], options
        seen.add(sum(found))
    assert len(seen) > 10


def test_temperature() -> None:
    assert (draw(LOGITS, 100, temperature=1e-30) == 3).all()  # no overflow
    assert is_drawn_from(draw(torch.tensor([1e3, 1e3, -1e3]), 5000, temperature=1e-36), [0.5, 0.5, 0.0])
    logits = torch.tensor([3000.0, 3000.0 - 2.0**-12])  # neighbours; quotients of them would be a whole number apart
    assert is_drawn_from(draw(logits, temperature=2.0**-12 / 1.4), [0.8022, 0.1978])
    for temperature in (1e-6, 1e-3, 100.0, 1e6):
        logits = torch.tensor([30.0, 30.0 - 2 * temperature, -80.0, -INFINITY])
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
            probs = expected_probs(logits, temperature, **options)
            assert is_drawn_from(draw(logits, 5000, temperature=temperature, **options), probs), (temperature, options)


def test_the_smallest_random_numbers_draw_no_forbidden_token() -> None:
    """Sums of blocks are rounded to float32, up or down."""
    logits = torch.randn(200, 300)
    logits[:, :10] = -INFINITY
    for options in ({}, {"top_k": 150}):
        states = [Aimed(params=SamplingParams(**options), key=2.0**-53, prompt_ids=[], first_position=0)] * 200
        assert (sample(logits, states) >= 10).all()
        states = [dataclasses.replace(states[0], key=1 - 2.0**-53)] * 200
        assert (sample(logits.flip(-1), states) < 290).all()


GREEDY = [{"temperature": 0.0}, {"temperature": 1e-40}, {"top_k": 1}, {"top_k": 1, "temperature": 100.0}]


@pytest.mark.parametrize("greedy", GREEDY, ids=str)
def test_greedy_takes_the_first_of_the_largest(greedy: dict[str, Any]) -> None:
    assert draw(LOGITS, 3, **greedy).tolist() == [3, 3, 3]
    assert draw(torch.tensor([0.0, 5.0, 1.0, 5.0, 5.0]), 3, **greedy).tolist() == [1, 1, 1]


def test_greedy_is_argmax_and_nothing_else() -> None:
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            used.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    used: list[str] = []
    with Operations():
        sample(torch.randn(3, 1000), [state(row, temperature=0.0) for row in range(3)])
    assert used[:2] == ["randn", "argmax"] and set(used[2:]) <= {"unsqueeze", "gather", "select", "slice"}


def test_tokens_tied_with_the_kth_are_kept_in_all_blocks() -> None:
    logits = torch.full((1000,), -9.0)
    logits[[5, 6, 130, 400, 401, 990]] = torch.tensor([9.0, 8.0, 8.0, 8.0, 7.0, 8.0])
    for k, kept in ((2, [5, 6, 130, 400, 990]), (5, [5, 6, 130, 400, 990]), (6, [5, 6, 130, 400, 401, 990])):
        assert [i for i, found in enumerate(drawable(logits, top_k=k, temperature=3.0)) if found] == kept
    # A second row with other ties, and a k of its own
    other = torch.zeros(1000)
    states = [state(row, top_k=2 + row % 2) for row in range(10000)]
    tokens = sample(torch.stack((logits, other)).repeat(5000, 1), states)
    assert is_drawn_from(tokens[0::2], expected_probs(logits, top_k=2)) and is_drawn_from(tokens[1::2], [0.001] * 1000)


def test_equally_likely_tokens_are_kept_together() -> None:
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])  # 0.13 and 0.32
    assert drawable(logits, top_p=0.1) == [False, True, False, True, False]
    assert drawable(logits, top_p=0.64) == [False, True, False, True, False]
    assert all(drawable(logits, top_p=0.67)) and all(drawable(logits, min_p=0.36))
    assert drawable(logits, min_p=0.37) == drawable(logits, min_p=1.0) == [False, True, False, True, False]
    assert is_drawn_from(draw(torch.zeros(6), top_p=0.4), [1 / 6] * 6)


@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 90, "top_p": 0.6}])
def test_bfloat16_logits_with_many_ties(options: dict[str, Any]) -> None:
    logits = (torch.randn(300, generator=torch.Generator().manual_seed(1)) * 2).bfloat16()
    assert logits.unique().numel() < 290
    assert is_drawn_from(draw(logits, **options), expected_probs(logits, **options))


def test_top_p_keeps_the_token_that_crosses() -> None:
    for p, kept in ((0.3, [1]), (0.45, [1, 2]), (0.7, [1, 2, 3]), (0.9, [0, 1, 2, 3]), (0.999, [0, 1, 2, 3, 4])):
        assert [i for i, found in enumerate(drawable(PROBS.log(), top_p=p)) if found] == kept
    assert is_drawn_from(draw(PROBS.log(), top_p=0.7, top_k=3), [0, 0.4 / 0.65, 0.25 / 0.65, 0, 0])  # of .85


def test_top_p_decays_to_its_bound() -> None:
    params = SamplingParams(top_p=0.9, top_p_decay=0.5, top_p_bound=0.3)
    assert [params.top_p_at(n) for n in range(4)] == pytest.approx([0.9, 0.45, 0.3, 0.3])
    assert SamplingParams(top_p=0.8, top_p_decay=0.5).top_p_at(3) == pytest.approx(0.1)
    assert SamplingParams(top_p=0.8).top_p_at(50) == 0.8 and SamplingParams(top_p_decay=0.5).top_p_at(50) == 1.0
    for nth, p in ((0, 0.9), (1, 0.45), (2, 0.3)):
        tokens = draw(PROBS.log(), nth=nth, top_p=0.9, top_p_decay=0.5, top_p_bound=0.3)
        assert is_drawn_from(tokens, expected_probs(PROBS.log(), top_p=p))


def test_top_p_that_has_decayed_to_nothing_is_not_off() -> None:
    for nth in (100, 400):  # a number, then 0.0
        assert (draw(LOGITS, 100, nth=nth, top_p=0.9, top_p_decay=0.1) == 3).all()


def test_a_draw_belongs_to_key_and_position() -> None:
    for options in ({}, {"top_k": 900}, {"top_p": 0.3}):
        first = sample(torch.zeros(50, 1000), [state(row, row, **options) for row in range(50)])
        for other in ({"seed": 2}, {"row": 50}, {"position": 1}):
            moved = [
                state(row + other.get("row", 0), row + other.get("position", 0), seed=other.get("seed", 3), **options)
                for row in range(50)
            ]
            assert (first == sample(torch.zeros(50, 1000), moved)).sum() < 5
    new_ids = [state(position=3, nth=4), state(position=7)]  # the same position
    assert len(set(sample(torch.zeros(2, 1000), new_ids).tolist())) == 1


def test_a_rejected_draw_is_followed_by_another_random_number() -> None:
    numbers = {state(row, nth=nth).uniform(attempt) for row in range(10) for nth in range(10) for attempt in range(10)}
    assert len(numbers) == 1000
    assert state(5, position=9, nth=2).uniform() == random.uniform(random.key(3, "sample", 5), torch.tensor(11))


ROW_OPTIONS = st.sampled_from(
    [
        *OPTIONS, *GREEDY, {"top_k": 2}, {"top_k": 200}, {"temperature": 1e-6}, {"top_p": 0.5, "top_p_decay": 0.1},
        {"logit_bias": {3: 4.0, 1: -INFINITY}}, {"top_k": 5, "presence_penalty": 2.0}, {"repetition_penalty": 3.0},
        {"temperature": 0.0, "frequency_penalty": 2.0}, {"min_new_tokens": 9, "stop_token_ids": (0, 2)},
    ]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from((5, 127, 128, 129, 300, 1000)),
    st.lists(ROW_OPTIONS, min_size=2, max_size=9),
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.integers(0, 2**32),
    st.randoms(use_true_random=False),
)
def test_a_row_is_the_same_alone_and_in_every_batch(vocab_size, row_options, dtype, seed, rng) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(row_options), vocab_size, generator=generator) * 2).to(dtype)
    logits = logits.where(torch.rand(logits.shape, generator=generator) < 0.9, torch.tensor(-INFINITY, dtype=dtype))
    logits[:, 4] = 1.0
    states = [state(row, nth=rng.randrange(5), **options) for row, options in enumerate(row_options)]
    alone = [int(sample(logits[row : row + 1], [each])) for row, each in enumerate(states)]
    before = logits.clone()
    for _ in range(3):
        rows = rng.sample(range(len(states)), rng.randint(1, len(states)))
        assert sample(logits[rows], [states[row] for row in rows]).tolist() == [alone[row] for row in rows]
    assert torch.equal(logits, before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("vocab_size", [50, 1000, 50257])
@pytest.mark.parametrize("kind", ["all", "top_k"])
def test_sums_do_not_depend_on_the_other_rows(kind: str, vocab_size: int, threads: int, monkeypatch) -> None:
    """To the last bit: all from which a row draws, and by which top-p judges. What only others keep adds zeros."""
    rows = [(1.0, 0.9, 0.01), (0.3, 0.5, 0.2), (2.0, 0.2, 0.001), (1.0, 0.7, 0.1), (0.7, 0.99, 0.3)]
    names = ("temperature", "top_p", "min_p", "top_k")
    if kind == "top_k":
        rows = [(*row, k) for row, k in zip(rows, (3, 49, 2, 30, 11))]
    states = [state(number, **dict(zip(names, row))) for number, row in enumerate(rows)]
    logits = (torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(1)) * 3).bfloat16().float()
    recorded: list[torch.Tensor] = []
    original = sampling._cumulative

    def record(weights: torch.Tensor) -> torch.Tensor:
        recorded.append(original(weights))
        return recorded[-1]

    def sums(logits: torch.Tensor, states: list[SamplingState]) -> list[list[list[float]]]:
        recorded.clear()
        sample(logits, states)
        filters = recorded[:3]  # top-k, then min-p, then what is likelier than the drawn token
        assert [len(each) for each in filters] == [len(states)] * 3
        return [[sorted({*each[row].tolist()} - {0.0}) for each in filters] for row in range(len(states))]

    monkeypatch.setattr(sampling, "_cumulative", record)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = sums(logits, states)
        assert [sums(logits[row : row + 1], states[row : row + 1])[0] for row in range(len(rows))] == together
        assert (len({len(row[0]) for row in together}) > 3) == (kind == "top_k")
    finally:
        torch.set_num_threads(before)


def test_settings_of_a_batch_are_sampled_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = sampling._inverse_cdf
    monkeypatch.setattr(sampling, "_inverse_cdf", lambda *given: calls.append(given) or original(*given))
    sample(torch.randn(4, 300), [state(row, temperature=1 + row, min_p=row / 10) for row in range(4)])
    assert len(calls) == 1
    sample(torch.randn(4, 300), [state(row, temperature=1 + row, top_k=2 + row) for row in range(4)])
    assert len(calls) == 2


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 5}, {"temperature": 0.0}, {"top_p": 0.9, "temperature": 2.0}], ids=str
)
def test_damaged_logits(options: dict[str, Any]) -> None:
    for wrong in (float("nan"), INFINITY):
        for places in ([500], range(1000)):
            logits = torch.randn(3, 1000)
            logits[1, list(places)] = wrong
            with pytest.raises(CheckpointError, match=r"logits are not numbers \(NaN"):
                sample(logits, [state(row, **options) for row in range(3)])
    with pytest.raises(CheckpointError, match="logits are not numbers"):
        sample(torch.full((1, 1000), -INFINITY), [state(**options)])
    with pytest.raises(ConfigError, match=r"--logit-bias must leave a token that can be drawn; found none"):
        sample(torch.randn(1, 10), [state(logit_bias=dict.fromkeys(range(10), -INFINITY), **options)])


def test_logprobs() -> None:
    logits = torch.randn(6, 300).bfloat16()
    tokens = torch.tensor([0, 5, 299, 7, 7, 1])
    expected = logits.double().log_softmax(-1)
    assert torch.allclose(logprobs_of(logits, tokens).double(), expected[range(6), tokens], atol=1e-5)
    for count in (1, 5, 200, 300, 1000):
        ids, values = top_logprobs_of(logits, count)
        order = [sorted(range(300), key=lambda i: (-row[i], i))[:count] for row in logits.tolist()]
        assert ids.tolist() == order and values.dtype == torch.float32
        assert all(torch.equal(values[:, i], logprobs_of(logits, ids[:, i])) for i in range(min(count, 300)))
    ids, _ = top_logprobs_of(torch.stack((torch.zeros(1000), torch.arange(1000.0))), 3)
    assert ids.tolist() == [[0, 1, 2], [999, 998, 997]]


WRONG: list[dict[str, Any]] = [
    {"temperature": -1}, {"temperature": INFINITY}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 1.5},
    {"top_p_decay": 2, "top_p": 0.5}, {"top_p_bound": 0.6, "top_p": 0.5}, {"min_p": -0.1}, {"min_p": 1.1},
    {"repetition_penalty": 0.0}, {"presence_penalty": 2.5}, {"frequency_penalty": -3}, {"logit_bias": {1: INFINITY}},
    {"logit_bias": {1: float("nan")}}, {"max_new_tokens": -1}, {"min_new_tokens": 65}, {"top_logprobs": -1},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_wrong_values_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^--{next(iter(wrong)).replace('_', '-')} must .*; found .*"):
        SamplingParams(**wrong)


def test_params_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_k = 5  # type: ignore[misc]
