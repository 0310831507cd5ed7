"""BERT samples: equal to megatron-core's class."""

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.config.run import RunConfig
from megalith.data.build import build_datasets, source_usage
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.samples.bert_dataset import BertDataset
from megalith.data.tokenizers.tokenizer import build_tokenizer
from tests.data.word_pieces import WordPieces, megatron_dataset, write_sentences


@pytest.mark.parametrize("binary_head", [True, False])
def test_bert_equal_to_megatron_core(tmp_path, binary_head):
    dataset = BertDataset(
        write_sentences(tmp_path / "x", 1),
        None,
        60,
        seq_length=64,
        tokenizer=WordPieces(),
        seed=77,
        binary_head=binary_head,
    )
    options = {"classification_head": binary_head, "masking_max_ngram": 3, "masking_use_geometric_distribution": False}
    reference = megatron_dataset("bert_dataset", "BERTMaskedWordPieceDataset", dataset, **options)
    assert len(dataset) >= 60
    for index in range(len(dataset)):
        expected, sample = reference[index], dataset[index]
        for key, name in (("text", "input_ids"), ("types", "token_types"), ("loss_mask", "loss_mask")):
            assert np.array_equal(sample[name], expected[key]), (index, name)
        # core takes a token for padding where the masking drew the id of [PAD]; Megatron of 2022 and ours do not
        assert np.array_equal(sample["padding_mask"], expected["padding_mask"] | (sample["loss_mask"] > 0))
        assert np.array_equal(sample["labels"][sample["loss_mask"] > 0], expected["labels"][expected["loss_mask"] > 0])
        assert (sample["labels"][sample["loss_mask"] == 0] == -1).all()
        assert binary_head == ("sentence_order" in sample) and sample.get("sentence_order", 0) == expected["is_random"]


def test_whole_documents_are_refused_at_the_start(tmp_path):
    with IndexedWriter(tmp_path / "whole", np.uint16) as writer:
        writer.add_many(np.full(90, 7), np.full(30, 3))
    data = IndexedDataset(tmp_path / "whole")
    with pytest.raises(
        DataError,
        match=r"must be split .*found 30 sequences in 30 documents, one sequence each\. Preprocess with --split-",
    ):
        BertDataset(data, None, 10, seq_length=64, tokenizer=WordPieces())
    assert len(BertDataset(data, None, 10, seq_length=64, tokenizer=WordPieces(), binary_head=False)) >= 10


def test_through_a_config(tmp_path):
    """`--data-path`, splits and a blend; a tokenizer that cannot mask is refused."""
    one, two = write_sentences(tmp_path / "one", 1), write_sentences(tmp_path / "two", 2)
    config = RunConfig().replace(
        model_type="bert", dataset="bert", data_path=["0.3", one.prefix, "0.7", two.prefix], split="80,20,0",
        seq_length=64, micro_batch_size=2, global_batch_size=4, train_iters=50, eval_iters=1, eval_interval=50,
    )  # fmt: skip
    built = build_datasets(config, WordPieces())
    assert len(built["train"]) == 200 and len(built["valid"]) == 8 and built["test"] is None
    assert {row["prefix"]: row["samples"] for row in source_usage(built["train"])} == {one.prefix: 60, two.prefix: 140}
    assert set(built["train"][0]) == {
        "input_ids",
        "token_types",
        "padding_mask",
        "labels",
        "loss_mask",
        "sentence_order",
    }
    assert "sentence_order" not in build_datasets(config.replace(bert_no_binary_head=True), WordPieces())["train"][0]
    words = build_tokenizer("NullTokenizer", vocab_size=120)
    with pytest.raises(DataError, match="the vocabulary of NullTokenizer must have the cls token"):
        build_datasets(config, words)
