"""Random numbers by counter: their moments, and that slices of them are slices of the whole."""

import numpy as np
import pytest
import torch

from megalith.layers import random

COUNT = 1 << 18
INDEX = torch.arange(COUNT)


def test_keys_depend_on_every_word() -> None:
    assert random.key(1, "a") == random.key(1, "a")
    keys = {
        random.key(*words)
        for words in [(1, "a"), (2, "a"), (1, "b"), (1,), ("1a",), (1, "a", ""), (11, "a"), (1, "1a")]
    }
    assert len(keys) == 8
    assert all(-(2**63) <= k < 2**63 for k in keys)


def test_bits_equal_splitmix64() -> None:
    """The published reference: state += golden ratio, then two multiply-xorshift rounds."""
    with np.errstate(over="ignore"):
        state = np.arange(1000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(12345)
        z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    assert np.array_equal(random.bits(12345, torch.arange(1000)).numpy().view(np.uint64), z)


def test_mix32_equals_its_published_rounds() -> None:
    x = np.arange(-500, 500, dtype=np.int32)
    with np.errstate(over="ignore"):
        y = x.view(np.uint32).copy()
        y ^= y >> np.uint32(16)
        y *= np.uint32(0x7FEB352D)
        y ^= y >> np.uint32(15)
        y *= np.uint32(0x846CA68B)
        y ^= y >> np.uint32(16)
    assert np.array_equal(random.mix32(torch.from_numpy(x.copy())).numpy().view(np.uint32), y)


def test_uniform_moments() -> None:
    x = random.uniform(random.key("u"), INDEX)
    assert x.min() > 0.0 and x.max() < 1.0
    assert abs(x.mean() - 0.5) < 5 / (12 * COUNT) ** 0.5
    assert abs(x.var() - 1 / 12) < 0.001
    counts = torch.histc(x, 64, 0, 1)
    assert ((counts - COUNT / 64) ** 2 / (COUNT / 64)).sum() < 130  # chi squared, 63 degrees: 1 in 10^6 above


def test_uniform_never_reaches_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "bits", lambda key, index: torch.tensor([-1, 0]))
    assert random.uniform(0, INDEX[:2]).tolist() == [1 - 2.0**-53, 2.0**-53]


def test_uniform_float_is_an_element_of_uniform() -> None:
    keys = [random.key(number) for number in range(200)] + [-(2**63), -1, 0, 1, 2**63 - 1]
    index = [*range(200), 0, 1, 10**9, 2**40, 2**62]
    expected = random.uniform(torch.tensor(keys), torch.tensor(index)).tolist()
    assert [random.uniform_float(*each) for each in zip(keys, index)] == expected


def test_a_key_for_each_element() -> None:
    keys = torch.tensor([random.key("a"), random.key("b")])
    alone = [random.uniform(random.key(name), INDEX[i : i + 1]) for i, name in enumerate("ab")]
    assert torch.equal(random.uniform(keys, INDEX[:2]), torch.cat(alone))


def test_normal_moments() -> None:
    x = random.normal(random.key("n"), INDEX)
    assert abs(x.mean()) < 5 / COUNT**0.5
    assert abs(x.var() - 1) < 0.02
    assert abs((x**3).mean()) < 0.05 and abs((x**4).mean() - 3) < 0.1
    for limit, fraction in ((1.0, 0.6826895), (2.0, 0.9544997), (3.0, 0.9973002)):
        assert abs((x.abs() < limit).double().mean() - fraction) < 0.004
    assert abs((x[:-1] * x[1:]).mean()) < 0.01  # neighbours are independent


def test_parts_equal_the_whole_in_any_order() -> None:
    key = random.key(7, "w")
    whole = random.normal(key, INDEX)
    assert torch.equal(random.normal(key, INDEX[1000:2000]), whole[1000:2000])
    shuffled = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    assert torch.equal(random.normal(key, shuffled), whole[shuffled])
    assert torch.equal(random.normal(key, INDEX.view(512, -1)), whole.view(512, -1))
    assert not torch.equal(random.normal(random.key(8, "w"), INDEX[:100]), whole[:100])
