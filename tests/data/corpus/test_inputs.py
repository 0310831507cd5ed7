"""Inputs: what a path means, what a file is by its first bytes; files not read are reported; streams are read."""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import pathlib
import struct
import tarfile
import threading

import pytest

from megalith.common.errors import DataError
from megalith.data.corpus.bpe import train_bpe
from megalith.data.corpus.inputs import file_format, find_inputs, format_by_name, resolve_inputs
from megalith.data.corpus.preprocess import PreprocessOptions, plan, preprocess
from megalith.data.corpus.readers import corpus_texts
from megalith.data.indexed import IndexedDataset
from megalith.data.tokenizers.tokenizer import TokenizerOptions, build_tokenizer
from megalith.generation.params import GenerationParams
from megalith.workflows.prompt_files import read_prompts

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"
NULL = TokenizerOptions(tokenizer_type="NullTokenizer", vocab_size=100)


def lines(*numbers):
    return b"".join(json.dumps({"text": str(number)}).encode() + b"\n" for number in numbers)


def texts(*inputs, **options):
    return list(corpus_texts([str(path) for path in inputs], **options))


def pzstd(content):
    import zstandard

    return b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"size" + zstandard.compress(content)


PACKERS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


@pytest.mark.parametrize(
    "name", ["a.jsonl.{}", "a.jsonl", "A.JSONL.{}", "a.jsonl.{}.1", "corpus", "a.jsonl.gz", "a.json-00000-of-00002.{}"]
)
@pytest.mark.parametrize("packer", [*PACKERS, "zst"])
def test_compression_is_known_by_its_first_bytes(tmp_path, packer, name):
    path = tmp_path / name.format(packer)
    path.write_bytes({**PACKERS, "zst": pzstd}[packer](lines(1, 2)) + PACKERS.get(packer, pzstd)(lines(3)))
    assert texts(path) == ["1", "2", "3"]
    assert name == "corpus" or texts(tmp_path) == ["1", "2", "3"]


@pytest.mark.parametrize("packer", ["gz", "bz2", "xz", "zst"])
def test_padding_between_streams_is_read_over_and_damage_there_is_an_error(tmp_path, packer):
    """A damaged second stream (of a dump in many) must not look like the end of the file."""
    pack, path = PACKERS.get(packer, pzstd), tmp_path / "a.jsonl"
    path.write_bytes(pack(lines(1)) + bytes(8) + pack(lines(2)) + bytes(512))
    assert texts(path) == ["1", "2"]
    path.write_bytes(pack(lines(1)) + b"\1" + pack(lines(2))[1:])
    with pytest.raises(DataError, match="damaged"):
        texts(path)


def test_plain_under_a_compressed_name_and_parquet_under_any(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl.gz").write_bytes(lines(1))
    parquet.write_table(pyarrow.table({"text": ["2"]}), tmp_path / "b.json")
    assert texts(tmp_path) == ["1", "2"]
    assert file_format(str(tmp_path / "a.jsonl.gz")) == ("json", "")


def test_long_zstd_windows_are_read(tmp_path):
    import zstandard

    settings = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(lines(1)) + packer.flush())
    assert texts(tmp_path) == ["1"]


