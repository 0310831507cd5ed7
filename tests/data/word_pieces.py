"""A vocabulary and a corpus of sentences for tests of BERT, T5 and ICT, and megatron-core's class for comparison."""

import importlib
import types

import numpy as np

from megalith.data.indexed import IndexedDataset, IndexedWriter


class WordPieces:
    """A vocabulary of 120 words, a third of them pieces that continue a word."""

    vocab_size, pad, cls, sep, mask, bos, eos, eod = 120, 0, 1, 2, 3, 4, 5, 5
    decoder_start, extra_ids = bos, range(100, 120)
    inv_vocab = {i: ("##" if 6 <= i < 100 and i % 3 == 0 else "") + f"w{i}" for i in range(120)}  # noqa: RUF012
    vocab = additional_special_tokens_ids = None

    def tokens(self):
        return list(self.inv_vocab.values())

    def require(self, name):
        return getattr(self, name)


def write_sentences(prefix, seed, documents=30, longest=30):
    """Documents of 1 to 9 sentences."""
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            for _ in range(random.integers(1, 10)):
                writer.add_sequence(random.integers(6, 100, random.integers(1, longest)))
            writer.end_document()
    return IndexedDataset(prefix)


def megatron_dataset(module, kind, dataset, **config):
    """An instance of megatron-core's class over the same mapping, without its distributed set-up."""
    reference = object.__new__(getattr(importlib.import_module(f"megatron.core.datasets.{module}"), kind))
    settings = {
        "masking_probability": 0.15,
        "masking_do_full_word": True,
        "masking_do_permutation": False,
        "masking_use_longer_ngrams": False,
    }
    reference.config = types.SimpleNamespace(
        tokenizer=WordPieces(), random_seed=dataset.seed, sequence_length=dataset.seq_length, **settings, **config
    )
    reference.dataset, reference.sample_index, reference._pad_token_id = dataset.indexed, dataset.mapping, 0
    reference.token_lookup = list(WordPieces.inv_vocab)
    return reference
