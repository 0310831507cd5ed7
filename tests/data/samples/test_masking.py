"""Masking: the draws stand for the calls that Megatron makes, and what is chosen keeps its limits."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.samples.masking import Masking


def test_a_list_is_shuffled_as_an_array():
    """Megatron shuffles lists of lists and calls choice with p; here numbers are shuffled and one number is drawn."""
    for seed in range(20):
        first, second = np.random.RandomState(seed), np.random.RandomState(seed)
        items, order = [[n] for n in range(seed + 1)], np.arange(seed + 1)
        first.shuffle(items)
        second.shuffle(order)
        assert [item[0] for item in items] == order.tolist()
        probs = 1.0 / np.arange(1, 4)
        probs /= probs.sum()
        steps = np.cumsum(probs)
        for _ in range(5):
            assert (
                first.choice(np.arange(1, 4), p=probs)
                == np.searchsorted(steps / steps[-1], second.random_sample(), "right") + 1
            )


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(0, 1000), st.booleans(), st.integers(5, 90))
@settings(max_examples=150, deadline=None)
def test_whole_words_within_the_limit(tokens, seed, geometric_lengths, target):
    is_continuation = np.array([False] * 6 + [True] * 4)  # 6 to 9 continue a word
    called = []
    masking = Masking(is_continuation, (0, 1), 0.15, 10 if geometric_lengths else 3, geometric_lengths)
    spans = masking.spans(np.array(tokens), target, np.random.RandomState(seed), called.append)
    positions = [position for span in spans for position in span]
    assert sorted(called) == positions and len(set(positions)) == len(positions)
    assert len(positions) <= min(0.15 * target, max(1, round(len(tokens) * 0.15)))
    assert not {tokens[position] for position in positions} & {0, 1}
    words, chosen = [], set(positions)
    for position, token in enumerate(tokens):
        if token > 1:
            if token >= 6 and words:
                words[-1].append(position)
            else:
                words.append([position])
    assert all(chosen.issuperset(word) or chosen.isdisjoint(word) for word in words)