@pytest.mark.parametrize(  # mtime: ids are made of contents, and both processes of `make test` must make the same
    ("content", "words"),
    [
        (LFS, r"git LFS pointer to a file of 12,345 bytes, not the file\. Fetch it: git lfs pull"),
        (b"/annex/objects/SHA256E-s10--abc.jsonl\n", "git annex get"),
        (b"PK\x03\x04rest", "zip archive by its first bytes.*unzip"),
        (gzip.compress(b"PK\x03\x04rest", mtime=0), "zip archive inside gz"),
        (bz2.compress(gzip.compress(lines(1), mtime=0)), "a gz file inside bz2.*Decompress it once"),
        (b"\x04\x22\x4d\x18rest", "lz4 -d"),
        (b"SQLite format 3\0", "SQLite"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_what_holds_no_lines_is_an_error_with_its_name(tmp_path, content, words, name):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "b.jsonl").write_bytes(lines(1))
    for named in ([tmp_path], [tmp_path / name, tmp_path / "b.jsonl"], [f"{tmp_path}/*"]):
        with pytest.raises(DataError, match=words) as caught:
            resolve_inputs([str(path) for path in named])
        assert str(tmp_path / name) in str(caught.value)


def test_tar_is_an_error(tmp_path):
    (tmp_path / "x").write_bytes(lines(1))
    with tarfile.open(tmp_path / "a.jsonl.gz", "w:gz") as archive:
        archive.add(tmp_path / "x", "x")
    with pytest.raises(DataError, match="tar archive inside gz"):
        resolve_inputs([str(tmp_path)])


@pytest.mark.parametrize("start", [b"BZh9 is a word", b"PAR1S is another", b"PK is short", b"ORCAS"])
def test_text_may_begin_like_a_format(tmp_path, start):
    (tmp_path / "a.txt").write_bytes(start)
    assert texts(tmp_path) == [start.decode()]


def test_everything_in_a_folder_is_read_or_reported(tmp_path):
    folder, other = tmp_path / "c", tmp_path / "other"
    for name in (
        "a.JSONL",
        "e.jsonl.1",
        "sub/b.jsonl",
        ".hidden.jsonl",
        ".cache/x.jsonl",
        "notes.bin",
        "a.jsonl~",
        "d.jsonl.part",
        "LICENSE",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(1))
    other.mkdir()
    (other / "g.jsonl").write_bytes(lines(1))
    (folder / "link").symlink_to(other)
    (folder / "loop").symlink_to(folder)
    (folder / "again.jsonl").symlink_to(other / "g.jsonl")
    (folder / "dead.jsonl").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "out_preprocess.json").write_text(json.dumps({"key": "a" * 64, "samples": {}}, indent=1))
    train_bpe(["text"], 257, folder / "tokenizer.json")
    (folder / "out.parts").mkdir()
    (folder / "out.parts/key").write_text("a")
    (folder / "out.parts/000001.json").write_text("{}")
    found = resolve_inputs([str(folder)])
    taken = [os.path.relpath(path, folder) for path in found.files]
    assert taken == ["a.JSONL", "again.jsonl", "e.jsonl.1", "sub/b.jsonl"]
    left = {os.path.relpath(path, folder): reason for path, reason in found.not_read}
    assert set(left) == {
        ".hidden.jsonl", ".cache", "notes.bin", "a.jsonl~", "d.jsonl.part", "LICENSE", "loop", "dead.jsonl",
        "pipe.jsonl", "out_preprocess.json", "tokenizer.json", "out.parts", "link/g.jsonl",
    }  # fmt: skip
    notes = []
    assert find_inputs([str(folder)], notes.append) == found.files
    assert all(any(str(folder / name) in line for line in notes) for name in left)
    assert any("hidden" in line for line in notes) and any("links to nothing" in line for line in notes)


def test_texts_about_a_corpus_are_not_of_it(tmp_path):
    """A folder as hubs have them: README.md and LICENSE.txt beside the data.

    Of texts alone nobody can tell them apart.
    """
    for name in ("README.md", "LICENSE.txt", "more.txt", "readmes.txt"):
        (tmp_path / name).write_text("words")
    found = resolve_inputs([str(tmp_path)])
    assert len(found.files) == 4 and not found.not_read
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.jsonl").write_text('{"text": "a"}\n')
    found = resolve_inputs([str(tmp_path)])
    assert [pathlib.Path(path).name for path in found.files] == ["a.jsonl", "more.txt", "readmes.txt"]
    assert {pathlib.Path(path).name for path, _ in found.not_read} == {"README.md", "LICENSE.txt"}
    assert len(resolve_inputs([str(tmp_path / "README.md")]).files) == 1, "named, it is read"


def test_a_long_list_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(1))
    for i in range(30):
        (tmp_path / f"{i}.bin").write_bytes(b"")
    notes = []
    find_inputs([str(tmp_path)], notes.append)
    assert len(notes) == 1 and notes[0].endswith("and 10 more")


def test_folders_matched_by_a_glob_are_read(tmp_path):
    for name in ("x/a.jsonl", "y/b.jsonl", "c.jsonl", "x/n.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(lines(1))
    found = resolve_inputs([f"{tmp_path}/*"])
    assert [os.path.relpath(path, tmp_path) for path in found.files] == ["c.jsonl", "x/a.jsonl", "y/b.jsonl"]
    assert [os.path.relpath(path, tmp_path) for path, _ in found.not_read] == ["x/n.bin"]
    assert sorted(resolve_inputs([f"{tmp_path}/**/*"]).files) == sorted([*found.files, str(tmp_path / "x/n.bin")])


def test_nothing_that_is_read_says_what_is_there(tmp_path):
    (tmp_path / "a.data").write_bytes(b"")
    with pytest.raises(DataError, match=r"which means no file(.|\n)*a.data"):
        resolve_inputs([str(tmp_path)])


def test_format_by_name():
    for name in ("x/e.jsonl.1", "A.JSON", "a.jsonl-00001-of-00008"):
        assert format_by_name(name) == ("json", "")
    assert format_by_name("c4.00000-of-01024.json.gz") == ("json", ".gz")
    assert format_by_name("a.txt.bz2.3") == ("text", ".bz2")
    assert format_by_name("x.2024") == format_by_name("a.jsonl.bak") == (None, "")


@contextlib.contextmanager
def fifo(path, content):
    """A FIFO into which `content` is written once somebody reads."""
    if not path.exists():
        os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(content,), daemon=True)
    writer.start()
    yield str(path)
    writer.join(10)


