"""The folder of checkpoints: what counts, what is offered, what is kept, what is cleared away."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.checkpoint import formats
from megalith.checkpoint.store import folder as folders
from megalith.checkpoint.store import manifest
from megalith.common import files
from megalith.common.errors import CheckpointError


def make(folder, *numbers, name=None):
    """Checkpoints of one small file, the last of them named by the pointer."""
    for number in numbers:
        path = folder / (name or folders.folder_name(number))
        path.mkdir(parents=True)
        (path / "data").write_bytes(b"0123456789")
        entry = {"bytes": 10, "sha256": files.sha256(path / "data")}
        manifest.write(path, {"iteration": number, "written_by": {}, "tensors": {}, "files": {"data": entry}})
        files.write_text(folder / folders.POINTER, folders.folder_name(number))


def test_nothing_there(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        assert folders.iterations(folder) == [] and folders.latest(folder) is None
        with pytest.raises(CheckpointError, match="no checkpoint found"):
            folders.find(folder)


def test_a_folder_of_runs_names_them(tmp_path):
    make(tmp_path / "first/checkpoints", 10, 20)
    make(tmp_path / "second", 30)
    (tmp_path / "notes").mkdir()
    for read in (folders.find, formats.recognise):
        with pytest.raises(CheckpointError, match="is a folder of runs; name one of them: ") as caught:
            read(tmp_path)
        assert f"{tmp_path}/first (step 20)" in str(caught.value) and f"{tmp_path}/second (step 30)" in str(
            caught.value
        )
        assert "notes" not in str(caught.value)


def test_found_by_pointer_number_or_path(tmp_path):
    make(tmp_path / "checkpoints", 10, 30, 20)
    inner = tmp_path / "checkpoints"
    for folder in (tmp_path, inner):  # a run's folder, or the checkpoints in it
        assert folders.iterations(folder) == [10, 20, 30] and folders.latest(folder) == 20
        assert folders.find(folder) == inner / "iter_0000020" and folders.find(folder, 10) == inner / "iter_0000010"
    assert folders.find(inner / "iter_0000030") == inner / "iter_0000030"
    (inner / folders.POINTER).unlink()
    assert folders.latest(inner) == 30
    assert folders.folder_name(123456789) == "iter_123456789"


def test_missing_one_is_named_and_the_newest_good_one_offered(tmp_path):
    make(tmp_path, 10, 20, 30)
    (tmp_path / "iter_0000020" / "data").write_bytes(b"012345678X")
    with pytest.raises(CheckpointError, match=r"iter_0000040 is missing. .*--ckpt-step 30"):
        folders.find(tmp_path, 40)
    (tmp_path / "iter_0000030" / "data").unlink()
    # 20 has a wrong checksum
    with pytest.raises(CheckpointError, match=r"(?s)iter_0000030/data is missing.*--ckpt-step 10"):
        folders.find(tmp_path)
    (tmp_path / "iter_0000010" / "data").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no other good checkpoint"):
        folders.find(tmp_path, 30)
    (tmp_path / folders.POINTER).write_text("rubbish")
    with pytest.raises(CheckpointError, match="'rubbish'"):
        folders.latest(tmp_path)


def test_publish_replaces_and_moves_the_pointer(tmp_path):
    make(tmp_path, 10)
    temporary, lock = folders.claim(tmp_path, 10)
    (temporary / "new").touch()
    folders.publish(temporary, 10)
    os.close(lock)
    assert os.listdir(tmp_path / "iter_0000010") == ["new"] and sorted(os.listdir(tmp_path)) == [
        "iter_0000010",
        "latest",
    ]


def test_killed_while_replacing_loses_nothing(tmp_path):
    make(tmp_path, 10, name=".iter_0000010.0a1b.replaced")
    assert folders.iterations(tmp_path) == [10] and folders.find(tmp_path, 10).name.endswith(".replaced")
    folders.clean(tmp_path)
    assert folders.find(tmp_path) == tmp_path / "iter_0000010"
    make(tmp_path, 10, name=".iter_0000010.0a1b.replaced")
    assert folders.find(tmp_path) == tmp_path / "iter_0000010"
    folders.clean(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["iter_0000010", "latest"]


def test_clean_spares_what_a_live_save_owns(tmp_path):
    locked, lock = folders.claim(tmp_path, 10)
    stale, dead = folders.claim(tmp_path, 10)
    os.close(dead)
    (tmp_path / ".iter_0000005.0a1b.removing").mkdir()
    (tmp_path / ".iter_not_ours").mkdir()
    folders.clean(tmp_path)
    assert (
        locked.exists()
        and not stale.exists()
        and sorted(os.listdir(tmp_path)) == sorted([locked.name, ".iter_not_ours"])
    )
    os.close(lock)
    folders.clean(tmp_path)
    assert os.listdir(tmp_path) == [".iter_not_ours"]


def test_retention(tmp_path):
    make(tmp_path, 10, 20, 25, 30, 40)
    (tmp_path / "iter_0000020" / "data").unlink()  # damaged: left for its owner to look at
    folders.prune(tmp_path, 40, 2, 25)
    assert folders.iterations(tmp_path) == [20, 25, 30, 40] and sorted(os.listdir(tmp_path))[0] == "iter_0000020"
    folders.prune(tmp_path, 40, 0, None)
    assert folders.iterations(tmp_path) == [20, 25, 30, 40]


def test_going_back_keeps_the_abandoned_continuation_until_it_is_reached(tmp_path):
    make(tmp_path, 10, 80, 90, 20)
    folders.prune(tmp_path, 20, 1, None)
    assert folders.iterations(tmp_path) == [20, 80, 90] and folders.latest(tmp_path) == 20


@given(st.sets(st.integers(0, 60)), st.integers(0, 60), st.integers(0, 5), st.none() | st.integers(1, 20))
def test_expired_never_takes_the_newest(complete, current, keep_last, keep_every):
    complete = sorted(complete | {current})
    gone = set(folders.expired(complete, current, keep_last, keep_every))
    kept = [number for number in complete if number not in gone]
    assert current in kept and max(complete) in kept
    assert all(number % keep_every for number in gone) if keep_every else True
    if keep_last == 0:
        assert not gone
    else:
        past = [number for number in complete if number <= current]
        assert set(past[-keep_last:]) <= set(kept)
        rest = [number for number in past[:-keep_last] if not (keep_every and number % keep_every == 0)]
        assert gone == set(rest)
