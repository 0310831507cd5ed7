"""T5 samples: equal to what megatron-core masks, with sentinels as the rule has them."""

import numpy as np
import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.samples.t5_dataset import T5Dataset
from tests.data.word_pieces import WordPieces, megatron_dataset, write_sentences


def test_t5_equal_to_megatron_core(tmp_path):
    options = {"seq_length": 64, "decoder_seq_length": 40, "tokenizer": WordPieces()}
    dataset = T5Dataset(write_sentences(tmp_path / "x", 2), None, 60, seed=5, **options)
    reference = megatron_dataset(
        "t5_dataset", "T5MaskedWordPieceDataset", dataset, masking_max_ngram=10, masking_use_geometric_distribution=True
    )
    reference.config.sequence_length_encoder, reference.config.sequence_length_decoder = 64, 40
    reference.config.tokenizer.additional_special_tokens_ids = list(WordPieces.extra_ids)
    for index in range(len(dataset)):
        sample, first, last = dataset[index], *map(int, dataset.mapping[index][:2])
        text = np.concatenate(dataset.sentences(first, last))[: int(dataset.mapping[index][2])].tolist()
        random = np.random.RandomState(5 + index)
        _, _, _, _, spans = reference._create_masked_lm_predictions(text, int(dataset.mapping[index][2]), random)
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
    data = write_sentences(tmp_path / "x", 2)
    none, few = WordPieces(), WordPieces()
    none.extra_ids, few.extra_ids = [], [100]
    with pytest.raises(ConfigError, match="--vocab-extra-ids"):
        T5Dataset(data, seq_length=64, decoder_seq_length=64, tokenizer=none)
    with pytest.raises(DataError, match="raise --vocab-extra-ids"):
        list(map(T5Dataset(data, None, 60, seq_length=64, decoder_seq_length=64, tokenizer=few).__getitem__, range(40)))
    with pytest.raises(ConfigError, match="--decoder-seq-length"):
        list(
            map(
                T5Dataset(data, None, 60, seq_length=64, decoder_seq_length=4, tokenizer=WordPieces()).__getitem__,
                range(40),
            )
        )


def test_lengths_are_judged_before_the_first_sample(tmp_path):
    """A usual sample of 64 tokens has 9 masked ones and 3 sentinels; one with more is masked less; none stops a run."""
    data = write_sentences(tmp_path / "x", 2)
    with pytest.raises(
        ConfigError,
        match=r"of 62 tokens up to 9 are masked.* usually 13, at most 19; found 12\. Write 19, or at least 13",
    ):
        T5Dataset(data, seq_length=64, decoder_seq_length=12, tokenizer=WordPieces())
    whole = T5Dataset(data, None, 60, seq_length=64, decoder_seq_length=19, tokenizer=WordPieces())
    tight = T5Dataset(data, None, 60, seq_length=64, decoder_seq_length=13, tokenizer=WordPieces())
    three = WordPieces()
    three.extra_ids = WordPieces.extra_ids[:3]
    few = T5Dataset(data, None, 60, seq_length=64, decoder_seq_length=19, tokenizer=three)
    lengths = [
        [int(dataset[index]["loss_mask"].sum()) for index in range(len(whole))] for dataset in (whole, tight, few)
    ]
    assert max(lengths[0]) > 13 and max(lengths[1]) <= 13
    for shorter, dataset in ((lengths[1], tight), (lengths[2], few)):
        cut = [index for index, length in enumerate(shorter) if length < lengths[0][index]]
        assert 0 < len(cut) < len(whole) / 2
        for index in cut:
            sample, full = dataset[index], whole[index]
            assert sample["labels"].tolist()[: shorter[index] - 1] == full["labels"].tolist()[: shorter[index] - 1]
            assert sample["padding_mask"].sum() >= full["padding_mask"].sum()


def test_documents_that_are_not_split(tmp_path):
    with IndexedWriter(tmp_path / "whole", np.int32) as writer:
        for _ in range(3):
            writer.add_sequence(np.full(90, 7))
            writer.end_document()
    with pytest.raises(
        DataError,
        match=r"must be split into sentences.*found 3 documents, each one sequence of up to 90 tokens\. Preprocess",
    ):
        T5Dataset(
            IndexedDataset(tmp_path / "whole"), None, 6, seq_length=64, decoder_seq_length=40, tokenizer=WordPieces()
        )
