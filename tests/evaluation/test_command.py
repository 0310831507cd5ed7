"""`megalith evaluate`: what it shows and writes, its flags, what it says of wrong ones, and docs/evaluation.md."""

import argparse
import contextlib
import io
import json
import pathlib
import re
import shlex
import shutil

import pytest

import megalith
from megalith.cli.evaluate import model_name
from megalith.cli.main import main
from megalith.evaluation.evaluate import evaluate
from megalith.evaluation.records import read_records
from megalith.testing.ranks import run_ranks
from tests.checkpoint import megatron_files
from tests.evaluation.tasks import write_tasks
from tests.toy import ROOT

DOCS = (ROOT / "docs" / "evaluation.md").read_text()


def command(*words: object) -> tuple[int, str, str]:
    """Exit status, and what this process printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(["evaluate", "--device", "cpu", *map(str, words)])
    return status, out.getvalue(), error.getvalue()


def test_what_is_shown_and_written(gpt2: pathlib.Path, texts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    other = tmp_path / "<b>other</b>"
    shutil.copytree(gpt2, other)
    paths = {name: tmp_path / f"out.{name}" for name in ("json", "html", "examples")}
    written = [word for name, path in paths.items() for word in (f"--{name}", path)]
    words = ("lambada", gpt2, other, "--valid-data", texts / "lambada.jsonl", "--strict-lambada", *written)
    status, shown, told = command(*words)
    assert status == 0 and "1 of 13 passages are longer than 32 tokens and were cut off at the left" in told
    expected = evaluate(megalith.load(gpt2), "lambada", [str(texts / "lambada.jsonl")], strict_lambada=True)
    records = read_records(str(paths["json"]))
    assert [record["model"] for record in records] == [str(gpt2), str(other)]
    for record in records:
        metrics = {name: metric["value"] for name, metric in record["metrics"].items()}
        assert metrics == pytest.approx({name: metric.value for name, metric in expected.metrics.items()})
        assert record["settings"]["strict_lambada"] is True and record["task"] == "lambada"
    for name, metric in expected.metrics.items():
        (row,) = [line for line in shown.splitlines() if line.strip().startswith(f"{name} ")]
        assert metric.definition in row and row.count(f"{metric.value:.6g}") >= 2
    lines = [json.loads(line) for line in paths["examples"].read_text().splitlines()]
    assert [line["right"] for line in lines] == [example["right"] for example in expected.examples] * 2
    page = paths["html"].read_text()
    assert "&lt;b&gt;other&lt;/b&gt;" in page and "<b>other" not in page
    assert not re.search(r"<script|<link|<img|https?:|url\(", page) and "default-src" in page
    status, _, told = command(*words)
    assert status == 1 and "exists, and nothing is replaced unasked. Add --overwrite" in told
    compared = ("--compare", paths["json"], "--html", tmp_path / "all.html")
    status, shown, _ = command("lambada", gpt2, "--valid-data", texts / "lambada.jsonl", *compared)
    assert status == 0 and shown.count("right answers / passages; an answer is the last") == 2  # word, and token
    assert (tmp_path / "all.html").read_text().count("lambada: accuracy") == 1


def test_the_path_chooses_a_detokenizer_and_a_line_says_so(gpt2: pathlib.Path, texts: pathlib.Path) -> None:
    status, _, told = command("wikitext103", gpt2, "--valid-data", texts / "wiki.txt", "--overlapping-eval", 4)
    assert status == 0 and f"--detokenizer wikitext, because of the path {texts / 'wiki.txt'}" in told
    assert "times; --overlapping-eval 32 reads it once" in told
    status, _, told = command("wikitext103", gpt2, "--valid-data", texts / "a.txt")
    assert status == 2 and "--detokenizer must be given, because the path says none" in told


def test_numbers_that_are_not_the_same_are_not_called_so(
    gpt2: pathlib.Path, texts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Windows and the detokenizer are in the definition, what else chooses the weights is in the model's name."""
    how = {"whole": "", "windows": "--seq-length 16", "stride": "--overlapping-eval 5", "cut": "--detokenizer ptb"}
    found = {}
    for name, words in how.items():
        out = tmp_path / f"{name}.json"
        status, _, told = command("ppl", gpt2, "--valid-data", texts / "a.txt", "--json", out, *words.split())
        assert status == 0, told
        (record,) = read_records(str(out))
        found[name] = record["metrics"]["perplexity"]["definition"]
    assert found["whole"] == "by token: exp(min(20, average loss)); windows of 32 tokens, 32 apart"
    assert len(set(found.values())) == 4 and found["cut"].endswith(", detokenizer ptb")
    models = [{}, {"ckpt_step": 20}, {"adapter": "runs/lora"}, {"ckpt_step": 20, "adapter": "runs/lora"}]
    names = [model_name(argparse.Namespace(**{"load": "gpt2", "ckpt_step": None, "adapter": None} | m)) for m in models]
    assert names == ["gpt2", "gpt2, step 20", "gpt2, adapter runs/lora", "gpt2, step 20, adapter runs/lora"]


