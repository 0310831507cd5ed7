"""BERT, T5 and ICT samples: equal to megatron-core's classes where it has them; the rest against the rules."""

import itertools
import types

import numpy as np
import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.config.run import RunConfig
from megalith.data.bert_dataset import BertDataset
from megalith.data.build import build_datasets
from megalith.data.ict_dataset import IctDataset
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.t5_dataset import T5Dataset


class WordPieces:
    """A vocabulary of 120 words, a third of them pieces that go on a word."""

    vocab_size, pad, cls, sep, mask, bos, eos, eod = 120, 0, 1, 2, 3, 4, 5, 5
    extra_ids = range(100, 120)
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
    theirs = object.__new__(getattr(pytest.importorskip(f"megatron.core.datasets.{module}"), kind))
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


@pytest.mark.parametrize("binary_head", [True, False])
def test_bert_equal_to_megatron_core(tmp_path, binary_head):
    mine = BertDataset(write(tmp_path / "x", 1), None, 60, seq_length=64, tokenizer=WordPieces(), seed=77, binary_head=binary_head)
    options = {"classification_head": binary_head, "masking_max_ngram": 3, "masking_use_geometric_distribution": False}
    theirs = original("bert_dataset", "BERTMaskedWordPieceDataset", mine, **options)
    assert len(mine) >= 60
    for index in range(len(mine)):
        expected, sample = theirs[index], mine[index]
        for key, name in (("text", "input_ids"), ("types", "token_types"), ("loss_mask", "loss_mask")):
            assert np.array_equal(sample[name], expected[key]), (index, name)
        # core takes a token for padding where the masking drew the id of [PAD]; Megatron of 2022 and ours do not
        assert np.array_equal(sample["padding_mask"], expected["padding_mask"] | (sample["loss_mask"] > 0))
        assert np.array_equal(sample["labels"][sample["loss_mask"] > 0], expected["labels"][expected["loss_mask"] > 0])
        assert (sample["labels"][sample["loss_mask"] == 0] == -1).all()
        assert binary_head == ("sentence_order" in sample) and sample.get("sentence_order", 0) == expected["is_random"]


def test_t5_equal_to_megatron_core(tmp_path):
    options = {"seq_length": 64, "decoder_seq_length": 40, "tokenizer": WordPieces()}
    mine = T5Dataset(write(tmp_path / "x", 2), None, 60, seed=5, **options)
    module = pytest.importorskip("megatron.core.datasets.t5_dataset")
    theirs = original("t5_dataset", "T5MaskedWordPieceDataset", mine, masking_max_ngram=10, masking_use_geometric_distribution=True)
    theirs.config.sequence_length_encoder, theirs.config.sequence_length_decoder = 64, 40
    theirs.config.tokenizer.additional_special_tokens_ids = list(WordPieces.extra_ids)
    assert module is not None
    for index in range(len(mine)):
        sample, first, last = mine[index], *map(int, mine.mapping[index][:2])
        text = np.concatenate(mine.sentences(first, last))[: int(mine.mapping[index][2])].tolist()
        random = np.random.RandomState(5 + index)
        _, _, _, _, spans = theirs._create_masked_lm_predictions(text, int(mine.mapping[index][2]), random)
        decoder, encoder, start = [], [], 0
        for sentinel, (places, labels) in zip(WordPieces.extra_ids, spans):
            decoder += [sentinel, *labels]
            encoder += [*text[start : places[0]], sentinel]
            start = places[-1] + 1
        encoder += text[start:]
        for name, expected, fill in (
            ("input_ids", encoder, 0),
            ("decoder_input_ids", [4, *decoder], 0),
            ("labels", [*decoder, 5], -1),
        ):
            assert sample[name].tolist() == expected + [fill] * (len(sample[name]) - len(expected))
        assert sample["loss_mask"].sum() == sample["decoder_padding_mask"].sum() == len(decoder) + 1
        assert sample["padding_mask"].sum() == len(encoder)


def test_t5_says_what_is_missing(tmp_path):
    data = write(tmp_path / "x", 2)
    none, few = WordPieces(), WordPieces()
    none.extra_ids, few.extra_ids = [], [100]
    with pytest.raises(ConfigError, match="--vocab-extra-ids"):
        T5Dataset(data, seq_length=64, decoder_seq_length=64, tokenizer=none)
    with pytest.raises(DataError, match="raise --vocab-extra-ids"):
        list(map(T5Dataset(data, None, 60, seq_length=64, decoder_seq_length=64, tokenizer=few).__getitem__, range(40)))
    with pytest.raises(ConfigError, match="--decoder-seq-length"):
        list(map(T5Dataset(data, None, 60, seq_length=64, decoder_seq_length=4, tokenizer=WordPieces()).__getitem__, range(40)))


@pytest.mark.parametrize("one_sentence", [True, False])
def test_ict_blocks(tmp_path, one_sentence):
    data = write(tmp_path / "x", 3)
    with IndexedWriter(tmp_path / "titles", np.uint16) as writer:
        writer.add_many(np.arange(30).repeat(2) + 6, np.full(30, 2))
    titles = IndexedDataset(tmp_path / "titles")
    options = {"seq_length": 32, "tokenizer": WordPieces(), "one_sentence": one_sentence, "query_in_block_prob": 0.5}
    dataset, kept = IctDataset(data, (5, 25), 50, titles=titles, **options), 0
    for index in range(len(dataset)):
        sample = dataset[index]
        first, last, document, _ = sample["block"].tolist()
        sentences = [sentence.tolist() for sentence in data[first:last]]
        query = sample["query_ids"][: sample["query_padding_mask"].sum()].tolist()
        context = sample["context_ids"][: sample["context_padding_mask"].sum()].tolist()
        assert data.document_indices[5 + document] <= first < last <= data.document_indices[6 + document]
        assert query[0] == 1 and query[-1] == 2 and query[1:-1] in [sentence[:30] for sentence in sentences]
        assert context[:4] == [1, 11 + document, 11 + document, 2] and context[-1] == 2
        chosen = [sentence[:30] for sentence in sentences].index(query[1:-1])
        whole = list(itertools.chain(*sentences))[:27]
        without = list(itertools.chain(*sentences[:chosen], *sentences[chosen + 1 :]))[:27]
        assert context[4:-1] in (whole, without)
        kept += context[4:-1] == whole
        assert all(np.array_equal(dataset[index][key], sample[key]) for key in sample)
    assert 0.2 < kept / len(dataset) < 0.9
    with pytest.raises(DataError, match="30 titles for the 29 documents"):
        IctDataset(write(tmp_path / "y", 3, 29), titles=titles, **options)


@pytest.mark.parametrize("name, keys", [("bert", "sentence_order"), ("t5", "decoder_input_ids"), ("ict", "query_ids")])
def test_from_a_config_through_the_cache(tmp_path, name, keys):
    data = write(tmp_path / "x", 4, 60)
    values = {"data_path": [data.prefix], "dataset": name, "seq_length": 64, "global_batch_size": 4, "train_iters": 10, "split": "8,1,1"}
    config = RunConfig().replace(data_cache_path=str(tmp_path / "cache"), eval_iters=1, **values)
    for _ in range(2):
        built = build_datasets(config, WordPieces())
        assert keys in built["train"][0] and len(built["train"]) >= 40 and len(list((tmp_path / "cache").iterdir())) == 3
    assert built["train"].mapping[:, 1].max() <= built["valid"].mapping[:, 0].min()
    weighted = build_datasets(config.replace(data_path=["1", data.prefix, "3", data.prefix]), WordPieces())["train"]
    assert len(weighted) == 40 and keys in weighted[39]
