"""The old lazy and cached format: read like the new one, converted to its bytes, damage named."""

import pathlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data.indexed import IndexedDataset, IndexedWriter, tntidx

ORIGINAL = pathlib.Path(__file__).resolve().parents[4] / "shared" / "data" / "megatron" / "indexed"
needs_originals = pytest.mark.skipif(not ORIGINAL.is_dir(), reason="needs the Megatron files of ../shared/data")


def write_old(prefix, documents, code=4, dtype=np.int32, element=4):
    """The format of the module's docstring, written by hand."""
    items = [item for document in documents for item in document]
    flat = np.array([token for item in items for token in item], dtype)
    sizes = [len(item) for item in items]
    offsets = np.cumsum([0] + sizes) * (np.dtype(dtype).itemsize // element)
    head = struct.pack("<8s6Q", b"TNTIDX\0\0", 1, code, element, len(items), len(items), len(documents) + 1)
    tables = [range(len(items) + 1), offsets, sizes, np.cumsum([0] + [len(document) for document in documents])]
    pathlib.Path(f"{prefix}.idx").write_bytes(
        head + b"".join(np.array(list(table), np.int64).tobytes() for table in tables)
    )
    pathlib.Path(f"{prefix}.bin").write_bytes(flat.tobytes())
    return str(prefix)


@needs_originals
@pytest.mark.parametrize("kind", ["lazy", "cached"])
def test_megatrons_files(kind, tmp_path):
    expected = np.load(ORIGINAL / "expected_tokens.npz")
    data = tntidx.open_indexed(ORIGINAL / f"old22-gpt2bpe-{kind}")
    assert len(data) == data.num_documents == 120 and data.num_tokens == 102014
    assert np.array_equal(data.lengths, expected["lengths"]) and np.array_equal(
        np.concatenate(data[:]), expected["flat"]
    )
    tntidx.convert(data.prefix, tmp_path / "new", np.uint16)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"new{suffix}").read_bytes() == (ORIGINAL / f"old22-gpt2bpe{suffix}").read_bytes()


@given(st.lists(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=4), max_size=12), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_conversion_in_pieces(tmp_path_factory, documents, block):
    folder = tmp_path_factory.mktemp("old")
    with IndexedWriter(folder / "expected", np.int32) as writer:
        for document in documents:
            for item in document:
                writer.add_sequence(item)
            writer.end_document()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tntidx, "BLOCK", block)
        tntidx.convert(write_old(folder / "old", documents), folder / "new")
    for suffix in (".bin", ".idx"):
        assert (folder / f"new{suffix}").read_bytes() == (folder / f"expected{suffix}").read_bytes()


def test_code_6_with_its_wrong_element_size(tmp_path):
    data = tntidx.TntidxDataset(write_old(tmp_path / "f", [[[1.5, 2.5], [3.5]]], 6, np.float64, 4))
    assert (
        data.dtype == np.float64
        and list(data[0]) == [1.5, 2.5]
        and list(data[-1]) == [3.5]
        and list(data.get(0, 1)) == [2.5]
    )


@pytest.mark.parametrize(
    "offset, value, meaning",
    [
        (0, 0, "magic"),
        (8, 2, "version 2"),
        (16, 11, "code 11"),
        (24, 8, "elements of 8"),
        (32, 1, "sizes"),
        (48, 9, "take"),
    ]
    + [
        (80, 1, "item 0"),
        (88, 1, "item 0"),
        (112, -1, "item 1"),
        (120, 1, "document table"),
        (136, 3, "document table"),
    ],
)
def test_damage_is_named(tmp_path, offset, value, meaning):
    prefix = write_old(tmp_path / "d", [[[1, 2]], [[3]]])
    content = bytearray(pathlib.Path(prefix + ".idx").read_bytes())
    content[offset : offset + 8] = struct.pack("<q", value)
    pathlib.Path(prefix + ".idx").write_bytes(content)
    with pytest.raises(DataError, match=meaning):
        tntidx.TntidxDataset(prefix)


def test_other_formats_and_ends(tmp_path):
    prefix = write_old(tmp_path / "d", [[[1, 2]], [[3]]])
    for index, offset, length in ((2, 0, None), (-1, 0, None), (0, 0, 3), (0, -1, 1)):
        with pytest.raises(IndexError):
            tntidx.TntidxDataset(prefix).get(index, offset, length)
    with pytest.raises(DataError, match="megalith data convert"):
        IndexedDataset(prefix)
    with IndexedWriter(tmp_path / "n") as writer:
        writer.add_sequence([1])
    assert isinstance(tntidx.open_indexed(tmp_path / "n"), IndexedDataset)
    (tmp_path / "d.idx").write_bytes(b"PK")
    with pytest.raises(DataError, match="begins neither"):
        tntidx.sniff(prefix)
    with pytest.raises(DataError, match="truncated"):
        tntidx.TntidxDataset(prefix)
