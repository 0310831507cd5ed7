"""What is wrong with a corpus is said before the first step (the rest of it is in test_build.py)."""

import warnings

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.config.sections.data import DataConfig
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.source_checks import check_source


class StubTokenizer:
    """As much of a tokenizer as the checks need."""

    vocab_size, eod = 10, 0


def write(prefix, sequences, dtype=np.int32):
    with IndexedWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add_sequence(sequence)
            writer.end_document()
    return IndexedDataset(prefix)


def test_a_sound_corpus_is_returned_as_it_is(tmp_path):
    data = write(tmp_path / "x", [[1, 2, 0], [], [3, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_source(data, StubTokenizer(), DataConfig(eod_mask_loss=True), True) is data
        assert check_source(data, None, DataConfig(), True) is data
        assert len(check_source(write(tmp_path / "empty", []), StubTokenizer(), DataConfig(), True)) == 0


@pytest.mark.parametrize("token", [10, -1])
def test_ids_outside_the_vocabulary(tmp_path, token):
    with pytest.raises(DataError, match=f"sequence 2 holds token {token}, but StubTokenizer has ids 0 to 9"):
        check_source(write(tmp_path / "x", [[1], [2], [3, token, 0]]), StubTokenizer(), DataConfig(), True)


def test_sentences_are_right_where_documents_are_asked_for(tmp_path):
    with IndexedWriter(tmp_path / "x") as writer:
        writer.add_many([1, 2, 3, 0], [1, 1, 1, 1], [4])
    data = IndexedDataset(tmp_path / "x")
    with pytest.warns(UserWarning, match="split into sentences"):
        check_source(data, StubTokenizer(), DataConfig(), True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_source(data, StubTokenizer(), DataConfig(), False)
