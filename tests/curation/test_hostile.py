"""Hostile input: bounded memory, counted and told; and a report that shows it escaped."""

import gzip
import json
import subprocess
import sys

import pytest
import zstandard

from megalith.common.errors import DataError
from megalith.curation.report import report_page
from megalith.data.corpus.compression import read_lines

GOOD = b'{"text": "a good document"}\n'


MEASURE = (
    "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:]);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode)"
)


def run(path, output, *words, verb="ids"):
    """The command in a process of its own: its result, and its peak memory in MB."""
    names = ["data", verb, "--input", str(path), "--output", str(output), "--engine", "inline"]
    command = [sys.executable, "-c", MEASURE, sys.executable, "-m", "megalith", *names, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done, int(done.stdout.split()[-1]) / 1024


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_bomb(kind, tmp_path):
    """300 MB of one line, in some kB; the documents around it are kept."""
    path = tmp_path / f"a.jsonl{kind}"
    bomb = [GOOD, *[b"0" * (1 << 20)] * 300, b"\n", GOOD]
    if kind == ".gz":
        with gzip.open(path, "wb", 1) as file:
            file.writelines(bomb)
    else:
        with open(path, "wb") as raw, zstandard.ZstdCompressor().stream_writer(raw) as file:
            for piece in bomb:
                file.write(piece)
    assert path.stat().st_size < 3_000_000
    done, peak = run(path, tmp_path / "out.jsonl", "--max-unusable", "0.5")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert f"{path}:2: longer than 16.00 MiB" in done.stderr
    assert peak < 250


@pytest.mark.slow
def test_a_line_of_a_gigabyte(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(1 << 10):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD)
    done, peak = run(path, tmp_path / "out.jsonl", "--max-unusable", "0.5", "--partitions", "40")
    assert done.returncode == 0 and len((tmp_path / "out.jsonl").read_text().splitlines()) == 2
    assert f"{path}:2: longer than 16.00 MiB" in done.stderr
    assert peak < 250


def test_lines_that_are_no_documents(tmp_path, step):
    lines = [
        (b'{"text": "a\\u0000b"}', ""),
        (b'{"text": "a\0b"}', "malformed JSON"),
        (b'{"text": "\xff\xfe"}', "UTF-8"),
        (b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested deeper"),
        (b'{"text": "\\ud800"}', "half of a character"),
        (b'{"text": 5}', "is no text but int"),
        (b'["text"]', "a JSON list"),
        (b'{"other": "x"}', "missing key 'text'"),
        (b'{"text": "fine", "n": NaN, "big": 123456789012345678901234567890}', ""),
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in lines))
    records, report = step("clean", str(path), {"rules": ("newlines",)}, max_unusable=1.0)
    assert [record["text"] for record in records] == ["a\0b", "fine"]
    wrong = [(number, reason) for number, (_, reason) in enumerate(lines, 1) if reason]
    assert report["unusable"] == len(wrong)
    for line, (number, reason) in zip(report["problems"], wrong):
        assert line.startswith(f"{path}:{number}: ") and reason in line
    with pytest.raises(DataError, match="--max-unusable"):
        step("clean", str(path), {"rules": ("newlines",)}, "b.out")
    with pytest.raises(DataError, match=r"a.jsonl:2: malformed JSON.*--on-error fail stops"):
        step("clean", str(path), {"rules": ("newlines",)}, "c.out", on_error="fail")


@pytest.mark.parametrize("content", [b"abc", b"abc\n", b"a\nbcdefghij\nk\n", b"", b"0123456789" * 3 + b"\nx"])
@pytest.mark.parametrize("count", [1, 4, 100])
def test_cut_lines_keep_their_number(content, count, tmp_path):
    path = tmp_path / "f"
    path.write_bytes(content)
    lines, consumed = b"", 0
    with open(path, "rb") as stream:
        while found := read_lines(stream, count, str(path), 5):
            if not found[0]:
                break
            lines, consumed = lines + found[0], consumed + found[1]
    assert consumed == len(content)
    expected = content.splitlines()
    found_lines = lines.splitlines()
    assert len(found_lines) == len(expected)
    for line, whole in zip(found_lines, expected):
        assert line == whole or (len(line) >= 6 and whole.startswith(line))


def test_the_report_escapes(tmp_path, step):
    evil = "<script>alert('x')</script>" + "long enough " * 50
    name = "<img src=x onerror=y>"
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text, "source": name}) + "\n" for text in (evil, "short" + evil[:27], evil))
    )
    _, report = step("dedup", str(path), {"source_key": "source", "over_budget": "warn"})
    html = (tmp_path / "out.jsonl.report.html").read_text()
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;" in html
    assert "http" not in report_page("<b>", [report | {"problems": ["<i>"]}]).replace("http-equiv", "")


def test_a_damaged_file_is_an_error(tmp_path, step):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(GOOD * 20_000)[:-200])
    with pytest.raises(DataError, match="must decompress to its end"):
        step("ids", str(path))
    assert not (tmp_path / "out.jsonl").exists()
