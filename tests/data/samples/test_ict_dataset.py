"""ICT samples: query and block as the rule has them, the same at every reading."""

import itertools

import numpy as np
import pytest

from megalith.common.errors import ConfigError, DataError
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.samples.ict_dataset import IctDataset
from tests.data.word_pieces import WordPieces, write_sentences


@pytest.mark.parametrize("one_sentence", [True, False])
def test_ict_blocks(tmp_path, one_sentence):
    data = write_sentences(tmp_path / "x", 3)
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
        IctDataset(write_sentences(tmp_path / "y", 3, 29), titles=titles, **options)


def test_a_title_that_fills_a_sample_is_told_at_the_start(tmp_path):
    data = write_sentences(tmp_path / "x", 3)
    with IndexedWriter(tmp_path / "titles", np.uint16) as writer:
        writer.add_many(np.full(30 * 2 + 26, 7), np.array([2] * 17 + [28] + [2] * 12))
    titles = IndexedDataset(tmp_path / "titles")
    with pytest.raises(
        DataError,
        match=r"at most 27 tokens.*found a title of 28 tokens, of document 17\. Write --seq-length 32 or more",
    ):
        IctDataset(data, titles=titles, seq_length=31, tokenizer=WordPieces())
    dataset = IctDataset(data, titles=titles, seq_length=32, tokenizer=WordPieces())
    assert {len(dataset[index]["context_ids"]) for index in range(len(dataset))} == {32}
    with pytest.raises(ConfigError, match="at least 4 tokens"):
        IctDataset(data, seq_length=3, tokenizer=WordPieces())
