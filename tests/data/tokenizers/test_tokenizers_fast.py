"""Faster encoders: the same ids as the library's, and not used where they differ."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.data.tokenizers.vocabularies import TEXTS, bert, gpt2, needs_shared


@needs_shared
@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS, max_size=6))
@example(["\U000323b0's"])  # a letter since Unicode 17, which one library knows and the other does not
def test_fast_paths_equal_the_plain_ones(texts):
    for name, make in {"bert": bert, "gpt2": gpt2, "cased": lambda: bert("Case", "cased")}.items():
        if name not in CACHE:
            CACHE[name] = (make(), make())
            CACHE[name][1].accelerate([])
        plain, fast = CACHE[name]
        expected = [plain.encode(text) for text in texts]
        assert [row.tolist() for row in plain.encode_batch(texts)] == expected
        assert [row.tolist() for row in fast.encode_batch(texts)] == expected


CACHE: dict = {}


@needs_shared
def test_word_memory_when_full_with_few_slots_and_with_large_vocabularies(monkeypatch):
    from megalith.data.tokenizers import fast as tokenizers_fast

    tokenizer = bert()
    long = [
        "sixteen_letters_",
        "abcdefghijklmnop",
        "abcdefghijklmnopq",
        "abcdefghijklmnopqr",
        "abcdefgh",
        "abcdefghi",
        "x" * 300,
    ]
    texts = [
        "a few words, a few more (and more)",
        "",
        "new_words\0 here",
        "héllo " * 3,
        " ".join(long),
        "Abcdefgh\x1fi\x0bj",
        "",
    ]
    expected = [tokenizer.encode(text) for text in texts]
    for room, size, bits in ((0, 30524, 1), (2, 30524, 4), (10**6, 70000, 20)):
        monkeypatch.setattr(tokenizers_fast, "SLOT_BITS", bits)
        monkeypatch.setattr(tokenizers_fast, "MAX_CACHED_WORDS", room)
        memory = tokenizers_fast.WordCache(tokenizer.backend, True, size)
        for _ in range(3):
            ids, lengths = memory.encode_flat(texts)
            assert lengths.tolist() == [len(row) for row in expected]
            assert ids.tolist() == [i for row in expected for i in row]
        assert ids.dtype == (np.uint16 if size < 1 << 16 else np.int32)
        assert memory.encode_flat([])[1].size == 0


@needs_shared
def test_a_fast_path_that_disagrees_is_not_used(monkeypatch):
    import gigatoken

    other = gpt2()

    class Wrong:
        @staticmethod
        def from_json(text):
            return type("T", (), {"backend": type("B", (), {"encode": staticmethod(lambda text: np.array([1]))})})

    monkeypatch.setattr(gigatoken, "Tokenizer", Wrong)
    fast, line = other.accelerate(["Hello"])
    assert not fast and "other ids" in line
    assert other.encode_batch(["Hello world"])[0].tolist() == [15496, 995]
    lower = bert()
    monkeypatch.setattr("megalith.data.tokenizers.fast.WordCache._encode", lambda self, word: [1])
    fast, line = lower.accelerate(["Hello you"])
    assert not fast and "other ids" in line
    assert lower.encode("hello") == [7592]


@needs_shared
def test_without_gigatoken_the_plain_encoder_serves(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gigatoken", None)
    tokenizer = gpt2()
    fast, line = tokenizer.accelerate(["Hello"])
    assert not fast and "not usable" in line
    assert tokenizer.encode_batch(["Hello world"])[0].tolist() == [15496, 995]
