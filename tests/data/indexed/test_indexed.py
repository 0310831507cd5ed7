"""Indexed datasets: equal to Megatron's files byte for byte, and every kind of damage is named."""

import pathlib
import pickle
import shutil
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data.indexed import IndexedDataset, IndexedWriter, best_dtype, open_many, resolve_prefix

ORIGINAL = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "megatron" / "indexed"
needs_originals = pytest.mark.skipif(not ORIGINAL.is_dir(), reason="needs the Megatron files of ../shared/data")


def write(prefix, documents, dtype=np.int32, **options):
    """Write documents (lists of sequences) one call at a time."""
    with IndexedWriter(prefix, dtype, **options) as writer:
        for document in documents:
            for sequence in document:
                writer.add_sequence(sequence)
            writer.end_document()
    return str(prefix)


@pytest.fixture
def small(tmp_path):
    """Three documents, four sequences, ten tokens."""
    return write(tmp_path / "small", [[[1, 2, 3], [4]], [], [[5, 6], [7, 8, 9, 10]]])


@needs_originals
def test_reads_what_megatron_wrote():
    expected = np.load(ORIGINAL / "expected_tokens.npz")
    for reader in ("mmap", "pread"):
        data = IndexedDataset(ORIGINAL / "old22-gpt2bpe", reader=reader)
        assert data.dtype == np.uint16 and len(data) == 120 and data.num_documents == 120 and data.num_tokens == 102014
        assert np.array_equal(data.lengths, expected["lengths"])
        assert np.array_equal(np.concatenate(data[:]), expected["flat"])


@needs_originals
def test_writes_the_bytes_megatron_wrote(tmp_path):
    expected = np.load(ORIGINAL / "expected_tokens.npz")
    with IndexedWriter(tmp_path / "bulk", best_dtype(50257)) as writer:
        writer.add_many(expected["flat"], expected["lengths"])
    write(
        tmp_path / "single",
        [[part] for part in np.split(expected["flat"], np.cumsum(expected["lengths"])[:-1])],
        np.uint16,
    )
    for name in ("bulk", "single"):
        for suffix in (".bin", ".idx"):
            assert (tmp_path / (name + suffix)).read_bytes() == (ORIGINAL / ("old22-gpt2bpe" + suffix)).read_bytes()


def test_layout_byte_by_byte(small):
    expected = (
        b"MMIDIDX\0\0"
        + struct.pack("<QBQQ", 1, 4, 4, 4)
        + struct.pack("<4i", 3, 1, 2, 4)
        + struct.pack("<4q", 0, 12, 16, 24)
    )
    expected += struct.pack("<4q", 0, 2, 2, 4)
    assert pathlib.Path(small + ".idx").read_bytes() == expected
    assert pathlib.Path(small + ".bin").read_bytes() == struct.pack("<10i", *range(1, 11))


@given(
    st.lists(st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=4), max_size=8),
    st.sampled_from([np.uint8, np.uint16, np.int16, np.int32, np.int64, np.float64]),
    st.sampled_from(["mmap", "pread"]),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory, documents, dtype, reader):
    folder = tmp_path_factory.mktemp("round")
    prefix = write(folder / "one", documents, dtype)
    flat = [token for document in documents for sequence in document for token in sequence]
    with IndexedWriter(folder / "bulk", dtype) as writer:
        writer.add_many(
            flat,
            [len(sequence) for document in documents for sequence in document],
            [len(document) for document in documents],
        )
    with IndexedWriter(folder / "merged", dtype) as writer:
        writer.add_index(prefix)
        writer.add_index(prefix)
    twice = write(folder / "twice", documents + documents, dtype)
    for suffix in (".bin", ".idx"):
        assert pathlib.Path(prefix + suffix).read_bytes() == (folder / ("bulk" + suffix)).read_bytes()
        assert pathlib.Path(twice + suffix).read_bytes() == (folder / ("merged" + suffix)).read_bytes()
    data = IndexedDataset(prefix, reader=reader)
    sequences = [sequence for document in documents for sequence in document]
    assert [list(sequence) for sequence in data[:]] == sequences and data.dtype == dtype and data.modes is None
    assert list(data.document_indices) == list(np.cumsum([0] + [len(document) for document in documents]))
    assert all(
        data.tokens_between(i, len(sequences)) == sum(map(len, sequences[i:])) for i in range(len(sequences) + 1)
    )


