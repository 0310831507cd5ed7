"""`megalith generate` on a run: what it shows and writes, its flags, its prompt files, and docs/generation.md."""

import io
import json
import pathlib
import re
import shlex

import pytest

import megalith
from megalith.cli.main import main
from megalith.generation.generate import complete, score
from megalith.generation.params import GenerationParams
from megalith.workflows.prompt_files import read_prompts

DOCS = (pathlib.Path(__file__).parents[2] / "docs" / "generation.md").read_text()


def command(*words: object) -> int:
    return main(["generate", "--device", "cpu", "--max-new-tokens", "12", *map(str, words)])


def test_command_streams_one_text(run, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    expected = megalith.generate(model, "Once", seed=1, max_new_tokens=12, top_k=40, temperature=0.8)[0]
    words = ("--load", folder, "--prompt", "Once", "--seed", 1, "--top-k", 40, "--temperature", 0.8)
    for more in ((), ("--no-stream",)):
        assert command(*words, *more) == 0
        assert capsys.readouterr().out == expected + "\n"


def test_command_with_several_texts(run, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    expected = megalith.generate(model, ["Once", "Z"], seed=1, num_samples=2, max_new_tokens=12)
    words = ("--load", folder, "--prompt", "Once", "--prompt", "Z", "--seed", 1, "--num-samples", 2)
    for more in ((), ("--stream",)):
        assert command(*words, *more) == 0
        assert capsys.readouterr().out == f"\n{'-' * 40}\n".join(expected) + "\n"


def test_command_with_files(run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    plain, lines, out = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    plain.write_text("Once\n\nZürich\n", encoding="utf-8")
    lines.write_text('{"prompt": "Once"}\n"Zürich"\n', encoding="utf-8")
    expected = megalith.generate(model, ["Once", "Zürich"], temperature=0, max_new_tokens=12)
    for file in (plain, lines):
        assert (
            command(
                "--load",
                folder,
                "--prompt-file",
                file,
                "--greedy",
                "--out-file",
                out,
                *(["--overwrite"] if file is lines else []),
            )
            == 0
        )
        records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [one["prompt"] + one["continuation"] for one in records] == expected
        assert {one["finish"] for one in records} <= {"stop", "length"} and str(out) in capsys.readouterr().out


def test_blank_lines_of_a_prompt_file_are_named(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    def read(name: str, text: str) -> tuple[list[str], str]:
        (tmp_path / name).write_text(text, encoding="utf-8")
        prompts, _ = read_prompts(None, str(tmp_path / name), GenerationParams())
        return prompts, capsys.readouterr().err

    prompts, said = read("p.txt", "a\n\nb\n  \n")
    assert prompts == ["a", "b"] and "p.txt: left out 2 blank lines (2, 4), which hold no prompt" in said
    assert read("p.txt", "\ufeffa\x0cb\u2028c\r\nd") == (["a\x0cb\u2028c", "d"], "")
    prompts, said = read("p.jsonl", '""\n\n{"prompt": "x"}\n')
    assert prompts == ["", "x"] and "1 blank line (2)" in said


def test_command_reads_standard_input_or_nothing(
    run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, model = run
    for text, prompt in (("Once upon\na time\n", "Once upon\na time"), ("", "")):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert command("--load", folder, "--seed", 3) == 0
        assert capsys.readouterr().out == megalith.generate(model, prompt, seed=3, max_new_tokens=12)[0] + "\n"


def test_command_with_beams(run, capsys: pytest.CaptureFixture) -> None:
    folder, model = run
    assert command("--load", folder, "--prompt", "Once", "--beam-width", 3, "--num-samples", 2) == 0
    expected = megalith.generate(model, "Once", beam_width=3, num_samples=2, max_new_tokens=12)
    assert capsys.readouterr().out == f"\n{'-' * 40}\n".join(expected) + "\n"
    assert command("--load", folder, "--prompt", "Once", "--beam-width", 3, "--greedy") == 2


def test_command_names_what_is_wrong(run, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    folder, _ = run
    broken = tmp_path / "p.jsonl"
    broken.write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    cases = [
        (("--load", tmp_path / "none", "--vocab-file", "no.txt"), 1, "2 problems\n  1. --load must name a file"),
        (("--load", tmp_path / "none", "--prompt", "a"), 1, "none"),
        (("--load", folder, "--prompt-file", tmp_path / "none.txt"), 1, "none.txt"),
        (("--load", folder, "--prompt-file", broken), 1, "line 2"),
        (("--load", folder, "--prompt", "a", "--top-p", 3), 2, "--top-p"),
        (("--load", folder, "--prompt", "a", "--temprature", 3), 2, "--temperature"),
        (("--load", folder, "--prompt", "a", "--dtype", "int8"), 2, "--dtype"),
    ]
    for words, status, named in cases:
        assert command(*words) == status
        assert named in capsys.readouterr().err


def records(folder: pathlib.Path, prompts: pathlib.Path | str, *words: object) -> list[dict]:
    """The objects of --out-file for a prompt file, or for one prompt."""
    source = ("--prompt-file", prompts) if isinstance(prompts, pathlib.Path) else ("--prompt", prompts)
    out = folder / "out.jsonl"
    assert command("--load", folder, *source, "--out-file", out, "--overwrite", *words) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_lines_of_a_prompt_file_have_options_of_their_own(run, tmp_path: pathlib.Path, capsys) -> None:
    folder, model = run
    file, own = tmp_path / "p.jsonl", [{}, {"temperature": 0.2, "seed": 5}, {"greedy": True, "max_new_tokens": 3}]
    own += [
        {"num_samples": 2, "stop": list("abcdefghinorstu ")},
        {"beam_width": 2, "num_samples": 2, "temperature": 1.0, "top_k": 0},
    ]
    file.write_text("".join(json.dumps({"prompt": "Once", "id": 7, **options}) + "\n" for options in own))
    made = records(folder, file, "--top-k", 20, "--seed", 4)
    assert "p.jsonl: keys that are no options are not used: id" in capsys.readouterr().err
    base = GenerationParams(max_new_tokens=12, top_k=20, seed=4)
    expected = complete(model, ["Once"] * 5, params=[base.replace(**options) for options in own])
    assert [one["continuation"] for one in made] == [one.continuation for one in expected] and len(made) == 7
    assert {"score"} == made[6].keys() - made[0].keys()
    assert "stop" in (made[3]["finish"], made[4]["finish"]) and made[2]["tokens"] == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "temprature": 1}', "p.jsonl, line 2: unknown option temprature: did you mean temperature?"),
        ('{"prompt": "a", "max_tokens": 1}', "line 2: unknown option --max-tokens: it is --max-new-tokens here"),
        ('{"prompt": "a", "temperature": "hot"}', "line 2: --temperature must be a number; found 'hot'. It is: logits"),
        ('{"prompt": "a", "top_p": 2}', "line 2: --top-p must lie between 0 (off) and 1; found 2.0. Try 0.9."),
        ('{"prompt": "a", "logit_bias": {"x": 2}}', "line 2: --logit-bias must be numbers by token number; found"),
        ('{"prompt": "a", "beam_width": 2}', "line 2: --beam-width must be given without .*; found 2 and top_k."),
    ],
)
def test_options_that_cannot_work_are_told_with_their_line(line: str, message: str, tmp_path, capsys) -> None:
    (tmp_path / "p.jsonl").write_text(f'"b"\n{line}\n')
    assert command("--load", tmp_path, "--prompt-file", tmp_path / "p.jsonl", "--top-k", 4) == 2
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), capsys.readouterr().err)


FLAGS = {  # every option as it is typed, without those that other tests have
    "--top-p 0.9 --top-p-decay 0.9 --top-p-bound 0.5": {"top_p": 0.9, "top_p_decay": 0.9, "top_p_bound": 0.5},
    "--min-p 0.1 --repetition-penalty 1.3": {"min_p": 0.1, "repetition_penalty": 1.3},
    "--presence-penalty 0.5 --frequency-penalty -0.5": {"presence_penalty": 0.5, "frequency_penalty": -0.5},
    "--logit-bias 40=-inf 41=2.5": {"logit_bias": {40: float("-inf"), 41: 2.5}},
    "--min-new-tokens 5 --stop-token-ids 40 41": {"min_new_tokens": 5, "stop_token_ids": (40, 41)},
    "--stop a --stop bc": {"stop": ("a", "bc")},
    "--stop-on-eol": {"stop_on_eol": True},
    "--stop-on-double-eol --prevent-newline-after-colon": {
        "stop_on_double_eol": True, "prevent_newline_after_colon": True,
    },
    "--add-bos --no-echo": {"add_bos": True, "echo": False},
    "--no-stop-at-eod": {"stop_at_eod": False},
    "--ignore-eod --greedy": {"stop_at_eod": False, "temperature": 0.0},
    "--beam-width 3 --length-penalty 0.5 --num-samples 3": {"beam_width": 3, "length_penalty": 0.5, "num_samples": 3},
}  # fmt: skip


def test_flags_are_the_options(monkeypatch: pytest.MonkeyPatch, run) -> None:
    given = []
    monkeypatch.setattr("megalith.generation.generate.complete", lambda *args, **named: given.append(named) or [])
    for flags, options in FLAGS.items():
        assert command("--load", run[0], "--prompt", "a", *shlex.split(flags)) == 0
        assert given[-1]["params"] == [GenerationParams(max_new_tokens=12, **options)], flags
        assert (given[-1]["batch_invariant"], given[-1]["compile"]) == (True, False)
    assert command("--load", run[0], "--prompt", "a", "--no-batch-invariant", "--compile") == 0
    assert (given[-1]["batch_invariant"], given[-1]["compile"]) == (False, True)


def test_log_probabilities_are_written(run, capsys) -> None:
    folder, model = run
    (made,) = records(folder, "Once upon", "--seed", 2, "--logprobs", "--top-logprobs", 3, "--prompt-logprobs")
    (expected,) = complete(
        model, "Once upon", seed=2, max_new_tokens=12, logprobs=True, top_logprobs=3, prompt_logprobs=True
    )
    assert made["ids"] == expected.ids and made["prompt_ids"] == expected.prompt_ids
    for name in ("logprobs", "prompt_logprobs"):
        assert made[name] == pytest.approx(getattr(expected, name), abs=1e-5)
    for name in ("top_logprobs", "prompt_top_logprobs"):
        assert [[token for token, _ in top] for top in made[name]] == [
            [t for t, _ in top] for top in getattr(expected, name)
        ]
        assert all(len(top) == 3 for top in made[name])
    (scored,) = records(folder, "Once upon", "--max-new-tokens", 0, "--prompt-logprobs")
    assert scored["prompt_logprobs"] == pytest.approx(score(model, "Once upon")[0], abs=1e-5) and not scored["ids"]
    for name in ("--logprobs", "--prompt-logprobs"):
        assert command("--load", folder, "--prompt", "a", name) == 2
        assert "--out-file must be given with log-probabilities" in capsys.readouterr().err


def test_without_echo_only_what_is_new_is_shown(run, capsys) -> None:
    folder, model = run
    (made,) = complete(model, "Once", seed=1, max_new_tokens=12)
    for stream in ("--stream", "--no-stream"):
        assert command("--load", folder, "--prompt", "Once", "--seed", 1, "--no-echo", stream) == 0
        assert capsys.readouterr().out == made.continuation + "\n"
    assert command("--load", folder, "--prompt", "Once", "--max-new-tokens", 0) == 0
    assert capsys.readouterr().out == "Once\n"
    assert command("--load", folder, "--prompt", "Once", "--beam-width", 2, "--stream") == 2
    assert "must be left out where texts are streamed" in capsys.readouterr().err


def test_what_docs_generation_says_runs(run, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder, _ = run
    monkeypatch.chdir(tmp_path)
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/first").symlink_to(folder)
    alone, _, _ = DOCS.partition("## Several processes")  # see parallel/test_load_layouts.py
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", alone, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"sh", "json", "python"}
    pathlib.Path("prompts.jsonl").write_text(next(body for language, body in blocks if language == "json"))
    for language, body in blocks:
        for line in body.splitlines() if language == "sh" else ():
            assert main([*shlex.split(line)[1:], "--device", "cpu"]) == 0, line
        if language == "python":
            exec(body, {})
    assert len(pathlib.Path("texts.jsonl").read_text().splitlines()) == 4
    assert len(capsys.readouterr().out.splitlines()) > 6
