"""Preprocess: Megatron's bytes, the same for any workers, parts, packing and interruption; bad input listed by line."""

import dataclasses
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import tokenizers

from megalith.common.errors import ConfigError, DataError
from megalith.data.corpus import preprocess as module
from megalith.data.corpus.preprocess import PreprocessOptions, plan, preprocess
from megalith.data.indexed import IndexedDataset
from megalith.data.tokenizers.tokenizer import TokenizerOptions, build_tokenizer

ROOT = pathlib.Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.exists(), reason="needs the data of ../shared, which is not part of the project"
)
NULL = TokenizerOptions(tokenizer_type="NullTokenizer", vocab_size=5000)


def gpt2():
    files = {"vocab_file": str(SHARED / "gpt2/vocab.json"), "merge_file": str(SHARED / "gpt2/merges.txt")}
    return TokenizerOptions(tokenizer_type="GPT2BPETokenizer", **files)


def bert():
    return TokenizerOptions(
        tokenizer_type="BertWordPieceLowerCase", vocab_file=str(SHARED / "bert/bert-base-uncased-vocab.txt")
    )


def content(prefix):
    return tuple(pathlib.Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx"))


def rows(prefix):
    return [row.tolist() for row in IndexedDataset(prefix)[:]]


def numbers(path, count=400, seed=1, keys=("text",)):
    """A corpus for NullTokenizer; returns the expected rows."""
    draw = random.Random(seed)
    documents = [
        {key: " ".join(str(draw.randrange(5000)) for _ in range(draw.randrange(1, 60))) for key in keys}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return [[int(i) for i in document[keys[0]].split()] for document in documents]


def run(tmp_path, source, name="out", **options):
    settings = {"tokenizer": NULL, "workers": 1} | options
    return preprocess(PreprocessOptions(input=[str(source)], output_prefix=str(tmp_path / name), **settings))


@needs_shared
def test_bytes_of_megatron(tmp_path):
    result = run(tmp_path, SHARED / "megatron/indexed/sample.jsonl", tokenizer=gpt2(), append_eod=True)
    assert content(result.prefixes["text"]) == content(SHARED / "megatron/indexed/old22-gpt2bpe")
    assert (result.documents, result.tokens) == (120, 102014)
    assert result.prefixes == {"text": str(tmp_path / "out_text_document")}


@needs_shared
@pytest.mark.parametrize("documents", [150, pytest.param(1188, marks=pytest.mark.slow)])
def test_same_bytes_for_any_workers_parts_and_packing(tmp_path, documents):
    lines = gzip.decompress((SHARED / "loose_json/gutenberg_docs.jsonl.gz").read_bytes()).splitlines(keepends=True)[
        :documents
    ]
    plain, packed = tmp_path / "plain.jsonl", tmp_path / "packed.jsonl.gz"
    plain.write_bytes(b"".join(lines))
    packed.write_bytes(gzip.compress(plain.read_bytes(), 1))
    common = {"tokenizer": gpt2(), "append_eod": True}
    first = run(tmp_path, plain, "one", workers=1, **common)
    expected = content(first.prefixes["text"])
    for name, source, options in (
        ("two", plain, {"workers": 2}),
        ("parts", plain, {"workers": 2, "partitions": 4}),
        ("gzip", packed, {"workers": 2, "partitions": 3}),
        ("unaccelerated", plain, {"workers": 2, "fast": False}),
    ):
        assert content(run(tmp_path, source, name, **options, **common).prefixes["text"]) == expected, name
    backend = build_tokenizer(**dataclasses.asdict(gpt2())).backend
    made = IndexedDataset(first.prefixes["text"])
    assert made.num_documents == first.documents == documents
    texts = [json.loads(line)["text"] for line in plain.read_text().splitlines()]
    for number in range(0, documents, 40):
        assert made[number].tolist() == [*backend.encode(texts[number]).ids, 50256]


@needs_shared
def test_sentences(tmp_path):
    source = SHARED / "loose_json/wikitext2_test_articles.jsonl"
    fast = run(tmp_path, source, "fast", tokenizer=bert(), split_sentences=True, workers=2, partitions=3)
    plain = run(tmp_path, source, "plain", tokenizer=bert(), split_sentences=True, fast=False)
    assert content(fast.prefixes["text"]) == content(plain.prefixes["text"])
    assert fast.prefixes["text"].endswith("_text_sentence")
    data = IndexedDataset(fast.prefixes["text"])
    assert data.num_documents == fast.documents == 60
    assert len(data) == fast.sequences > 60 * 10
    assert data.lengths.min() > 0


def test_keys_stay_aligned(tmp_path):
    lines = [{"title": str(i), "body": f"{i} {i + 1}" if i % 3 else ""} for i in range(30)] + [{"title": "7"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = run(tmp_path, tmp_path / "a.jsonl", json_keys=("title", "body"), partitions=5)
    titles, bodies = rows(result.prefixes["title"]), rows(result.prefixes["body"])
    assert [title[0] for title in titles] == [body[0] for body in bodies] == [i for i in range(30) if i % 3]
    assert result.num_problems == 11


def test_bos_and_eod(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "1 2"}\n{"text": "3"}\n')
    (tmp_path / "mine_bos.py").write_text(
        "from megalith.data.tokenizers.other import NullTokenizer\nclass Mine(NullTokenizer):\n    bos = 77\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        own = dataclasses.replace(NULL, tokenizer_type="mine_bos:Mine")
        result = run(tmp_path, tmp_path / "a.jsonl", tokenizer=own, prepend_bos=True, append_eod=True)
        assert rows(result.prefixes["text"]) == [[77, 1, 2, 5000], [77, 3, 5000]]
    finally:
        sys.path.remove(str(tmp_path))
    with pytest.raises(DataError, match="must have the bos token"):
        run(tmp_path, tmp_path / "a.jsonl", "other", prepend_bos=True)


def test_tokens_that_the_tokenizer_and_an_option_both_add_are_reported(tmp_path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, "a"))
    model.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    tokenizer = TokenizerOptions(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.json")
    )
    lines = []
    options = PreprocessOptions(
        input=[str(tmp_path / "a.jsonl")],
        output_prefix=str(tmp_path / "out"),
        tokenizer=tokenizer,
        prepend_bos=True,
        append_eod=True,
    )
    assert rows(preprocess(options, notice=lines.append).prefixes["text"]) == [[0, 0, 2, 1]]
    assert [line.partition(";")[0] for line in lines if "twice" in line] == [
        "--prepend-bos: the tokenizer itself puts id 0 before every text, and documents get it twice"
    ]


BAD = [
    b'{"text": "1"}',
    b'{"text": "2"',
    b'{"body": "3"}',
    b"",
    b'{"text": "  "}',
    b'{"text": "\xe9"}',
    b'{"text": "4"}',
    b'{"text": "7 x"}',
]


def test_bad_lines_are_listed_by_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(BAD))
    for parts in (1, 4):
        result = run(tmp_path, path, f"out{parts}", partitions=parts, max_unusable=1.0)
        assert rows(result.prefixes["text"]) == [[1], [4]]
        assert result.num_problems == 5
        kinds = [
            "2: malformed JSON",
            "3: missing key 'text'",
            "5: empty document",
            "6: not UTF-8",
            "8: Text for NullTokenizer must be token ids separated by spaces; found '7 x'",
        ]
        assert [line.startswith(f"{path}:{kind}") for line, kind in zip(result.problems, kinds)] == [True] * 5
        report = json.loads(pathlib.Path(result.report).read_text())
        assert report["result"]["problems"] == result.problems


def test_on_error_fail_names_the_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "1"}\n' * 50 + b"\n".join(BAD))
    for parts in (1, 7):
        with pytest.raises(DataError, match=r"bad\.jsonl:52: malformed JSON.*--on-error skip"):
            run(tmp_path, path, f"out{parts}", partitions=parts, on_error="fail")
        assert not list(tmp_path.glob("out*.bin"))


def test_problems_are_counted_beyond_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REPORTED_PROBLEMS", 5)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "1"}\n' + b"x\n" * 300)
    result = run(tmp_path, tmp_path / "a.jsonl", max_unusable=1.0)
    assert (result.num_problems, len(result.problems)) == (300, 5)


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('[\n{"text": "1"},\n{"text": "2"}]\n')
    with pytest.raises(DataError, match=r"no usable document(.|\n)*a.jsonl:1: a JSON list"):
        run(tmp_path, tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match="no usable document"):
        run(tmp_path, tmp_path / "b.jsonl", "b")


def test_done_work_is_not_done_again_and_other_work_not_overwritten(tmp_path):
    expected = numbers(tmp_path / "a.jsonl")
    first = run(tmp_path, tmp_path / "a.jsonl")
    assert rows(first.prefixes["text"]) == expected
    before = os.stat(first.prefixes["text"] + ".bin").st_mtime_ns
    lines = []
    options = PreprocessOptions(input=[str(tmp_path / "a.jsonl")], output_prefix=str(tmp_path / "out"), tokenizer=NULL)
    again = preprocess(options, notice=lines.append)
    assert "nothing to do" in lines[0]
    assert again.tokens == first.tokens and os.stat(first.prefixes["text"] + ".bin").st_mtime_ns == before
    with pytest.raises(DataError, match="--overwrite"):
        run(tmp_path, tmp_path / "a.jsonl", append_eod=True)
    replaced = run(tmp_path, tmp_path / "a.jsonl", append_eod=True, overwrite=True)
    assert rows(replaced.prefixes["text"])[0] == [*expected[0], 5000]
    assert not (tmp_path / "out.parts").exists()


@pytest.mark.slow
def test_finished_parts_are_kept_only_for_the_same_job(tmp_path, monkeypatch):
    numbers(tmp_path / "a.jsonl")
    expected = content(run(tmp_path, tmp_path / "a.jsonl", "expected").prefixes["text"])
    seen = []

    class Stop(Exception):
        pass

    def stop(record, total):
        seen.append(record["part"])
        if len(seen) == 4:
            raise Stop

    options = PreprocessOptions(
        input=[str(tmp_path / "a.jsonl")], output_prefix=str(tmp_path / "out"), tokenizer=NULL, workers=1, partitions=8
    )
    with pytest.raises(Stop):
        preprocess(options, progress=stop)
    lines = []
    result = preprocess(options, notice=lines.append)
    assert result.resumed_parts >= 4 and any("resuming" in line for line in lines)
    assert content(result.prefixes["text"]) == expected
    # Other settings: nothing is reused.
    seen.clear()
    with pytest.raises(Stop):
        preprocess(dataclasses.replace(options, overwrite=True), progress=stop)
    lines.clear()
    other = preprocess(dataclasses.replace(options, overwrite=True, append_eod=True), notice=lines.append)
    assert other.resumed_parts == 0 and any("starting anew" in line for line in lines)
    # The input changed: nothing is reused either.
    seen.clear()
    with pytest.raises(Stop):
        preprocess(dataclasses.replace(options, overwrite=True), progress=stop)
    changed = numbers(tmp_path / "a.jsonl", seed=2)
    assert rows(preprocess(dataclasses.replace(options, overwrite=True)).prefixes["text"]) == changed


def test_killed_between_the_datasets_of_two_keys(tmp_path, monkeypatch):
    numbers(tmp_path / "a.jsonl", keys=("title", "body"))
    expected = run(tmp_path, tmp_path / "a.jsonl", "expected", json_keys=("title", "body"))
    real, calls = module.merge_datasets, []

    def die_at_second(parts, prefix, ready):
        calls.append(prefix)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(parts, prefix, ready)

    monkeypatch.setattr(module, "merge_datasets", die_at_second)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "a.jsonl", json_keys=("title", "body"))
    assert (tmp_path / "out_title_document.idx").exists() and not (tmp_path / "out_body_document.idx").exists()
    result = run(tmp_path, tmp_path / "a.jsonl", json_keys=("title", "body"))
    assert result.resumed_parts == 1
    for key in ("title", "body"):
        assert content(result.prefixes[key]) == content(expected.prefixes[key])


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kill_and_go_on(tmp_path, packed):
    source = tmp_path / "a.jsonl"
    numbers(source, count=6000)
    if packed:
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
        source = tmp_path / "a.jsonl.gz"
    expected = content(run(tmp_path, source, "expected").prefixes["text"])
    command = [
        sys.executable,
        "-m",
        "megalith",
        "data",
        "preprocess",
        "--input",
        str(source),
        "--output-prefix",
        str(tmp_path / "out"),
    ]
    command += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "5000", "--workers", "2", "--partitions", "60"]
    draw, kills = random.Random(packed), 0
    for _ in range(30):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        wanted = len(list(tmp_path.glob("out.parts/*.json"))) + draw.randrange(1, 20)
        while process.poll() is None and len(list(tmp_path.glob("out.parts/*.json"))) < wanted:
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)  # the parent alone: its workers must notice
        process.wait()
        kills += 1
    assert process.returncode == 0, process.stderr.read().decode()
    assert kills >= 1
    assert content(tmp_path / "out_text_document") == expected
    assert not (tmp_path / "out.parts").exists()