def test_reads_parts_and_the_end(small):
    data = pickle.loads(pickle.dumps(IndexedDataset(small)))
    assert list(data.get(3, 1, 2)) == [8, 9] and list(data[-1]) == [7, 8, 9, 10] and list(data.get(3, 3)) == [10]
    for arguments in ((4,), (-1,), (0, 2, 2), (0, -1), (0, 4)):
        with pytest.raises(IndexError):
            data.get(*arguments)
    with pytest.raises(ValueError, match="read-only"):
        data[0][0] = 1


def test_multimodal_is_seen_by_size(tmp_path):
    with IndexedWriter(tmp_path / "m", np.int32, multimodal=True) as writer:
        writer.add_sequence([1, 2], mode=1)
        writer.end_document()
        writer.add_many([3, 4, 5], [1, 2], modes=[0, 7])
    with IndexedWriter(tmp_path / "two", np.int32, multimodal=True) as writer:
        writer.add_index(tmp_path / "m")
        writer.add_index(tmp_path / "m")
    assert list(IndexedDataset(tmp_path / "m").modes) == [1, 0, 7]
    assert list(IndexedDataset(tmp_path / "two").modes) == [1, 0, 7, 1, 0, 7]
    with pytest.raises(DataError, match="truncated or damaged"):
        IndexedDataset(tmp_path / "m", multimodal=False)


def test_code_7_needs_a_choice(tmp_path):
    prefix = write(tmp_path / "f", [[[0.5, 1.5]]], np.float32)
    with pytest.raises(DataError, match="float_codes"):
        IndexedDataset(prefix)
    assert list(IndexedDataset(prefix, float_codes="core")[0]) == [0.5, 1.5]
    with pytest.raises(DataError, match="last sequence ends at byte 16"):
        IndexedDataset(prefix, float_codes="legacy")
    pathlib.Path(prefix + ".bin").write_bytes(np.array([0.5, 1.5]).tobytes())
    assert IndexedDataset(prefix, float_codes="legacy")[0].dtype == np.float64


def patch(path, offset, data):
    content = bytearray(pathlib.Path(path).read_bytes())
    content[offset : offset + len(data)] = data
    pathlib.Path(path).write_bytes(content)


@pytest.mark.parametrize(
    "offset, data, meaning",
    [
        (0, b"X", "offset 0: magic"),
        (0, b"TNTIDX\0\0", "`megalith data convert` makes an mmap dataset of it"),
        (9, b"\2", "offset 9: version 2"),
        (17, b"\0", "offset 17: dtype code 0"),
        (17, b"\x09", "offset 17: dtype code 9"),
        (17, b"\x05", "ends at byte"),
        (18, b"\5", "offset 18: 5 sequences"),
        (25, b"\x7f", "offset 18"),
        (26, b"\0", "offset 18"),
        (34, b"\xff\xff\xff\xff", "offset 34: a sequence of negative length"),
        (34, b"\4", "a pointer off the end"),
        (58, b"\x0d", "offset 58: a pointer off the end of its predecessor: 13 at sequence 1"),
        (81, b"\x10", "offset 74: the last sequence ends"),
        (82, b"\1", "offset 82: the document table runs from 1"),
        (90, b"\3", "offset 98: document 2 begins at sequence 2"),
        (106, b"\5", "offset 82: the document table runs from 0 to 5"),
    ],
)
def test_damage_is_named(small, offset, data, meaning):
    patch(small + ".idx", offset, data)
    with pytest.raises(DataError, match=meaning):
        IndexedDataset(small).verify()


def test_truncation_is_named(small):
    index, tokens = pathlib.Path(small + ".idx").read_bytes(), pathlib.Path(small + ".bin").read_bytes()
    for size in range(len(index)):
        pathlib.Path(small + ".idx").write_bytes(index[:size])
        with pytest.raises(DataError, match=r"small\.idx, offset"):
            IndexedDataset(small)
    pathlib.Path(small + ".idx").write_bytes(index)
    for size in range(len(tokens)):
        pathlib.Path(small + ".bin").write_bytes(tokens[:size])
        with pytest.raises(DataError, match=r"small\.bin"):
            IndexedDataset(small)


def test_a_file_cut_while_open_is_named(small):
    data = IndexedDataset(small, reader="pread")
    assert list(data[3]) == [7, 8, 9, 10]
    pathlib.Path(small + ".bin").write_bytes(b"\0" * 32)
    with pytest.raises(DataError, match="truncated while open"):
        data[3]


