"""What verbs write: nothing that exists is replaced unasked, no output is an input, one job at a time, no leftovers."""

import json
import os
import pathlib
import re
import shlex
import shutil

import pytest
import torch

from megalith.cli.main import main
from megalith.common.locks import locked
from megalith.data.indexed import IndexedDataset, IndexedWriter
from tests.originals.families import MODELS

OLD = pathlib.Path(__file__).parents[2].parent / "shared" / "data" / "megatron/indexed/old22-gpt2bpe-lazy"


def dataset(prefix, *rows):
    with IndexedWriter(prefix, "uint16") as writer:
        for row in rows:
            writer.add_many(row, [len(row)])


def everything(folder="."):
    return {str(path): path.read_bytes() for path in sorted(pathlib.Path(folder).rglob("*")) if path.is_file()}


def run(line):
    return main(shlex.split(line))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset("sm", [1, 2], [3])
    dataset("oth", [4], [5], [6])
    pathlib.Path("text.txt").write_text("the cat sat on the mat " * 20)
    pathlib.Path("numbers.jsonl").write_text(json.dumps({"text": "1 2 3"}) + "\n")
    pathlib.Path("prompts.txt").write_text("1\n")
    if OLD.with_suffix(".idx").exists():
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{OLD}{suffix}", f"old{suffix}")
    return tmp_path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Hugging Face folder, and a checkpoint of ours made of it."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    MODELS["gpt2"]().save_pretrained(folder / "theirs")
    assert main(["checkpoint", "import", str(folder / "theirs"), str(folder / "ours")]) == 0
    assert main(["checkpoint", "export", str(folder / "ours"), str(folder / "megatron"), "--to", "megatron"]) == 0
    return folder


FILES = {  # verb -> command, and the files that it writes
    "preprocess": (
        "data preprocess --input numbers.jsonl --output-prefix made --tokenizer-type NullTokenizer --vocab-size 9 "
        "--workers 1",
        ["made_text_document.bin", "made_text_document.idx", "made_preprocess.json"],
    ),
    "merge": ("data merge --input sm oth --output-prefix made", ["made.bin", "made.idx"]),
    "split": (
        "data split --input oth --output-prefix made --documents 1",
        [f"made-000{number}{suffix}" for number in range(3) for suffix in (".bin", ".idx")],
    ),
    "convert": ("data convert --input old --output-prefix made", ["made.bin", "made.idx"]),
    "bpe": ("data bpe --input text.txt --vocab-size 270 --output made.json", ["made.json"]),
    "weights": ("data weights --input . --output made.txt", ["made.txt"]),
    "config": ("config --output made.yaml", ["made.yaml"]),
}
FOLDERS = {
    "import": "checkpoint import {models}/theirs made",
    "export": "checkpoint export {models}/ours made --to huggingface",
    "reshape": "checkpoint reshape {models}/megatron made",
    "edit": "checkpoint edit {models}/ours made --drop rng",
}


@pytest.mark.parametrize("verb", [each for each in FILES if each != "preprocess"])
def test_no_file_is_replaced_unasked(here, capsys, monkeypatch, verb):
    if verb == "convert" and not pathlib.Path("old.idx").exists():
        pytest.skip("needs ../shared/data")
    monkeypatch.setattr(
        "builtins.input",
        lambda question: {"--data-path": "a", "tokenizer.json": "t.json"}.get(re.split("[:,]", question)[0], ""),
    )
    command, files = FILES[verb]
    for file in files:
        pathlib.Path(file).write_text("mine")
        before = everything()
        assert run(command) in (1, 2), file
        told = capsys.readouterr().err
        assert "exists" in told and ("--overwrite" in told or "--force" in told)
        assert everything() == before
        os.unlink(file)
    output = files[0] if len(files) == 1 else "made"
    left = f".{output if verb == 'split' else files[0]}.4194305.0123abcd.tmp"
    pathlib.Path(left).write_text("half")
    assert run(command) == 0
    assert not pathlib.Path(left).exists() and all(map(os.path.exists, files))
    made = everything()
    assert run(command) in (1, 2) and everything() == made
    capsys.readouterr()
    assert run(f"{command} --overwrite") == 0 and everything() == made
    with locked(output):
        capsys.readouterr()
        assert run(f"{command} --overwrite") == 1
        assert f"is being written by process {os.getpid()} on" in capsys.readouterr().err
    assert everything() == made and not [name for name in os.listdir() if "lock" in name or "tmp" in name]