@contextlib.contextmanager
def standard_input(content):
    """Standard input of this process is a pipe with `content`."""
    reading, writing = os.pipe()
    before = os.dup(0)
    os.dup2(reading, 0)
    os.write(writing, content)
    os.close(writing)
    try:
        yield
    finally:
        os.dup2(before, 0)
        for descriptor in (reading, before):
            os.close(descriptor)


def rows(result):
    return [row.tolist() for row in IndexedDataset(result.prefixes["text"])[:]]


def options(tmp_path, *inputs, **changes):
    return PreprocessOptions(
        input=[str(path) for path in inputs], output_prefix=str(tmp_path / "out"), tokenizer=NULL, workers=1, **changes
    )


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_standard_input(tmp_path, name, pack):
    with standard_input(pack(lines(1, 2) + b"oops\n")):
        if pack is bytes:
            result = preprocess(options(tmp_path, name, max_unusable=1))
            assert rows(result) == [[1], [2]] and result.problems[0].startswith(
                ("standard input:3: malformed", f"{name}:3: malformed")
            )
        else:
            assert texts(name) == ["1", "2"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".") and path.suffix == ".tmp"]


def test_a_stream_among_files_and_the_rest_of_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(1))
    (tmp_path / "z.jsonl").write_bytes(lines(7, 8, 9))
    with fifo(tmp_path / "pipe", lines(4, 5)) as pipe, open(tmp_path / "z.jsonl", "rb") as file:
        os.lseek(file.fileno(), len(lines(7)), os.SEEK_SET)
        inputs = (tmp_path / "a.jsonl", pipe, f"/dev/fd/{file.fileno()}")
        assert rows(preprocess(options(tmp_path, *inputs))) == [[1], [4], [5], [8], [9]]
    with open(tmp_path / "z.jsonl", "rb") as file:  # from its start it is the file itself, which need not be copied
        assert resolve_inputs([f"/dev/fd/{file.fileno()}"]).files == [str(tmp_path / "z.jsonl")]


def test_parquet_and_pointers_come_through_streams_too(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["2"]}), tmp_path / "b.parquet")
    with fifo(tmp_path / "pipe", (tmp_path / "b.parquet").read_bytes()) as pipe:
        assert texts(pipe) == ["2"]
    truncated = gzip.compress(lines(1), mtime=0)[:-9]
    for content, words in (
        (LFS, "this is a git LFS pointer"),
        (b"PK\3\4", "which is a zip archive"),
        (truncated, "damaged"),
    ):
        with fifo(tmp_path / "pipe", content) as pipe, pytest.raises(DataError, match=f"{pipe}.*{words}") as caught:
            preprocess(options(tmp_path, pipe))
        assert ".tmp" not in str(caught.value)  # the stream is named, not its copy


def test_the_same_stream_goes_on_and_is_known_again(tmp_path):
    content = lines(*range(90))

    class Stop(Exception):
        pass

    def stop(record, total):
        if record["part"] == 3:
            raise Stop

    notes = []
    with fifo(tmp_path / "pipe", content) as pipe, pytest.raises(Stop):
        preprocess(options(tmp_path, pipe, partitions=8), progress=stop)
    with fifo(tmp_path / "other", content) as pipe:
        result = preprocess(options(tmp_path, pipe, partitions=8), notice=notes.append)
    assert result.resumed_parts >= 3 and any("resuming" in line for line in notes) and len(rows(result)) == 90
    with fifo(tmp_path / "pipe", content) as pipe:
        preprocess(options(tmp_path, pipe, partitions=8), notice=notes.append)
    assert any("nothing to do" in line for line in notes)
    with fifo(tmp_path / "pipe", lines(1)) as pipe, pytest.raises(DataError, match="other input"):
        preprocess(options(tmp_path, pipe, partitions=8))
    assert {path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")} == {
        "pipe", "other", "out_preprocess.json", "out_text_document.bin", "out_text_document.idx",
    }  # fmt: skip


def test_prompts_from_standard_input():
    with standard_input(b"one\ntwo\n"):
        assert read_prompts(None, "-", GenerationParams())[0] == ["one", "two"]


def test_a_plan_reads_no_stream(tmp_path):
    with standard_input(lines(1)):
        assert "what comes from -" in plan(options(tmp_path, "-", append_eod=True))
        assert rows(preprocess(options(tmp_path, "-", append_eod=True))) == [[1, 100]]


@pytest.mark.parametrize("option", ["vocab_file", "tokenizer_model"])
def test_a_vocabulary_is_no_stream(tmp_path, option, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "v")
    with pytest.raises(DataError, match="must be an ordinary file, because each worker reads it; found 'v'"):
        build_tokenizer("BertWordPieceCase" if option == "vocab_file" else "HFTokenizer", **{option: "v"})


def test_no_input_at_all(tmp_path):
    with standard_input(b""), pytest.raises(DataError, match="no usable document"):
        preprocess(options(tmp_path, "-"))
    assert pathlib.Path("-").exists() is False
