"""The index cache: built once, read back mapped, never stale, never fatal."""

import os
import warnings

import numpy as np
import pytest

from megalith.data.samples.index_cache import cache_key, default_folders, load_or_build

LAYOUT = (("a", (4,), np.int32), ("b", (2, 2), np.int64))
ARRAYS = [np.arange(4, dtype=np.int32), np.ones((2, 2), np.int64)]


def refuse():
    raise AssertionError("built although it was there")


def test_built_once_then_mapped(tmp_path):
    for build in (lambda: ARRAYS, refuse):
        for got, expected in zip(load_or_build("k", LAYOUT, build, [tmp_path / "c"]), ARRAYS):
            assert np.array_equal(got, expected) and not got.flags.writeable and type(got) is np.ndarray
    assert sorted(os.listdir(tmp_path / "c")) == ["k-a.npy", "k-b.npy"]


@pytest.mark.parametrize("damage", [b"", b"rubbish", None])
def test_a_damaged_file_is_built_again(tmp_path, damage):
    load_or_build("k", LAYOUT, lambda: ARRAYS, [tmp_path])
    if damage is None:
        np.save(tmp_path / "k-b.npy", np.ones(3))
    else:
        (tmp_path / "k-b.npy").write_bytes(damage)
    assert np.array_equal(load_or_build("k", LAYOUT, lambda: ARRAYS, [tmp_path])[1], ARRAYS[1])
    assert np.array_equal(load_or_build("k", LAYOUT, refuse, [tmp_path])[1], ARRAYS[1])


def test_an_unusable_folder_is_passed_over(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="cannot be used"):
        load_or_build("k", LAYOUT, lambda: ARRAYS, [tmp_path / "file" / "x", tmp_path / "second"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(
            load_or_build("k", LAYOUT, refuse, [tmp_path / "file" / "x", tmp_path / "second"])[0], ARRAYS[0]
        )
    with pytest.warns(UserWarning, match="cannot be used"):
        assert np.array_equal(load_or_build("j", LAYOUT, lambda: ARRAYS, [tmp_path / "file" / "x"])[0], ARRAYS[0])


def test_keys_follow_content():
    keys = [
        cache_key(1, array) for array in (np.arange(3), np.arange(3, dtype=np.int32), np.arange(4), np.arange(3)[::-1])
    ]
    assert len({*keys, cache_key(2, np.arange(3)), cache_key("1", np.arange(3))}) == 6 and keys[0] == cache_key(
        1, np.arange(3)
    )


def test_folders(tmp_path):
    beside, run, private = default_folders(tmp_path / "data" / "p", None, tmp_path / "run")
    assert (beside, run) == (
        tmp_path / "data" / "index-cache",
        tmp_path / "run" / "index-cache",
    ) and "megalith" in private.name
    assert default_folders(tmp_path / "p", tmp_path / "chosen")[0] == tmp_path / "chosen"


def test_what_a_killed_builder_left_is_removed_a_day_later(tmp_path):
    old, live = tmp_path / ".j-a.npy.7.0123abcd.tmp", tmp_path / ".j-b.npy.7.0123abcd.tmp"
    for path in (old, live):
        path.write_text("half")
    os.utime(old, (0, 0))
    load_or_build("k", LAYOUT, lambda: ARRAYS, [tmp_path])
    assert not old.exists() and live.exists()
