"""Words as numbers: those of a regular expression, whatever the texts; n-grams within texts."""

import re
import sys
import unicodedata

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.curation.words import WITH_WORDS, mix, ngram_hashes, split_words, within_texts

TEXTS = st.lists(
    st.text(alphabet=st.one_of(st.sampled_from("aB éÉ.猫は_1\n-\0İß"), st.characters()), max_size=20), max_size=8
)
HAN = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_any_texts(texts):
    words = split_words(texts)
    assert words.first[0] == 0 and words.first[-1] == len(words.hashes) and len(words.first) == len(texts) + 1
    known = {}
    for i, text in enumerate(texts):
        for place in range(words.first[i], words.first[i + 1]):
            word = text[words.starts[place] : words.ends[place]]
            assert word and not any(c.isspace() for c in word)
            lower = "".join(c.lower() if len(c.lower()) == 1 else c for c in word)
            assert known.setdefault(lower, words.hashes[place]) == words.hashes[place]
    assert len(set(known.values())) == len(known)


def test_words_are_runs_of_letters_or_single_characters():
    text = "It's 3.5 naïve_words: 吾輩は猫 and ünïcode!"
    words = split_words([text])
    found = [text[a:b] for a, b in zip(words.starts, words.ends)]
    assert found == re.findall(rf"[{HAN}]|[^\W{HAN}]+", text)


def test_no_letter_is_outside_of_the_code_points_that_are_looked_at():
    last = 0
    for planes in (*WITH_WORDS, range(sys.maxunicode + 1, sys.maxunicode + 2)):
        assert not any(unicodedata.category(chr(i))[0] in "LMN" for i in range(last, planes.start))
        last = planes.stop


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=6), st.integers(1, 5))
def test_ngrams(texts, size):
    words = split_words([" ".join(map(str, text)) for text in texts])
    inside = within_texts(words.first, size)
    hashes = ngram_hashes(words.hashes, size)[inside]
    expected = [tuple(text[i : i + size]) for text in texts for i in range(len(text) - size + 1)]
    assert len(hashes) == len(expected)
    assert len(set(hashes.tolist())) == len(set(expected)) == len(set(zip(expected, hashes.tolist())))


def test_mix_is_one_to_one_here():
    values = mix(np.arange(100_000, dtype=np.uint64))
    assert len(np.unique(values)) == 100_000 and abs(np.mean(values >> np.uint64(63)) - 0.5) < 0.01
