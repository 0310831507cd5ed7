"""The datasets over sentences, from a config through the cache; and a split without documents."""

import pytest

from megalith.common.errors import DataError
from megalith.config.run import RunConfig
from megalith.data.build import build_datasets
from megalith.data.samples.bert_dataset import BertDataset
from tests.data.word_pieces import WordPieces, write_sentences


@pytest.mark.parametrize("name, keys", [("bert", "sentence_order"), ("t5", "decoder_input_ids"), ("ict", "query_ids")])
def test_from_a_config_through_the_cache(tmp_path, name, keys):
    data = write_sentences(tmp_path / "x", 4, 60)
    values = {
        "data_path": [data.prefix],
        "dataset": name,
        "seq_length": 64,
        "global_batch_size": 4,
        "train_iters": 10,
        "split": "8,1,1",
    }
    config = RunConfig().replace(data_cache_path=str(tmp_path / "cache"), eval_iters=1, **values)
    for _ in range(2):
        built = build_datasets(config, WordPieces())
        assert (
            keys in built["train"][0] and len(built["train"]) >= 40 and len(list((tmp_path / "cache").iterdir())) == 3
        )
    assert built["train"].mapping[:, 1].max() <= built["valid"].mapping[:, 0].min()
    weighted = build_datasets(config.replace(data_path=["1", data.prefix, "3", data.prefix]), WordPieces())["train"]
    assert len(weighted) == 40 and keys in weighted[39]


def test_no_documents_are_named(tmp_path):
    with pytest.raises(DataError, match="nothing to sample from"):
        BertDataset(write_sentences(tmp_path / "x", 1), (3, 3), 5, seq_length=64, tokenizer=WordPieces())
