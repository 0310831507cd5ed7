"""Outputs of preprocessing: one job at a time, no part of another, nothing replaced unasked, "already made" if so."""

import dataclasses
import json
import os
import pathlib
import shutil

import pytest

from megalith.common.errors import DataError
from megalith.common.locks import LockedError, locked
from megalith.data.corpus.preprocess import PreprocessOptions, plan, preprocess
from megalith.data.corpus.preprocess_part import Job, PartEncoder, finished_parts
from megalith.data.corpus.readers import Part, Slice
from megalith.data.indexed import IndexedDataset, IndexedWriter
from megalith.data.tokenizers.tokenizer import TokenizerOptions

NULL = TokenizerOptions(tokenizer_type="NullTokenizer", vocab_size=5000)


class Stop(Exception):
    pass


def engine(job, parts, workers):
    """Runs the parts here."""
    encoder = PartEncoder(job)
    yield from (encoder(part) for part in parts)


def corpus(path, first, count=40):
    path.write_text("".join(json.dumps({"text": f"{first + i % 7} {i}", "title": "1"}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture
def asked(tmp_path):
    return PreprocessOptions(
        input=[corpus(tmp_path / "a.jsonl", 1000)], output_prefix=str(tmp_path / "out"), tokenizer=NULL, partitions=4,
        engine="tests.data.corpus.test_preprocess_output:engine",
    )  # fmt: skip


def everything(folder):
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in pathlib.Path(folder).rglob("*")
        if path.is_file()
    }


def firsts(prefix):
    return {int(row[0]) // 1000 for row in IndexedDataset(prefix)[:]}


def interrupted(options, parts=1):
    """Run until `parts` parts are finished."""
    seen = []

    def stop(record, total):
        seen.append(record)
        if len(seen) == parts:
            raise Stop

    with pytest.raises(Stop):
        preprocess(options, progress=stop)


@pytest.mark.parametrize("of", ["the prefix", "its dataset, by merge"])
@pytest.mark.parametrize("second", ["the same input", "another input", "--overwrite", "another spelling"])
def test_the_second_of_two_jobs_stops_and_touches_nothing(asked, tmp_path, of, second):
    """Half of another job's documents were in the result, with rc 0 and a sound index."""
    (tmp_path / "link").symlink_to(tmp_path)
    other = {
        "the same input": {},
        "another input": {"input": [corpus(tmp_path / "b.jsonl", 2000)]},
        "--overwrite": {"overwrite": True},
        "another spelling": {"output_prefix": str(tmp_path / "link" / ".." / tmp_path.name / "out")},
    }[second]
    if of != "the prefix":
        with locked(tmp_path / "out_text_document"):
            before = everything(tmp_path)
            with pytest.raises(
                LockedError, match=rf"out_text_document is being written by process {os.getpid()} on .* since"
            ):
                preprocess(dataclasses.replace(asked, **other))
            assert everything(tmp_path) == before
        return
    refused = []

    def meanwhile(record, total):
        before = everything(tmp_path)
        with pytest.raises(LockedError, match=rf"out is being written by process {os.getpid()} on .* since"):
            preprocess(dataclasses.replace(asked, **other))
        refused.append(everything(tmp_path) == before)

    result = preprocess(asked, progress=meanwhile)
    assert refused == [True] * 4 and result.documents == 40 and firsts(result.prefixes["text"]) == {1}
    assert not [name for name in os.listdir(tmp_path) if "lock" in name or "tmp" in name]


def test_a_part_of_another_job_is_not_joined(asked, tmp_path):
    """A worker that outlived its killed parent writes under its own job's name, and its record says whose it is."""
    interrupted(dataclasses.replace(asked, input=[corpus(tmp_path / "b.jsonl", 2000)]), parts=3)
    strange = {path.name: path.read_bytes() for path in (tmp_path / "out.parts").iterdir() if path.name[0].isdigit()}
    interrupted(asked)
    for name, content in strange.items():
        (tmp_path / "out.parts" / name).write_bytes(content)
    result = preprocess(asked)
    assert result.resumed_parts == 1 and firsts(result.prefixes["text"]) == {1} and result.documents == 40


def test_a_record_of_another_key_is_no_record(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1"}\n')
    settings = {
        "keys": ("text",),
        "fast": False,
        "split_sentences": False,
        "language": "english",
        "keep_newlines": False,
    }
    settings |= {"append_eod": False, "prepend_bos": False, "fail": False, "dtype": "uint16"}
    job = Job(
        folder=str(tmp_path), tokenizer={"tokenizer_type": "NullTokenizer", "vocab_size": 10}, key="a" * 64, **settings
    )
    PartEncoder(job)(Part(0, (Slice(str(tmp_path / "a.jsonl"), 0, 14),), 14))
    assert list(finished_parts(str(tmp_path), ["text"], "a" * 64)) == [0]
    assert finished_parts(str(tmp_path), ["text"], "b" * 64) == {}


def test_an_input_that_changes_while_it_is_read(asked, tmp_path):
    with pytest.raises(DataError, match="must not change during preprocessing"):
        preprocess(asked, progress=lambda record, total: corpus(tmp_path / "a.jsonl", 2000, count=41 + record["part"]))
    assert not list(tmp_path.glob("out_*"))


def test_the_same_input_twice_and_again(asked, tmp_path):
    twice = dataclasses.replace(asked, input=[*asked.input, *asked.input, str(tmp_path)])
    assert preprocess(twice).documents == 40
    lines = []
    # The report in its folder is no input
    assert preprocess(twice, notice=lines.append).documents == 40 and "nothing to do" in lines[0]


@pytest.mark.parametrize("keys", [("text",), ("text", "title")])
@pytest.mark.parametrize(
    "damage",
    [
        "no .bin",
        "no .idx",
        "short .bin",
        "short .idx",
        "long .bin",
        "other .bin",
        "other .idx",
        "other dataset",
        "nothing left",
    ],
)
def test_already_made_is_said_of_whole_datasets_alone(asked, tmp_path, damage, keys):
    """The .idx alone was looked at."""
    asked = dataclasses.replace(asked, json_keys=keys)
    expected = preprocess(asked)
    prefix, suffix = pathlib.Path(tmp_path / f"out_{keys[-1]}_document"), damage[-4:]
    good = everything(tmp_path)
    file = pathlib.Path(f"{prefix}{suffix}")
    if damage == "nothing left":
        for each in expected.prefixes.values():
            for ending in (".bin", ".idx"):
                os.unlink(each + ending)
        assert preprocess(asked).documents == 40
    elif damage == "other dataset":
        with IndexedWriter(prefix, "uint16") as writer:
            writer.add_many(list(range(40)), [1] * 40)
    elif damage.startswith("no "):
        file.unlink()
    else:
        content = file.read_bytes()
        other = {"short": content[:-8], "long": content + b"12345678", "other": content[:60] + b"\x07" + content[61:]}
        file.write_bytes(other[damage.split()[0]])
    if damage != "nothing left":
        before = everything(tmp_path)
        for look in (preprocess, plan):
            with pytest.raises(DataError, match=rf"out_{keys[-1]}_document.*--overwrite to make it again"):
                look(asked)
        assert everything(tmp_path) == before
        preprocess(dataclasses.replace(asked, overwrite=True))
    assert {name: one[0] for name, one in everything(tmp_path).items() if "preprocess" not in name} == {
        name: one[0] for name, one in good.items() if "preprocess" not in name
    }
    assert "already made" in plan(asked)


@pytest.mark.parametrize(
    "name", ["out_text_document.bin", "out_text_document.idx", "out_preprocess.json", "out.parts", "dangling"]
)
def test_what_is_not_this_jobs_is_kept(asked, tmp_path, name):
    if name == "out.parts":
        (tmp_path / name).mkdir()
        (tmp_path / name / "my notes").write_text("mine")
    elif name == "dangling":
        (tmp_path / "out_text_document.bin").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / name).write_text("mine")
    before = everything(tmp_path)
    with pytest.raises(DataError, match=r"^--output-prefix .*; found .*choose another prefix") as caught:
        preprocess(asked)
    assert name == "out.parts" or "tells what they were made from" in str(caught.value)  # not: from other input
    assert everything(tmp_path) == before
    if name != "out.parts":
        assert preprocess(dataclasses.replace(asked, overwrite=True)).documents == 40


@pytest.mark.parametrize("by", ["name", "link", "folder"])
def test_an_output_that_is_an_input(asked, tmp_path, by):
    (tmp_path / "in").mkdir()
    corpus(tmp_path / "out_text_document.bin", 1)
    (tmp_path / "in" / "b.jsonl").symlink_to(tmp_path / "out_text_document.bin")
    named = {"name": "out_text_document.bin", "link": "in/b.jsonl", "folder": "in"}[by]
    with pytest.raises(DataError, match=r"^--output-prefix .*input .*; found '.*out_text_document.bin'"):
        preprocess(dataclasses.replace(asked, input=[str(tmp_path / named)], overwrite=True))


def test_killed_before_the_datasets_were_put_in_place(asked, tmp_path):
    """--overwrite of an earlier, killed call is not in the command that goes on."""
    preprocess(asked)
    changed = dataclasses.replace(asked, append_eod=True)
    interrupted(dataclasses.replace(changed, overwrite=True), parts=2)
    with pytest.raises(DataError, match="--overwrite"):
        preprocess(changed)
    assert preprocess(dataclasses.replace(changed, overwrite=True)).resumed_parts == 2


def test_skipped_documents_of_an_earlier_call(asked, tmp_path):
    with open(asked.input[0], "a") as file:
        file.write("oops\n")
    interrupted(asked, parts=4)
    strict = dataclasses.replace(asked, on_error="fail")
    with pytest.raises(DataError, match=r"a\.jsonl:41: malformed JSON"):
        preprocess(strict)
    preprocess(asked)
    with pytest.raises(DataError, match="without 1 unusable documents, which --on-error fail forbids"):
        preprocess(strict)


def test_what_killed_writers_left_is_removed(asked, tmp_path):
    left = [
        ".out_text_document.bin.7.0123abcd.tmp",
        ".out_text_document.7.0123abcd.tmp.idx",
        ".out_preprocess.json.7.0123abcd.tmp",
    ]
    kept = [
        ".out_text_documents.bin.7.0123abcd.tmp",
        ".b_text_document.bin.7.0123abcd.tmp",
        ".out_text_document.bin.mine.tmp",
    ]
    for name in left + kept:
        (tmp_path / name).write_text("half")
    lines = []
    preprocess(asked, notice=lines.append)
    assert not [name for name in left if (tmp_path / name).exists()] and all(
        (tmp_path / name).exists() for name in kept
    )
    assert sum("killed" in line for line in lines) == 3


def test_parts_beside_the_corpus_are_no_corpus(asked, tmp_path):
    (tmp_path / "data").mkdir()
    shutil.move(asked.input[0], tmp_path / "data")
    there = dataclasses.replace(asked, input=[str(tmp_path / "data")], output_prefix=str(tmp_path / "data" / "out"))
    interrupted(there, parts=3)
    result = preprocess(there)
    assert (result.resumed_parts, result.documents) == (3, 40)
