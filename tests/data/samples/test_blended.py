"""Blends of datasets: weights that change, corpora of several files, sources that never run out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.data.samples.blend import blend_index
from megalith.data.samples.blended import BlendedDataset, CorpusDataset, EndlessDataset


class Named:
    """A dataset whose samples are (name, number)."""

    def __init__(self, name, size=10):
        self.name, self.size, self.prepared = name, size, 0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        return self.name, index

    def prepare(self):
        self.prepared += 1


def test_endless_goes_on_with_a_fresh_shuffle():
    data = EndlessDataset(lambda repetition: Named(repetition, 4))
    assert [data[index] for index in (0, 3, 4, 11)] == [(0, 0), (0, 3), (1, 0), (2, 3)] and len(data) == 4
    data.prepare()
    assert data.first.prepared == 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.sampled_from([None, 3]))
@settings(max_examples=30, deadline=None)
def test_a_corpus_takes_every_sample_once_a_round(sizes, blend, seed):
    corpus = CorpusDataset([Named(name, 100) for name in range(len(sizes))], sizes, blend=blend, shuffle_seed=seed)
    for repetition in range(3):
        got = [corpus[index] for index in range(repetition * len(corpus), (repetition + 1) * len(corpus))]
        assert sorted(got) == [(name, repetition * size + k) for name, size in enumerate(sizes) for k in range(size)]
        if seed is None and not blend:
            assert got == sorted(got)


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(any),
    st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(0, 5), min_size=5, max_size=5).filter(lambda w: any(w[:2]))),
        max_size=3,
    ),
)
@settings(max_examples=40, deadline=None)
def test_changed_weights_lose_and_repeat_nothing(weights, changes):
    count, start, schedule = len(weights), 0, [(0, weights)]
    for gap, other in changes:
        start += gap
        schedule.append((start, other[:count]))
    size = start + 50
    sources = [EndlessDataset(lambda repetition, name=name: Named(name * 100 + repetition, 7)) for name in range(count)]
    blended = BlendedDataset(sources, schedule, size)
    pairs = [blended.locate(index) for index in range(size)]
    for source in range(count):
        numbers = [number for chosen, number in pairs if chosen == source]
        assert numbers == list(range(len(numbers))) and blended.samples_per_dataset[source] == len(numbers)
    for part, (begin, current) in enumerate(schedule):
        end = schedule[part + 1][0] if part + 1 < len(schedule) else size
        assert [source for source, _ in pairs[begin:end]] == blend_index(current, end - begin).sources.tolist()
    shorter = BlendedDataset(sources, schedule[:1], size)
    upto = schedule[1][0] if changes else size
    assert [shorter.locate(index) for index in range(upto)] == pairs[:upto]
    assert blended[0] == (pairs[0][0] * 100, 0)


def test_ends_and_preparing():
    sources = [Named(0), Named(1)]
    blended = BlendedDataset(sources, [(0, [1, 1]), (90, [1, 2])], 6)
    blended.prepare()
    assert (
        [source.prepared for source in sources] == [1, 1]
        and len(blended) == 6
        and np.array_equal(blended.samples_per_dataset, [3, 3])
    )
    with pytest.raises(IndexError, match="blend of 6"):
        blended[6]