CASES = {
    "lambada MODEL": (2, "--valid-data must be one file for lambada; found nothing"),
    "lambada MODEL --valid-data none.jsonl": (1, "--valid-data must be a readable file (No such file"),
    "lambada MODEL --valid-data empty.jsonl": (1, "--valid-data must hold text, and this file holds none"),
    "lambada MODEL --valid-data blank.jsonl": (1, "blank.jsonl, line 2 must hold text; found '  '"),
    "lambada MODEL --valid-data word.jsonl": (1, "line 1 must have a word before its last one; found 'one'"),
    "lambada MODEL --valid-data a.txt": (1, "a.txt, line 1 must be JSON"),
    "lambada MODEL --valid-data number.jsonl": (1, 'number.jsonl, line 1 must be a string, or an object with a string'),
    "lambada MODEL --valid-data latin1.jsonl": (1, "not UTF-8 (byte"),
    "ppl MODEL": (2, "--valid-data must name the text to evaluate; found nothing"),
    "ppl MODEL --valid-data mixed.jsonl --source-key form": (1, 'must have the field "form" of --source-key; found'),
    "ppl MODEL --valid-data mixed.jsonl --json-key body": (1, 'an object with a string "body"'),
    "ppl MODEL --valid-data mixed.jsonl --seq-length 64": (2, "--seq-length must be at most 32, the model's"),
    "ppl MODEL --valid-data mixed.jsonl --overlapping-eval 33": (2, "--overlapping-eval must be at most 32"),
    "ppl MODEL --valid-data mixed.jsonl --overlapping-eval 0": (2, "--overlapping-eval must be at least 1; found 0"),
    "ppl MODEL --valid-data mixed.jsonl --json mixed.jsonl": (1, "must not be the input"),
    "ppl MODEL --valid-data mixed.jsonl --detokenizer wiki": (2, "--detokenizer must be one of wikitext, ptb, none"),
    "ppl MODEL --valid-data mixed.jsonl --overlaping-eval 3": (2, "did you mean --overlapping-eval?"),
    "ppl MODEL --valid-data mixed.jsonl --compare a.txt": (1, "--compare must be a file of `megalith evaluate --json`"),
    "lambda MODEL --valid-data mixed.jsonl": (2, "unknown task lambda: did you mean lambada?"),
    "--task RACE --load MODEL": (2, "unknown task race: it is `megalith finetune TASK` here"),
    "ppl --valid-data mixed.jsonl": (2, "MODEL must name a run's folder, a checkpoint"),
    "": (2, "TASK must be one of wikitext103, lambada, ppl, nq; found nothing"),
    "ppl nowhere --valid-data mixed.jsonl": (1, "MODEL must name a file or folder that exists; found 'nowhere'"),
    "--harness a --task ppl MODEL": (2, "The task must be one; found --task ppl and --harness a"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(gpt2: pathlib.Path, texts: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wrong")
    files = {
        "empty.jsonl": b"\n \n", "blank.jsonl": b'{"text": "a b"}\n{"text": "  "}\n',
        "word.jsonl": b'{"text": "one"}\n',
        "number.jsonl": b'{"text": 3}\n', "latin1.jsonl": b'{"text": "caf\xe9 au lait"}\n',
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in ("a.txt", "mixed.jsonl"):
        shutil.copy(texts / name, folder)
    (folder / "MODEL").symlink_to(gpt2)
    return folder


@pytest.mark.parametrize("line", CASES)
def test_what_is_wrong_is_told(line: str, wrong: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(wrong)
    status, message = CASES[line]
    found, shown, told = command(*shlex.split(line))
    assert (found, shown) == (status, "") and message in told, told


@pytest.fixture
def workplace(
    gpt2: pathlib.Path, texts: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> pathlib.Path:
    """The files that docs/evaluation.md names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/first", "gpt2"):
        (tmp_path / name).symlink_to(gpt2)
    for name, there in {"wiki.txt": "wiki.test.tokens", "lambada.jsonl": "lambada_test.jsonl"}.items():
        shutil.copy(texts / name, tmp_path / there)
    for folder, names in ((texts, ("a.txt", "mixed.jsonl")), (gpt2, ("vocab.json", "merges.txt"))):
        for name in names:
            shutil.copy(folder / name, tmp_path)
    config, tensors = megatron_files.model_of(vocab_size=512, bias_gelu_fusion=True)
    megatron_files.write(
        tmp_path / "checkpoints/gpt2_345m", config, tensors, tensor=2, padded=512, args={"bias_gelu_fusion": True}
    )
    write_tasks(tmp_path / "tasks")
    return tmp_path


def blocks() -> list[str]:
    """The commands of the page, each on a line."""
    found = re.findall(r"^```sh\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    return [line for body in found for line in body.replace("\\\n", " ").splitlines()]


def test_what_the_page_says_runs(workplace: pathlib.Path) -> None:
    done = 0
    for line in blocks():
        program, *words = shlex.split(line)
        if program == "megalith" and "--harness" not in words:
            status, shown, told = command(*words[1:])
            assert status == 0 and ("perplexity" in shown or "accuracy" in shown), (line, told)
            done += 1
    assert done == 5
    (body,) = re.findall(r"^```python\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
    exec(body, {})
    assert "no meaning for an evaluation, and no effect: --activations-checkpoint-method (nothing is recomputed" in told
    assert "--no-load-optim (the weights alone are read)" in told and "--log-interval" in told


@pytest.mark.slow
def test_what_the_page_says_of_processes_runs(workplace: pathlib.Path) -> None:
    (line,) = [line for line in blocks() if line.startswith("torchrun")]
    launcher, _, words = line.partition(" evaluate ")
    assert launcher == "torchrun --nproc-per-node 4 -m megalith"
    expected = command(*shlex.split(words)[:4])
    first, *others = run_ranks(in_folder, 4, str(workplace), shlex.split(words))
    assert first[:2] == expected[:2] and others == [(0, "", "")] * 3


def in_folder(folder: str, words: list[str]) -> tuple[int, str, str]:
    with contextlib.chdir(folder):
        return command(*words)