def test_a_dead_worker_is_an_error_that_says_how_to_go_on(tmp_path):
    numbers(tmp_path / "a.jsonl", count=50)
    (tmp_path / "deadly.py").write_text(
        "import os\nfrom megalith.data.tokenizers.other import NullTokenizer\n"
        "class Deadly(NullTokenizer):\n    def encode_flat(self, texts):\n        os._exit(9)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(DataError, match="run the same command again"):
            run(tmp_path, tmp_path / "a.jsonl", tokenizer=dataclasses.replace(NULL, tokenizer_type="deadly:Deadly"))
    finally:
        sys.path.remove(str(tmp_path))


def test_wrong_options_are_listed_together(tmp_path):
    numbers(tmp_path / "a.jsonl", count=3)
    options = {"json_keys": ("a", "a"), "workers": -1, "on_error": "maybe", "lang": "englsh"}
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, tmp_path / "a.jsonl", **options)
    assert all(flag in str(caught.value) for flag in ("--json-keys", "--workers", "--on-error", "--lang"))
    with pytest.raises(ConfigError, match="engine"):
        run(tmp_path, tmp_path / "a.jsonl", engine="threads")
    (tmp_path / "a.txt").write_text("1")
    with pytest.raises(ConfigError, match="plain text"):
        run(tmp_path, tmp_path / "a.txt", json_keys=("a", "b"))


