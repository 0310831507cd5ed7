"""`megalith detoxify`: a model becomes less toxic, at a price that is stated, also where it was killed at any step."""

import contextlib
import dataclasses
import io
import json
import pathlib
import re

import pytest

from megalith.cli.main import main
from megalith.reports.table import number_text
from megalith.workflows.detoxify.options import STEPS
from megalith.workflows.detoxify.state import State, Step, fingerprint
from megalith.workflows.detoxify.toxicity import EXPECTED
from megalith.workflows.detoxify.verbs import Verbs

WORDS = """--num-samples 64 --samples-per-file 40 --continuations 5 --continuation-tokens 8 --train-iters 10 --lr 1e-2
    --global-batch-size 8 --seed 3 --keep-fraction 0.3 --device cpu"""


def command(place: pathlib.Path, output: pathlib.Path, *more: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    files = {"load": "model", "prompt-file": "prompts.jsonl", "valid-data": "held_out.jsonl"}
    words = [word for name, file in files.items() for word in (f"--{name}", str(place / file))]
    words += ["--output", str(output), "--scorer-path", str(place / "bad_words.txt"), *WORDS.split()]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(["detoxify", *words, "--train-flags=--progress none", *map(str, more)])
    return status, out.getvalue(), error.getvalue()


@pytest.fixture(scope="session")
def made(place: pathlib.Path) -> tuple[pathlib.Path, str]:
    """The folder of a whole pipeline, and what it printed."""
    status, shown, told = command(place, place / "out")
    assert status == 0, told
    return place / "out", shown


def numbers(output: pathlib.Path) -> dict:
    return json.loads((output / "report.json").read_text())


def test_the_toxic_share_falls_and_the_price_is_stated(made: tuple[pathlib.Path, str]) -> None:
    output, shown = made
    report = numbers(output)
    before, after = ({name: each["value"] for name, each in report[when].items()} for when in ("before", "after"))
    assert before[EXPECTED] > 0.3 and after[EXPECTED] < 0.7 * before[EXPECTED]
    assert after["toxicity probability"] < before["toxicity probability"]
    assert after["toxic continuations"] < 0.7 * before["toxic continuations"]
    assert before["prompts"] == 4 and before["continuations"] + before["without a score"] == 20
    assert after["perplexity"] > before["perplexity"]  # half of the held texts are of the kind that it unlearns
    samples = report["samples"]
    assert samples["texts"] == 64 and samples["kept"] == int((64 - samples["without a score"]) * 0.3)
    assert samples["mean toxicity of the kept"] < samples["mean toxicity"]
    for name in (EXPECTED, "toxicity probability", "perplexity"):
        row = [line for line in shown.splitlines() if line.strip().startswith(f"{name} ")][-1]
        assert number_text(before[name]) in row and number_text(after[name]) in row
    page = (output / "report.html").read_text()
    assert all(name in page for name in (EXPECTED, "perplexity", "Texts of its own")) and "<script" not in page


def test_its_commands_are_those_of_other_verbs(made: tuple[pathlib.Path, str]) -> None:
    _, shown = made
    verbs = re.findall(r"^\$ megalith (\w+)", shown, re.MULTILINE)
    assert verbs == ["generate", "generate", "data", "pretrain", *["generate"] * 2, "evaluate"]


def test_what_is_done_is_not_done_again(place: pathlib.Path, made: tuple[pathlib.Path, str]) -> None:
    status, shown, told = command(place, made[0])
    assert (status, shown) == (0, "") and told.splitlines() == [f"{name}: done already" for name in STEPS]
    status, shown, _ = command(place, made[0], "--dry-run")
    assert status == 0 and [line.partition(",")[0] for line in shown.splitlines()] == [f"{n}: done" for n in STEPS]


class Killed(BaseException):
    """What ends a process at a chosen point."""


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_a_step_and_resumed_it_comes_to_the_same(
    step: str, place: pathlib.Path, made: tuple[pathlib.Path, str], tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Ended after the first of the files that another verb makes, or where the step has written all that it writes, and
    its mark does not say so yet.
    """
    run, call = State.run, Verbs.__call__

    def first_call(verbs: Verbs, *words: object) -> None:
        call(verbs, *words)
        raise Killed

    with monkeypatch.context() as patch:

        def dies(self: State, wanted: Step, overwrite: bool) -> bool:
            def work() -> None:
                wanted.work()
                raise Killed

            if wanted.name == step and step in ("generate", "continue"):
                patch.setattr(Verbs, "__call__", first_call)
            elif wanted.name == step:
                return run(self, dataclasses.replace(wanted, work=work), overwrite)
            return run(self, wanted, overwrite)

        patch.setattr(State, "run", dies)
        with pytest.raises(Killed):
            command(place, tmp_path / "out")
    mark = json.loads((tmp_path / "out" / "state" / f"{step}.json").read_text())
    assert mark["outputs"] is None
    status, _, told = command(place, tmp_path / "out")
    assert status == 0 and f"{step}: resumes" in told
    same(tmp_path / "out", made[0])


def same(found: pathlib.Path, expected: pathlib.Path) -> None:
    """Equal numbers, texts and weights."""
    one, other = numbers(found), numbers(expected)
    one.pop("settings"), other.pop("settings")
    assert one == other
    for name in ("kept.jsonl", "kept_text_document.bin", "scored", "continued"):
        assert fingerprint(found / name) == fingerprint(expected / name), name


def test_training_that_is_stopped_half_way_is_resumed(
    place: pathlib.Path, made: tuple[pathlib.Path, str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in training is a run that saves and ends with status 0; the next call goes on, to the same bits."""
    call = Verbs.__call__

    def stopped(self: Verbs, *words: object) -> None:
        call(self, *words, *(["--exit-interval", 4] if words[0] == "pretrain" else []))

    with monkeypatch.context() as patch:
        patch.setattr(Verbs, "__call__", stopped)
        status, _, told = command(place, tmp_path / "out")
    assert status == 1 and "Training ended at step 4 of 10. Give the same command again to resume it." in told
    status, _, told = command(place, tmp_path / "out")
    assert status == 0 and "filter: done already" in told and "finetune: resumes" in told, told
    same(tmp_path / "out", made[0])


def test_another_setting_is_an_error_and_overwrite_makes_it_anew(
    place: pathlib.Path, made: tuple[pathlib.Path, str], tmp_path: pathlib.Path
) -> None:
    steps = ("--steps", "generate", "score", "filter")
    assert command(place, tmp_path / "out", *steps)[0] == 0
    kept = (tmp_path / "out" / "kept.jsonl").read_text()
    assert kept == (made[0] / "kept.jsonl").read_text()
    status, _, told = command(place, tmp_path / "out", *steps, "--keep-fraction", 0.25)
    assert status == 1 and "Step filter must be as when it was begun" in told
    assert "found keep_fraction 0.25, which was 0.3. Add --overwrite" in told
    assert (tmp_path / "out" / "kept.jsonl").read_text() == kept
    status, _, told = command(place, tmp_path / "out", *steps, "--keep-fraction", 0.25, "--overwrite")
    assert status == 0 and "score: done already" in told and "filter: begins" in told
    assert len((tmp_path / "out" / "kept.jsonl").read_text().splitlines()) in (15, 16)
    (tmp_path / "out" / "kept.jsonl").write_text(kept)
    status, _, told = command(place, tmp_path / "out", *steps, "--keep-fraction", 0.25)
    assert status == 1 and "kept.jsonl changed" in told
    (tmp_path / "out" / "state" / "score.json").write_text("{")
    status, _, told = command(place, tmp_path / "out", "--steps", "score")
    assert status == 1 and "score.json'. Remove it, and add --overwrite" in told
    (tmp_path / "out" / "state" / "score.json").unlink()
    status, _, told = command(place, tmp_path / "out", "--steps", "score")
    assert status == 1 and "scored, which it has not made. Add --overwrite" in told
    status, _, told = command(place, tmp_path / "out", "--steps", "report")
    assert status == 1 and "measured must be there for step report" in told and "Do the steps before it" in told


def test_texts_that_there_are_already_are_taken(place: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Megatron's form of a line, and a remote service that has scored but half of them."""
    lines = [
        {"text": "the darn dog"},
        {"text": "the big dog"},
        {"prompt": "", "continuation": "the old cat"},
        {"text": " "},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--samples", tmp_path / "own.jsonl", "--steps", "generate", "score", "filter", "--keep-fraction", 0.7)
    status, _, told = command(place, tmp_path / "out", *words)
    assert status == 0, told
    scores = [json.loads(line)["score"] for line in (tmp_path / "out/scored/00000.jsonl").read_text().splitlines()]
    assert scores == [{"toxicity": 0.5}, {"toxicity": 0.0}, {"toxicity": 0.0}, None]
    kept = [json.loads(line)["text"] for line in (tmp_path / "out/kept.jsonl").read_text().splitlines()]
    assert sorted(kept) == ["the big dog", "the old cat"]


CASES = {
    "--prompt-file nowhere.jsonl": (1, "--prompt-file must be a readable file (No such file"),
    "--prompt-file empty.jsonl": (1, "--prompt-file must hold text, and this file holds none"),
    "--prompt-file blank.jsonl": (1, "blank.jsonl, line 2 must be a prompt: a string"),
    "--prompt-file number.jsonl": (1, 'number.jsonl, line 1 must be a prompt: a string, {"prompt": "..."}'),
    "--prompt-file words.jsonl": (1, "words.jsonl, line 1 must be JSON"),
    "--samples number.jsonl": (1, 'number.jsonl, line 1 must have a string "text"'),
    "--samples nan.jsonl": (1, 'nan.jsonl, line 2 must have a string "text"'),
    "--valid-data nowhere.txt": (1, "--valid-data must be a readable file (No such file"),
    "--valid-data empty.jsonl": (1, "--valid-data must hold text"),
    "--scorer-path nowhere.txt": (1, "--scorer-path must be a readable file (No such file"),
    "--scorer-path empty.jsonl": (2, "--scorer-path must hold words, one a line"),
    "--scorer-path latin1.txt": (1, "not UTF-8 (byte"),
    "--scorer word": (2, "unknown scorer word: did you mean words?"),
    "--scorer judge:Judge": (2, "judge' must be on the Python path"),
    "--scorer finetuned --scorer-path nowhere": (1, "--scorer-path must name a folder that exists; found 'nowhere'"),
    "--load nowhere": (1, "--load must name a file or folder that exists"),
    "--output full": (1, "--output must be a new folder, or one of this verb; found full with notes"),
    "--keep-fraction 0": (2, "--keep-fraction must be above 0, and at most 1; found 0.0"),
    "--threshold nan": (2, "--threshold must be above 0, and at most 1; found nan"),
    "--num-samples 0": (2, "--num-samples must be at least 1; found 0"),
    "--steps filtre": (2, "unknown step filtre: did you mean filter?"),
    "--train-flags=--lrr": (2, "did you mean --lr?"),
    "--num-sample 3": (2, "did you mean --num-samples?"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("wrong")
    files = {
        "empty.jsonl": b"\n \n", "blank.jsonl": b'"a"\n{"prompt": "  "}\n', "number.jsonl": b'{"prompt": 3}\n',
        "words.jsonl": b"the dog\n", "latin1.txt": b"caf\xe9\n",
        "nan.jsonl": b'{"text": "a"}\n{"text": NaN}\n',
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "full").mkdir()
    (folder / "full" / "notes").touch()
    return folder


@pytest.mark.parametrize("line", CASES)
def test_what_is_wrong_is_told_before_anything_begins(
    line: str, place: pathlib.Path, wrong: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(wrong)
    status, message = CASES[line]
    found, shown, told = command(place, wrong / "out", *line.split())
    assert (found, shown) == (status, "") and message in told, told
    assert not (wrong / "out" / "state").exists()


def test_what_is_needed_is_told_at_once() -> None:
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert main(["detoxify", "--scorer", "words"]) == 2
    for name in ("--load", "--output", "--prompt-file", "--valid-data"):
        assert f"{name} must name" in error.getvalue()