@pytest.mark.parametrize("verb", FOLDERS)
def test_no_folder_is_replaced_unasked(here, models, capsys, verb):
    command = FOLDERS[verb].format(models=models)
    for place, name in (("made", "made"), ("made", "made/notes.txt")):
        pathlib.Path(name).parent.mkdir(exist_ok=True)
        pathlib.Path(name).write_text("mine")
        before = everything()
        for more in ("", " --overwrite"):  # what no conversion wrote is not replaced at all
            assert run(command + more) == 1
            told = capsys.readouterr().err
            assert ("is not a folder" if place == name else "exists and is not empty") in told or (
                more and "replaces an earlier conversion alone" in told and "notes.txt" in told
            )
        assert everything() == before
        os.unlink(place) if place == name else shutil.rmtree(place)
    pathlib.Path("real/.new.4194305.0123abcd.tmp/iter_0000000").mkdir(parents=True)
    pathlib.Path("real/.lock.0123").write_text("{}")  # a run that is starting
    pathlib.Path("made").symlink_to("real")  # another spelling of a folder
    assert run(command) == 0
    first = everything("real")
    assert first and pathlib.Path("made").is_symlink()
    assert run(command) == 1 and everything("real") == first
    with locked("real", inside=True):
        capsys.readouterr()
        assert run(f"{command} --overwrite") == 1
        assert f"real is being written by process {os.getpid()} on" in capsys.readouterr().err
    assert run(f"{command} --overwrite") == 0 and everything("real").keys() == first.keys()
    assert sorted(name for name in os.listdir("real") if name[0] == ".") == [".lock.0123"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_conversion_that_fails_leaves_what_was_there(here, models, monkeypatch, stop):
    assert run(FOLDERS["export"].format(models=models)) == 0
    before = everything()

    def fail(*given):
        pathlib.Path(given[0]).mkdir(exist_ok=True)
        (pathlib.Path(given[0]) / "half.safetensors").write_text("half")
        raise stop

    monkeypatch.setattr("megalith.checkpoint.formats.huggingface.files.write_tensors", fail)
    for target in ("made --overwrite", "other"):
        assert run(f"checkpoint export {models}/ours {target} --to huggingface") in (1, 130)
        assert everything() == before


@pytest.mark.parametrize("target", ["{}/ours", "{}", "{}/ours/iter_0000000", "link"])
def test_the_source_is_no_target(here, models, capsys, target):
    pathlib.Path("link").symlink_to(models / "ours")
    before = everything(models)
    for more in ("", " --overwrite"):
        assert run(f"checkpoint export {models}/ours {target.format(models)} --to huggingface{more}") == 1
        assert "what is read is never written over" in capsys.readouterr().err
        assert run(f"checkpoint edit {models}/ours {target.format(models)}{more}") == 1
        assert everything(models) == before


def link(name, to):
    for suffix in (".bin", ".idx"):
        pathlib.Path(name + suffix).symlink_to(to + suffix)


@pytest.mark.parametrize(
    "command",
    [
        "data merge --input sm oth --output-prefix sm",
        "data merge --input oth sm.bin --output-prefix ./sm",
        "data merge --input sm.idx --output-prefix {here}/folder/../sm",
        "data merge --input linked oth --output-prefix sm",
        "data merge --input sm oth --output-prefix linked",
        "data merge --input there --output-prefix sm",
        "data merge --input . --output-prefix there/sm",
        "data split --input made-0000 --output-prefix made --documents 1",
        "data split --input . --output-prefix there/made --documents 1",
        "data convert --input old --output-prefix there/old",
        "data bpe --input text.txt --vocab-size 270 --output there/text.txt",
        "data bpe --input . --vocab-size 270 --output text.txt",
        "data weights --input . --output sm.idx",
        "data weights --input . --epochs epochs.yaml --output there/epochs.yaml",
        "generate --load none --prompt-file prompts.txt --out-file there/prompts.txt",
    ],
)
def test_no_output_is_an_input(here, capsys, command):
    """`--input sm oth --output-prefix sm` three times gave 5, 8 and 11 documents."""
    dataset("made-0000", [1])
    pathlib.Path("epochs.yaml").write_text("default: 1\n")
    pathlib.Path("folder").mkdir()
    pathlib.Path("there").symlink_to(here)
    if "linked" in command:
        link("linked", "sm")
    if "old" in command:
        shutil.copy("sm.bin", "old.bin")
        shutil.copy("sm.idx", "old.idx")
    before = everything()
    for _ in range(2):
        assert run(command.format(here=here) + " --overwrite") == 1
        told = capsys.readouterr().err
        assert "what is read is never written over" in told or "would be taken twice" in told
    assert everything() == before


def test_a_split_is_there_as_a_whole(here, monkeypatch):
    from megalith.data.indexed import merge

    assert run("data split --input oth --output-prefix made --documents 1") == 0
    before, real = everything(), merge.write_spans

    def fail_at_second(spans, prefix):
        if prefix.endswith("0001"):
            raise KeyboardInterrupt
        real(spans, prefix)

    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_spans", fail_at_second)
        assert run("data split --input sm --output-prefix made --documents 1 --overwrite") == 130
    assert everything() == before
    # Fewer: no piece of the earlier one stays
    assert run("data split --input sm --output-prefix made --documents 1 --overwrite") == 0
    assert [IndexedDataset(f"made-000{number}")[0].tolist() for number in range(2)] == [[1, 2], [3]]
    assert sorted(pathlib.Path().glob("*made*")) == [
        pathlib.Path(f"made-000{n}{suffix}") for n in range(2) for suffix in (".bin", ".idx")
    ]


@pytest.mark.parametrize("prefix", ["out.bin", "out.idx", "folder/"])
def test_a_prefix_is_no_file(here, capsys, prefix):
    for command in ("merge --input sm", "convert --input sm"):
        assert run(f"data {command} --output-prefix {prefix}") == 1
        assert "--output-prefix" in capsys.readouterr().err
    assert not list(pathlib.Path().glob("out*")) and not pathlib.Path("folder").exists()


def test_a_folder_where_a_file_shall_be(here, capsys):
    pathlib.Path("out.idx").mkdir()
    assert run("data merge --input sm --output-prefix out --overwrite") == 1
    assert "and this is a folder; found 'out.idx'" in capsys.readouterr().err
    os.mkfifo("pipe")
    assert run("config --output pipe --force") == 1
    assert "no ordinary file" in capsys.readouterr().err and pathlib.Path("pipe").is_fifo()


def test_a_folder_that_was_given_stays_the_same(here, models):
    """A mount point, or a folder in one that cannot be written: its lock and what is being written lie inside."""
    pathlib.Path("made").mkdir()
    number = os.stat("made").st_ino
    for more in ("", " --overwrite"):
        assert run(FOLDERS["export"].format(models=models) + more) == 0
        assert os.stat("made").st_ino == number and not [name for name in os.listdir("made") if name[0] == "."]


@pytest.mark.parametrize("verb", ["inspect", "merge", "weights"])
def test_a_folder_does_not_hide_the_dataset_of_its_name(here, capsys, verb):
    pathlib.Path("sm").mkdir()
    pathlib.Path("sm/notes.txt").write_text("no dataset")
    command = {
        "inspect": "inspect {}",
        "merge": "merge --input {} --output-prefix all --overwrite",
        "weights": "weights --input {} --output l --overwrite",
    }[verb]
    for name in ("sm", "./sm"):
        assert run("data " + command.format(name)) == 0, capsys.readouterr().err
        assert {"inspect": "2 documents", "merge": "2 documents", "weights": "1 datasets"}[
            verb
        ] in capsys.readouterr().out
    assert run("data " + command.format("sm/")) == 1  # the folder, asked for as such
    dataset("sm/other", [7], [8], [9])
    assert run("data " + command.format("sm")) == 1
    told = capsys.readouterr().err
    assert "may mean two things" in told and "sm.bin" in told and "sm/" in told
    for name, count in (("sm.bin", 2), ("sm/", 3)):
        assert run("data " + command.format(name)) == 0
        assert verb == "weights" or f"{count} documents" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["merge", "split", "convert"])
@pytest.mark.parametrize(
    ("prefix", "cure"), [("made.bin", "Write made."), ("made.idx", "Write made."), ("made/", "Write made/NAME.")]
)
def test_an_output_prefix_is_neither_file_nor_folder(here, capsys, verb, prefix, cure):
    command = f"data {verb} --input oth --output-prefix {prefix}" + " --documents 1" * (verb == "split")
    before = everything()
    assert run(command) == 1 and everything() == before
    assert cure in capsys.readouterr().err