def test_texts_the_tokenizer_refuses_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "word"}\n')
    with pytest.raises(DataError, match="token ids separated by spaces"):
        run(tmp_path, tmp_path / "a.jsonl")


def test_plan(tmp_path):
    numbers(tmp_path / "a.jsonl", count=3)
    options = PreprocessOptions(
        input=[str(tmp_path)], output_prefix="x", tokenizer=NULL, json_keys=("a", "b"), append_eod=True
    )
    text = plan(options)
    assert "1 files" in text and "x_a_document.bin and .idx as uint16" in text and "x_b_document" in text
    with pytest.raises(DataError, match="must have the bos token"):
        plan(dataclasses.replace(options, prepend_bos=True))


def test_plain_text_is_said_to_be_one_document(tmp_path):
    (tmp_path / "in").mkdir()
    notes = []
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text("1 2")
        options = PreprocessOptions(
            input=[str(tmp_path / "in")], output_prefix=str(tmp_path / name[0]), tokenizer=NULL, workers=1
        )
        preprocess(options, notice=notes.append)
    rest = "which --split cannot divide; JSON lines hold a document a line"
    assert f"{tmp_path}/in/a.txt is plain text and becomes one document, {rest}" in notes
    assert f"2 files are plain text and become one document each, {rest}" in notes
