"""Readers: however files are split, the documents of the parts are those of the files; bad lines are separated."""

import gzip
import json
import pathlib
import shutil
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.common.errors import DataError
from megalith.data.corpus import compression, readers
from megalith.data.corpus.inputs import file_format, find_inputs
from megalith.data.corpus.readers import (
    Part,
    Slice,
    corpus_texts,
    explain_line,
    read_part,
    sample_texts,
    split_into_parts,
)


def documents(inputs, part_bytes, keys=("text",)):
    """[(texts, path, absolute line)] and [(path, absolute line)] of problems, by way of parts."""
    good, bad, before = [], [], {}
    for part in split_into_parts(inputs, part_bytes):
        lines = [0] * len(part.slices)
        for index, batch in read_part(part, keys):
            path = part.slices[index].path
            base = before.get(path, 0)
            good += [
                (row, path, base + line) for row, line in zip(zip(*(batch.texts[key] for key in keys)), batch.lines)
            ]
            bad += [(path, base + line) for line, _ in batch.problems]
            lines[index] = batch.num_lines
        for piece, count in zip(part.slices, lines):
            before[piece.path] = before.get(piece.path, 0) + count
    return good, bad


LINE = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30).map(
        lambda text: json.dumps({"text": text}).encode()
    ),
    st.sampled_from(
        [
            b"",
            b"  ",
            b"{",
            b'{"other": 1}',
            b'{"text": 3}',
            b'{"text": "\xff"}',
            b"[1]",
            b"3",
            b'"text"',
            b'{"text": null}',
            b"\r",
        ]
    ),
)


@settings(max_examples=120, deadline=None)
@given(
    files=st.lists(st.tuples(st.lists(LINE, max_size=12), st.booleans()), min_size=1, max_size=4),
    part_bytes=st.integers(1, 90),
    batch=st.integers(1, 50),
    compress=st.booleans(),
)
def test_any_cut_gives_the_same_documents(files, part_bytes, batch, compress):
    folder = pathlib.Path(tempfile.mkdtemp())
    expected, wrong, inputs = [], [], []
    for number, (lines, newline_at_end) in enumerate(files):
        path = folder / f"{number}.jsonl{'.gz' if compress else ''}"
        content = b"\n".join(lines) + (b"\n" if newline_at_end and lines else b"")
        path.write_bytes(gzip.compress(content) if compress else content)
        inputs.append(str(path))
        for at, line in enumerate(content.split(b"\n"), 1):
            try:
                text = json.loads(line.decode())["text"]
                if not isinstance(text, str):
                    raise TypeError
                expected.append(((text,), str(path), at))
            except (ValueError, KeyError, TypeError):
                if line.strip():
                    wrong.append((str(path), at))
    before = readers.BATCH_BYTES
    try:
        readers.BATCH_BYTES = batch
        assert documents(inputs, part_bytes) == (expected, wrong)
    finally:
        readers.BATCH_BYTES = before
        shutil.rmtree(folder)


def test_many_compressed_files_go_to_the_workers_whole(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": f"document {i}"}).encode()))
    inputs = find_inputs([str(tmp_path)])
    assert all(piece.block is None for part in split_into_parts(inputs, 100) for piece in part.slices)
    assert [row[0] for row, _, _ in documents(inputs, 100)[0]] == [f"document {i}" for i in range(20)]


def test_a_finished_part_of_a_stream_comes_without_its_block(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps({"text": "x" * 50}).encode() + b"\n" for _ in range(20))))
    parts = list(split_into_parts([str(path)], 200, frozenset({1})))
    assert [part.slices[0].block is None for part in parts][:3] == [False, True, False]


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".jsonl.gz", ".json", ".ndjson", ".data"])
def test_formats_of_json_lines(tmp_path, suffix):
    content = b'{"text": "one"}\n{"text": "two"}'
    if suffix.endswith(".zst"):
        import zstandard

        content = zstandard.compress(content[:16]) + zstandard.compress(content[16:])  # two frames, as pzstd writes
    elif suffix.endswith(".gz"):
        content = gzip.compress(content[:16]) + gzip.compress(content[16:])  # two members, as `cat a.gz b.gz` makes
    (tmp_path / f"a{suffix}").write_bytes(content)
    assert list(corpus_texts([str(tmp_path / f"a{suffix}")])) == ["one", "two"]


def test_parquet_by_row_group(tmp_path):
    import pyarrow as arrow
    from pyarrow import parquet

    rows = [f"text {i}" for i in range(10)]
    rows[4] = None
    parquet.write_table(arrow.table({"text": rows, "id": list(range(10))}), tmp_path / "a.parquet", row_group_size=3)
    good, bad = documents([str(tmp_path / "a.parquet")], 1)
    assert [(row[0], line) for row, _, line in good] == [(f"text {i}", i + 1) for i in range(10) if i != 4]
    assert bad == [(str(tmp_path / "a.parquet"), 5)]
    with pytest.raises(DataError, match="columns text, id"):
        documents([str(tmp_path / "a.parquet")], 1, ("body",))
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="parquet file"):
        documents([str(tmp_path / "b.parquet")], 1)


