"""Locks of outputs: one holder, named; dead holders' locks taken over; never two at a time."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from megalith.checkpoint.store.folder import new_folder
from megalith.common import locks
from megalith.common.files import atomic_path
from megalith.common.locks import LockedError, locked
from megalith.common.outputs import writing
from megalith.data.corpus.preprocess_output import PreprocessOutput
from megalith.data.indexed import IndexedWriter
from megalith.data.indexed.merge import merge_datasets

HOLD = """
import sys, time
from megalith.common.locks import locked
with locked(sys.argv[1]):
    print('held', flush=True)
    time.sleep(60)
"""


def _holder(output):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_names_the_first_and_takes_over_when_it_is_dead(tmp_path):
    """What a user sees of another job on the output, before and after its kill -9."""
    output = tmp_path / "corpus"
    process = _holder(output)
    try:
        with pytest.raises(LockedError, match=rf"process {process.pid} on .* since 20.*Wait for it"), locked(output):
            pass
    finally:
        process.kill()
        process.wait()
    notes = []
    with locked(output, notice=notes.append):
        assert json.loads((tmp_path / ".corpus.lock").read_text())["pid"] == os.getpid()
    assert len(notes) == 1 and f"process {process.pid} " in notes[0]
    assert not list(tmp_path.iterdir())


def test_same_process_and_relative_names(tmp_path, monkeypatch):
    """One output under two spellings is one output."""
    monkeypatch.chdir(tmp_path)
    with locked("out"), pytest.raises(LockedError), locked(tmp_path / "x" / ".." / "out"):
        pass
    with locked("out"):
        pass


def test_number_of_a_dead_process_given_to_another(tmp_path):
    """A live process with the holder's number but another start is not the holder."""
    with locked(tmp_path / "out"):
        content = json.loads((tmp_path / ".out.lock").read_text())
    (tmp_path / ".out.lock").write_text(json.dumps(content | {"started": "1"}))
    notes = []
    with locked(tmp_path / "out", notice=notes.append):
        assert json.loads((tmp_path / ".out.lock").read_text())["nonce"] != content["nonce"]
    assert len(notes) == 1 and f"process {os.getpid()} " in notes[0] and "is taken over" in notes[0]


@pytest.mark.parametrize("content", ['{"host": "elsewhere", "pid": 1, "pids": "x", "nonce": "y"}', "", "[1]", "\0\0"])
def test_holder_elsewhere_is_judged_by_its_last_touch(tmp_path, content):
    """Another machine's lock, and one that was half written when its machine died."""
    path = tmp_path / ".out.lock"
    path.write_text(content)
    with pytest.raises(LockedError, match=r"1 on elsewhere|its lock does not name") as caught, locked(tmp_path / "out"):
        pass
    assert path.read_text() == content and "None on" not in str(caught.value)
    past = time.time() - locks.STALE - 5
    os.utime(path, (past, past))
    with locked(tmp_path / "out"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lives", [False, True])
def test_holder_elsewhere_may_show_that_it_lives(tmp_path, monkeypatch, lives):
    """A job that is started again in a new container finds the lock of the old one, which died a moment ago."""
    monkeypatch.setattr(locks, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(locks, "STALE", 1.0)
    path, notes = tmp_path / ".out.lock", []
    path.write_text('{"host": "elsewhere", "pid": 1, "pids": "x", "nonce": "y"}')
    touch = threading.Timer(0.3, os.utime, (path,))
    if lives:
        touch.start()
        with (
            pytest.raises(LockedError, match="process 1 on elsewhere"),
            locked(tmp_path / "out", patient=True, notice=notes.append),
        ):
            pass
        touch.join()
    else:
        with locked(tmp_path / "out", patient=True, notice=notes.append):
            assert json.loads(path.read_text())["pid"] == os.getpid()
    assert "looking for up to 1 s whether process 1 on elsewhere" in notes[0] and len(notes) == (1 if lives else 2)


def test_heartbeat_touches_and_gives_up_a_lock_that_was_taken(tmp_path, monkeypatch):
    """A holder that was suspended and taken over does not remove its successor's lock."""
    monkeypatch.setattr(locks, "HEARTBEAT", 0.02)
    path = tmp_path / ".out.lock"
    with locked(tmp_path / "out"):
        os.utime(path, (1, 1))
        deadline = time.monotonic() + 20
        while path.stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert path.stat().st_mtime > 2
        path.write_text('{"nonce": "of another"}')
    assert path.read_text() == '{"nonce": "of another"}'


def lose(path):
    """What is seen of a lock that another machine took while this process was suspended."""
    path.write_text('{"host": "elsewhere", "pid": 1, "pids": "x", "nonce": "y", "since": "now", "command": "c"}')


def test_a_lock_that_was_taken_is_noticed_before_anything_is_put_in_place(tmp_path):
    with locked(tmp_path / "out") as still_held:
        still_held()
        lose(tmp_path / ".out.lock")
        with pytest.raises(
            LockedError, match=r"was suspended, .* lost its lock; process 1 on elsewhere .* has it. Its result"
        ):
            still_held()
        (tmp_path / ".out.lock").unlink()
        with pytest.raises(LockedError, match="who took it has ended"):
            still_held()
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(LockedError), writing(tmp_path / "file", overwrite=True) as still_held:
        lose(tmp_path / ".file.lock")
        with atomic_path(tmp_path / "file", still_held) as aside:
            aside.write_text("mine")
    assert (tmp_path / "file").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(LockedError), new_folder(tmp_path / "folder") as new:
        (new / "config.json").write_text("mine")
        lose(tmp_path / "folder/.lock")
    assert [each.name for each in (tmp_path / "folder").iterdir()] == [".lock"]


def test_a_dataset_is_not_put_in_place_of_anothers(tmp_path, monkeypatch):
    with IndexedWriter(tmp_path / "part", np.uint16) as writer:
        writer.add_sequence([1, 2])
    with pytest.raises(LockedError), locked(tmp_path / "all") as still_held:
        lose(tmp_path / ".all.lock")
        merge_datasets([str(tmp_path / "part")], str(tmp_path / "all"), still_held)
    assert not list(tmp_path.glob("*all.*[!k]"))
    output = PreprocessOutput(str(tmp_path / "made"), {"text": str(tmp_path / "made_text")})
    with output.hold_locks(print):
        output.parts.mkdir()
        output.begin_merge()
        lose(tmp_path / ".made_text.lock")
        with pytest.raises(LockedError):
            output.begin_merge()


def test_without_hard_links(tmp_path, monkeypatch):
    """Some file systems have none."""

    def refuse(*names):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    with locked(tmp_path / "out"), pytest.raises(LockedError), locked(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())


def _count(folder, turns):
    for _ in range(turns):
        while True:
            try:
                with locked(folder / "out"):
                    value = int((folder / "value").read_text())
                    time.sleep(0.001)
                    (folder / "value").write_text(str(value + 1))
                break
            except LockedError:
                time.sleep(0.002)


def test_many_processes_exclude_each_other(tmp_path):
    """A counter that unprotected increments would lose, begun on a dead process's lock."""
    (tmp_path / "value").write_text("0")
    process = _holder(tmp_path / "out")
    process.kill()
    process.wait()
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_count, args=(tmp_path, 25)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert (tmp_path / "value").read_text() == "100"
