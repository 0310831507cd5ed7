"""A vocabulary and a corpus of sentences for the tests of BERT, T5 and ICT, and megatron-core's own class over the same mapping."""

import importlib
import types

import numpy as np

from megalith.data.indexed import IndexedDataset, IndexedWriter


class WordPieces:
    """A vocabulary of 120 words, a third of them pieces that go on a word."""

    vocab_size, pad, cls, sep, mask, bos, eos, eod = 120, 0, 1, 2, 3, 4, 5, 5
    decoder_start, extra_ids = bos, range(100, 120)
    inv_vocab = {i: ("##" if 6 <= i < 100 and i % 3 == 0 else "") + f"w{i}" for i in range(120)}  # noqa: RUF012
    vocab = additional_special_tokens_ids = None

    def tokens(self):
        return list(self.inv_vocab.values())

    def require(self, name):
        return getattr(self, name)


def write(prefix, seed, documents=30, longest=30):
    """Documents of 1 to 9 sentences."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            for _ in range(random.integers(1, 10)):
                writer.add_sequence(random.integers(6, 100, random.integers(1, longest)))
            writer.end_document()
    return IndexedDataset(prefix)


def original(module, kind, mine, **config):
    """An instance of megatron-core's class over the same mapping, without its distributed set-up."""
    theirs = object.__new__(getattr(importlib.import_module(f"megatron.core.datasets.{module}"), kind))
    settings = {
        "masking_probability": 0.15,
        "masking_do_full_word": True,
        "masking_do_permutation": False,
        "masking_use_longer_ngrams": False,
    }
    theirs.config = types.SimpleNamespace(
        tokenizer=WordPieces(), random_seed=mine.seed, sequence_length=mine.seq_length, **settings, **config
    )
    theirs.dataset, theirs.sample_index, theirs._pad_token_id = mine.indexed, mine.mapping, 0
    theirs.token_lookup = list(WordPieces.inv_vocab)
    return theirs
