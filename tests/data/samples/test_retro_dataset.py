"""Retro's samples: those of the GPT dataset, and the tokens of each chunk's neighbours, read from the corpus itself."""

import numpy as np
import pytest

from megalith.common.errors import DataError
from megalith.data.build import build_datasets
from megalith.data.indexed import IndexedDataset
from megalith.data.retro import ChunkDatabase
from megalith.data.tokenizers.tokenizer import tokenizer_from_config
from tests.retro_workdir import CHUNK, drawn, tiny_retro, write_workdir
from tests.tiny import VOCABULARY, write_corpus


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retro")
    config = tiny_retro(write_corpus(str(folder / "tiny")), str(folder / "run"))
    return config.replace(retro_workdir=write_workdir(str(folder / "workdir"), config, drawn))


def datasets(config):
    return build_datasets(config, tokenizer_from_config(config.data, vocab_size=config.model.vocab_size))


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_neighbors_are_chunks_with_what_follows_them(run, chunks):
    config = run.replace(retro_num_retrieved_chunks=chunks)
    database, corpus = ChunkDatabase(f"{run.data.retro_workdir}/db"), IndexedDataset(run.data.data_path[0])
    gpt = datasets(config.replace(dataset="gpt"))
    missing = short = 0
    for split, dataset in datasets(config).items():
        for number in range(min(len(dataset), 12)):
            sample, plain = dataset[number], gpt[split][number]
            assert all(np.array_equal(sample[name], plain[name]) for name in plain)
            assert sample["neighbor_tokens"].shape == sample["neighbor_mask"].shape == (4, 2, chunks * CHUNK)
            expected = drawn(database, number)
            for u in range(4):
                for j in range(2):
                    tokens, mask = sample["neighbor_tokens"][u, j], sample["neighbor_mask"][u, j]
                    text = np.empty(0, np.int64)
                    if expected[u, j] >= 0:
                        _, document, start, _, _ = database.rows([expected[u, j]])[0]
                        text = corpus.get(document)[:-1][start : start + chunks * CHUNK]  # to its document's end
                    missing, short = missing + (not len(text)), short + (0 < len(text) < chunks * CHUNK)
                    assert tokens[: len(text)].tolist() == text.tolist()
                    assert (tokens[len(text) :] == VOCABULARY).all(), "filled up with the end of a document"
                    assert mask.tolist() == [1] * len(text) + [0] * (chunks * CHUNK - len(text))
    assert missing and short


def test_without_retrieval_every_neighbor_is_missing_and_no_folder_is_needed(run):
    for dataset in datasets(run.replace(retro_workdir=None, retro_no_retrieval=True)).values():
        assert not dataset[3]["neighbor_mask"].any() and dataset[3]["neighbor_tokens"].shape == (4, 2, 2 * CHUNK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retro_num_neighbors": 4}, "--retro-num-neighbors, for 4 chunks of a sample, must be at most 3"),
        ({"retro_gpt_chunk_length": 8}, "--retro-gpt-chunk-length must be 4, that of the database"),
        ({"seed": 5}, "must be built with one seed"),
        ({"seq_length": 8}, "must be built with one seq_length"),
        ({"retro_workdir": "/nowhere"}, "/nowhere/db/database.json must be there"),
    ],
)
def test_neighbors_of_another_run_are_refused(run, changes, message):
    with pytest.raises(DataError, match=message):
        datasets(run.replace(**changes))
