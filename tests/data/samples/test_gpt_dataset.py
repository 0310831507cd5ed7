"""GPT samples: equal to megatron-core's files, index by index and sample by sample; boundaries by the written rule."""

import multiprocessing
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.samples import gpt_dataset
from megalith.data.samples.gpt_dataset import GPTDataset
from megalith.data.samples.splits import split_bounds

ORIGINAL = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "megatron"
needs_originals = pytest.mark.skipif(not ORIGINAL.is_dir(), reason="needs the Megatron files of ../shared/data")
REQUESTED = {"train": 5000, "valid": 200, "test": 20}


@needs_originals
@pytest.mark.parametrize("number, split", list(enumerate(REQUESTED)))
@pytest.mark.parametrize("reader", ["mmap", "pread"])
def test_equal_to_megatron_core(number, split, reader, tmp_path):
    data = IndexedDataset(ORIGINAL / "indexed" / "old22-gpt2bpe", reader=reader)
    bounds = split_bounds("900,80,20", len(data))[number]
    dataset = GPTDataset(
        data, bounds, REQUESTED[split], seq_length=64, seed=1234, eod=50256, cache_folders=[tmp_path]
    ).prepare()
    names = ("document_index", "sample_index", "shuffle_index")
    for name, index_array in zip(names, dataset._indices):
        theirs = np.load(next((ORIGINAL / "order").glob(f"*-{split}-{name}.npy")))
        assert np.array_equal(index_array.reshape(theirs.shape), theirs) and index_array.dtype == theirs.dtype
    samples = np.load(ORIGINAL / "order" / "samples16.npz")
    assert len(dataset) == samples[f"{split}_len"]
    for index in range(16):
        sample = dataset[index]
        for key, theirs in (
            ("input_ids", "tokens"),
            ("labels", "labels"),
            ("loss_mask", "loss_mask"),
            ("positions", "position_ids"),
        ):
            assert np.array_equal(sample[key], samples[f"{split}_{theirs}"][index])
            assert sample[key].dtype == (np.float32 if key == "loss_mask" else np.int64)


def write(prefix, documents):
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_many(np.concatenate(documents), [len(document) for document in documents])
    return IndexedDataset(prefix)


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=12), min_size=1, max_size=12).filter(any),
    st.integers(1, 20),
    st.integers(1, 30),
)
@settings(max_examples=60, deadline=None)
def test_samples_and_boundaries(tmp_path_factory, documents, seq_length, num_samples):
    """Tokens against concatenated documents; masks and positions against the rule, token by token; 0 ends one."""
    data = write(tmp_path_factory.mktemp("d") / "x", documents)
    options = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True, "eod": 0}
    dataset = GPTDataset(data, None, num_samples, seq_length=seq_length, **options).prepare()
    order, _, shuffle = dataset._indices
    stream = np.concatenate([data[number] for number in order])
    for index in range(len(dataset)):
        sample = dataset[index]
        begin = shuffle[index] * seq_length
        tokens = stream[begin : begin + seq_length + 1]
        assert np.array_equal(sample["input_ids"], tokens[:-1]) and np.array_equal(sample["labels"], tokens[1:])
        position = document = 0
        for place, token in enumerate(tokens[:-1]):
            assert (sample["positions"][place], sample["documents"][place]) == (position, document)
            assert sample["loss_mask"][place] == (token != 0)
            position, document = (0, document + 1) if token == 0 else (position + 1, document)


def test_flags_alone(tmp_path):
    data = write(tmp_path / "x", [[1, 2, 0, 3, 4, 0, 5]])
    plain = GPTDataset(data, None, 1, seq_length=6)[0]
    assert set(plain) == {"input_ids", "labels", "loss_mask", "positions"} and plain["loss_mask"].sum() == 6
    assert GPTDataset(data, None, 1, seq_length=6, eod=0, reset_position_ids=True)[0]["positions"].tolist() == [
        0,
        1,
        2,
        0,
        1,
        2,
    ]
    masked = GPTDataset(data, None, 1, seq_length=6, eod=0, reset_attention_mask=True)[0]
    assert masked["documents"].tolist() == [0, 0, 0, 1, 1, 1] and masked["positions"].tolist() == [0, 1, 2, 3, 4, 5]
    assert GPTDataset(data, None, 1, seq_length=6, eod=0, eod_mask_loss=True)[0]["loss_mask"].tolist() == [
        1,
        1,
        0,
        1,
        1,
        0,
    ]
    with pytest.raises(ConfigError, match="end-of-document"):
        GPTDataset(data, None, 1, seq_length=6, eod_mask_loss=True)
    with pytest.raises(IndexError, match="which has 1"):
        GPTDataset(data, None, 1, seq_length=6)[1]


def build_in_another_process(prefix, cache, results):
    dataset = GPTDataset(IndexedDataset(prefix), None, 300, seq_length=7, cache_folders=[cache])
    gpt_dataset.SMALL = 0
    results.put(b"".join(array.tobytes() for array in dataset.prepare()._indices))


def test_two_processes_build_one_result(tmp_path):
    data = write(tmp_path / "x", [[1] * (1 + number % 17) for number in range(300)])
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=build_in_another_process, args=(data.prefix, tmp_path / "cache", results))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    built = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    expected = GPTDataset(data, None, 300, seq_length=7).prepare()._indices
    assert set(built) == {b"".join(array.tobytes() for array in expected)}
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_cache_follows_the_content(tmp_path, monkeypatch):
    """The same path with other lengths, another seed or another split never reads the old indices."""
    monkeypatch.setattr(gpt_dataset, "SMALL", 0)
    cache = tmp_path / "cache"
    data = write(tmp_path / "x", [[1] * 5, [2] * 6, [3] * 7])
    GPTDataset(data, None, 4, seq_length=3, cache_folders=[cache]).prepare()
    assert len(list(cache.iterdir())) == 3
    GPTDataset(data, None, 4, seq_length=3, cache_folders=[cache]).prepare()
    assert len(list(cache.iterdir())) == 3
    GPTDataset(data, None, 4, seq_length=3, seed=2, cache_folders=[cache]).prepare()
    GPTDataset(data, (0, 2), 4, seq_length=3, cache_folders=[cache]).prepare()
    data = write(tmp_path / "x", [[1] * 6, [2] * 5, [3] * 7])
    changed = GPTDataset(data, None, 4, seq_length=3, cache_folders=[cache]).prepare()
    assert len(list(cache.iterdir())) == 12
    assert [set(map(int, changed.tokens(index))) <= {1, 2, 3} for index in range(len(changed))]
