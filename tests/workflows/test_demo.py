"""The demo, without its commands: what is in its folder already."""

import pytest

from megalith.common.locks import LockedError, locked
from megalith.workflows import demo


def test_a_second_demo_replaces_nothing(tmp_path, monkeypatch):
    """Its second corpus has another time, and so preprocess refused to replace the first dataset."""

    def command(*words, processes=1):
        for word in words:
            if word.endswith("tokenizer.json"):
                (tmp_path / "tokenizer.json").touch()
        if "preprocess" in words:
            assert not (tmp_path / "corpus_text_document.idx").exists()
            (tmp_path / "corpus_text_document.idx").write_text("made")
        (tmp_path / "run").mkdir(exist_ok=True)

    monkeypatch.setattr(demo, "_megalith", command)
    monkeypatch.setattr(demo, "_validation", lambda run: (2.0, 1.0))
    (tmp_path / "corpus.jsonl").write_text("mine")
    (tmp_path / "notes").write_text("mine")
    for stamp in ("1", "2"):
        monkeypatch.setattr(demo.time, "strftime", lambda form, stamp=stamp: stamp)
        assert demo.run_demo(str(tmp_path), megabytes=0.01) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {
        "corpus_text_document.idx",
        "corpus_text_document.idx.before-2",
        "run.before-2",
        "notes",
        "corpus.jsonl.before-1",
    } <= names
    assert (tmp_path / "corpus.jsonl.before-1").read_text() == "mine"
    with locked(tmp_path, inside=True), pytest.raises(LockedError):
        demo.run_demo(str(tmp_path), megabytes=0.01)
