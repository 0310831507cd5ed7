"""BERT samples: equal to megatron-core's class."""

import numpy as np
import pytest

from megalith.data.bert_dataset import BertDataset
from tests.data.word_pieces import WordPieces, original, write


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