def test_plain_text_is_one_document_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("line one\nline two\n")
    (tmp_path / "b.md").write_bytes(b"\xff\xfe")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    good, bad = documents(find_inputs([str(tmp_path)]), 1 << 20)
    assert [row[0] for row, _, _ in good] == ["line one\nline two\n", "packed"]
    assert bad == [(str(tmp_path / "b.md"), 1)]


def test_several_keys_stay_together(tmp_path):
    lines = [{"title": "a", "body": "b"}, {"title": "only"}, {"title": "c", "body": "d"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    good, bad = documents([str(tmp_path / "a.jsonl")], 1 << 20, ("title", "body"))
    assert [row for row, _, _ in good] == [("a", "b"), ("c", "d")]
    assert [line for _, line in bad] == [2]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8 (byte 10 is 0xff)"),
        (b'{"text": "a"', "malformed JSON"),
        (b'{"text": "\\ud800"}', "malformed JSON"),
        (b"[1, 2]", "a JSON list"),
        (b"3", "not a JSON object but int"),
        (b'{"body": 1}', "missing key 'text' (it has 'body')"),
        (b'{"text": null}', "key 'text' is no text but NoneType"),
    ],
)
def test_reasons(line, reason):
    assert reason in explain_line(line, ["text"])


def test_find_inputs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.json.gz", "notes.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    names = [path.removeprefix(str(tmp_path)) for path in find_inputs([str(tmp_path)])]
    assert names == ["/a.jsonl", "/b.jsonl", "/sub/c.json.gz"]
    assert find_inputs([str(tmp_path / "*.jsonl"), str(tmp_path / "a.jsonl")]) == [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
    ]
    assert find_inputs([str(tmp_path / "notes.bin")]) == [str(tmp_path / "notes.bin")]
    with pytest.raises(DataError, match="--input"):
        find_inputs([str(tmp_path / "*.parquet")])


def test_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"text": "x" * 10000}).encode())[:-20])
    with pytest.raises(DataError, match="decompress"):
        list(corpus_texts([str(path)]))


@pytest.mark.parametrize("frames", [1, 2])
def test_damaged_zstd_is_named(tmp_path, frames):
    import zstandard

    path = tmp_path / "a.jsonl.zst"
    path.write_bytes((frames * zstandard.compress(json.dumps({"text": "x" * 10000}).encode() + b"\n"))[:-4])
    with pytest.raises(DataError, match="decompress"):
        list(corpus_texts([str(path)]))


def test_sample_looks_at_all_of_the_input(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i} " * 50}) + "\n" for i in range(1000))
        )
    texts = sample_texts(find_inputs([str(tmp_path)]), ["text"])
    assert {text[0] for text in texts} == {"a", "b"}
    assert len({text.split()[0] for text in texts}) > 40
    assert sample_texts([], ["text"]) == []


def test_file_format():
    assert file_format("x/a.jsonl.gz") == ("json", ".gz")
    assert file_format("a.parquet") == ("parquet", "")
    assert file_format("a.b.txt.zst") == ("text", ".zst")
    assert file_format("corpus") == (None, "")


def test_a_slice_reads_lines_that_begin_in_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\n{"text": "2"}\n{"text": "3"}\n')
    for start, stop, expected in ((0, 14, ["1"]), (0, 15, ["1", "2"]), (1, 14, []), (14, 28, ["2"]), (15, 42, ["3"])):
        part = Part(0, (Slice(str(tmp_path / "a.jsonl"), start, stop),), 0)
        assert [text for _, batch in read_part(part, ["text"]) for text in batch.texts["text"]] == expected


@pytest.mark.parametrize("max_line", [None, 1000])
def test_a_long_line_is_not_read_by_each_part_that_it_covers(max_line, tmp_path, monkeypatch):
    """A line of a gigabyte covers hundreds of parts: to look for its end in each would take hours."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "1"}\n' + b"x" * 200_000 + b'\n{"text": "2"}\n')
    read, original = [], compression.read_checked

    def counting(*args):
        piece = original(*args)
        read.append(len(piece))
        return piece

    monkeypatch.setattr(compression, "read_checked", counting)
    lines = []
    for part in split_into_parts([str(path)], 2000):
        for batch, _ in readers.line_batches(part.slices[0], max_line):
            lines += batch
    assert [lines[0], lines[2]] == [b'{"text": "1"}', b'{"text": "2"}'] and len(lines) == 3
    assert sum(read) < 3 * path.stat().st_size
