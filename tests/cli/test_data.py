"""`megalith data`: every verb from the command line."""

import json
import pathlib
import subprocess
import sys

import pytest

from megalith.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100"]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} {i + 1}", "body": "5"}) + "\n" for i in range(20)) + "oops\n")
    return str(path)


def preprocess(corpus, tmp_path, *more):
    return main(
        [
            "data",
            "preprocess",
            "--input",
            corpus,
            "--output-prefix",
            str(tmp_path / "out"),
            "--workers",
            "1",
            *NULL,
            *more,
        ]
    )


def test_preprocess_with_old_flags(corpus, tmp_path, capsys):
    old = [
        "--dataset-impl",
        "mmap",
        "--chunk-size",
        "25",
        "--json-key",
        "body",
        "--log-interval",
        "1",
        "--seq-length",
        "8",
    ]
    assert preprocess(corpus, tmp_path, *old) == 0
    out, err = capsys.readouterr()
    assert "20 documents" in out and "out_body_document.bin" in out
    for flag in ("--dataset-impl", "--chunk-size", "--log-interval", "--seq-length"):
        assert f"{flag} is not needed: " in err
    assert "--json-key is now --json-keys" in err
    assert f"skipped {corpus}:21: malformed JSON" in err and "out_preprocess.json lists 1" in err


def test_values_of_old_flags_are_checked(corpus, tmp_path, capsys):
    assert (
        preprocess(corpus, tmp_path, "--dataset-impl", "mmmap") == 2
        and preprocess(corpus, tmp_path, "--chunk-size", "many") == 2
    )
    error = capsys.readouterr().err
    assert (
        "--dataset-impl must be one of lazy, cached, mmap; found 'mmmap'. Write --dataset-impl mmap (" in error
        and "--chunk-size: invalid int value: 'many'" in error
    )


def test_preprocess_dry_run_and_errors(corpus, tmp_path, capsys):
    assert preprocess(corpus, tmp_path, "--dry-run") == 0
    assert "would write" in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))
    assert preprocess(corpus, tmp_path, "--on-error", "fail") == 1
    assert "corpus.jsonl:21: malformed JSON" in capsys.readouterr().err
    assert preprocess(corpus, tmp_path, "--on-eror", "fail") == 2
    assert "--on-error" in capsys.readouterr().err
    assert preprocess(corpus, tmp_path, "--workers", "-3") == 2


def test_care(corpus, tmp_path, capsys):
    out = str(tmp_path / "out_text_document")
    (tmp_path / "pieces").mkdir()
    assert preprocess(corpus, tmp_path) == 0
    assert (
        main(["data", "split", "--input", out, "--output-prefix", str(tmp_path / "pieces/numbers"), "--documents", "8"])
        == 0
    )
    assert main(["data", "merge", "--input", str(tmp_path / "pieces"), "--output-prefix", str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole.idx").read_bytes() == pathlib.Path(out + ".idx").read_bytes()
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "pieces"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [entry["num_documents"] for entry in facts] == [8, 8, 4]
    assert main(["data", "inspect", out, "--verify", "--show", "3", *NULL]) == 0
    shown = capsys.readouterr().out
    assert "sound" in shown and "--- document 3\n3 4" in shown and "largest_token 20" in shown
    (tmp_path / "epochs.yaml").write_text("numbers: 2\n")
    listed = ["data", "weights", "--input", str(tmp_path / "pieces"), "--output", str(tmp_path / "list.txt")]
    assert main([*listed, "--epochs", str(tmp_path / "epochs.yaml")]) == 0
    assert "numbers      3" in capsys.readouterr().out
    assert (tmp_path / "list.txt").read_text().splitlines()[0] == "0.4 pieces/numbers-0000 numbers"
    (tmp_path / "epochs.yaml").write_text("[1")
    assert main([*listed, "--epochs", str(tmp_path / "epochs.yaml")]) == 1
    for number in (0, 2):
        (tmp_path / f"pieces/numbers-000{number}.idx").write_bytes(b"MMIDIDX")
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "pieces")]) == 1
    shown, told = capsys.readouterr()
    assert "numbers-0001: mmap" in shown and "numbers-0000" in told and "numbers-0002" in told


def test_misnamed_index_is_named(tmp_path, capsys):
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.bin.idx").write_bytes(b"")
    assert main(["data", "inspect", str(tmp_path / "a")]) == 1
    assert "mv " in capsys.readouterr().err


def test_bpe_then_preprocess(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("the cat sat on the mat " * 20)
    tokenizer = str(tmp_path / "tokenizer.json")
    assert main(["data", "bpe", "--input", str(tmp_path / "a.txt"), "--vocab-size", "270", "--output", tokenizer]) == 0
    words = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"]
    text = str(tmp_path / "a.txt")
    assert (
        main(["data", "preprocess", "--input", text, "--output-prefix", str(tmp_path / "o"), "--workers", "1", *words])
        == 0
    )
    assert (
        main(["data", "inspect", str(tmp_path / "o_text_document"), "--show", "0", "--tokenizer-model", tokenizer]) == 0
    )
    assert "the cat sat" in capsys.readouterr().out


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_convert(tmp_path):
    source = str(SHARED / "megatron/indexed/old22-gpt2bpe")
    assert (
        main(
            [
                "data",
                "convert",
                "--input",
                source + "-lazy",
                "--output-prefix",
                str(tmp_path / "o"),
                "--vocab-size",
                "50257",
            ]
        )
        == 0
    )
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"o{suffix}").read_bytes() == pathlib.Path(source + suffix).read_bytes()


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom megalith.cli.main import main\n"
        "try:\n    main(['data', 'preprocess', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'orjson'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "example" in done.stdout