def test_names(small, tmp_path):
    assert resolve_prefix(small + ".bin") == resolve_prefix(small + ".idx") == small
    shutil.copy(small + ".bin", tmp_path / "a_b.bin")
    with pytest.raises(DataError, match="no partner"):
        IndexedDataset(tmp_path / "a_b")
    shutil.copy(small + ".idx", tmp_path / "a_b.bin.idx")
    for name in ("a_b", "a_b.bin"):
        with pytest.raises(DataError, match="mv "):
            IndexedDataset(tmp_path / name)
    (tmp_path / "a_b.bin.idx").rename(tmp_path / "a_b.idx")
    with pytest.raises(DataError, match=r"Did you mean .*a_b"):
        IndexedDataset(tmp_path / "a-b")
    with pytest.raises(DataError, match=r"Did you mean .*small"):
        IndexedDataset(tmp_path / "sma")
    with pytest.raises(DataError, match="no indexed dataset"):
        IndexedDataset(tmp_path / "nowhere" / "x")
    with pytest.raises(DataError, match="mmap or pread"):
        IndexedDataset(small, reader="tape")


def test_writer_refuses_what_it_cannot_store(tmp_path, small):
    with pytest.raises(DataError, match="do not fit uint16"), IndexedWriter(tmp_path / "w", np.uint16) as writer:
        writer.add_sequence(np.array([70000]))
    with pytest.raises(DataError, match="counts disagree"), IndexedWriter(tmp_path / "w", np.uint16) as writer:
        writer.add_many([1, 2], [1])
    with pytest.raises(DataError, match="only equal dtypes merge"), IndexedWriter(tmp_path / "w", np.uint16) as writer:
        writer.add_index(small)
    with pytest.raises(DataError, match="cannot be stored"):
        IndexedWriter(tmp_path / "w", np.complex64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.bin", "small.idx"]


def test_open_many_keeps_the_order(tmp_path):
    prefixes = [write(tmp_path / f"p{i}", [[[i] * (i + 1)]]) for i in range(20)]
    assert [data.num_tokens for data in open_many(prefixes, threads=4)] == list(range(1, 21))


@pytest.mark.slow
def test_ten_thousand_damaged_indices(tmp_path):
    """Each gives a DataError or a correct read of what the file still says; none crashes, hangs, reads past the end."""
    random = np.random.default_rng(7)
    lengths = random.integers(0, 40, 60)
    with IndexedWriter(tmp_path / "fuzz", np.uint16) as writer:
        writer.add_many(random.integers(0, 60000, lengths.sum()), lengths, np.full(20, 3))
    index = (tmp_path / "fuzz.idx").read_bytes()
    tokens = np.fromfile(tmp_path / "fuzz.bin", np.uint16)
    original = np.split(tokens, np.cumsum(lengths)[:-1])
    refused = 0
    for case in range(10_000):
        damaged = bytearray(index)
        kind = case % 4
        if kind < 3:
            where = random.integers(0, 34 if kind == 0 else len(damaged), 1 + case % 3)
            for offset in where:
                damaged[offset] = random.integers(0, 256)
        else:
            size = int(random.integers(0, len(damaged) + 40))
            damaged = damaged[:size] + random.bytes(max(0, size - len(damaged)))
        (tmp_path / "fuzz.idx").write_bytes(damaged)
        try:
            data = IndexedDataset(tmp_path / "fuzz", reader=("mmap", "pread")[case % 2])
            number = case % 60 if len(data) == 60 else 0
            sequence = data.get(number)  # a read on its own entries, before the full check
            data.verify()
        except DataError:
            refused += 1
            continue
        if data.dtype == np.uint16 and len(data) == 60:  # lengths and pointers are tied to each other and to the .bin
            ends = np.cumsum(data.lengths)
            assert np.array_equal(sequence, tokens[ends[number] - data.lengths[number] : ends[number]])
        if bytes(damaged) == index:
            assert np.array_equal(sequence, original[number])
    assert refused > 8000


def test_joined_sequences(small):
    for reader in ("mmap", "pread"):
        data = IndexedDataset(small, reader=reader)
        assert data.join([0, 2, 3], 1, 5).tolist() == [2, 3, 5, 6, 7] and data.join([3], 1, 3).tolist() == [8, 9, 10]
        with pytest.raises(IndexError, match="which are 1 short"):
            data.join([0, 1], 0, 5)
