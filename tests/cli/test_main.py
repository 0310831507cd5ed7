"""The command: verbs found lazily, errors as messages and exit statuses, torch not imported for nothing."""

import errno
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
import types
import warnings

import pytest

import megalith
from megalith.cli import main as command
from megalith.common.errors import ConfigError, DataError


def run(*argv):
    return command.main(argv)


@pytest.fixture
def verb(monkeypatch):
    """Install a verb `try` whose handler is the given function."""

    def install(handler):
        module = types.ModuleType("megalith.cli.try")

        def register(subparsers):
            parser = subparsers.add_parser("try", help="a test")
            parser.add_argument("--steps", type=int, default=1)
            parser.add_argument("--seed", type=int, required=False)
            parser.set_defaults(handler=handler)

        module.register = register
        monkeypatch.setitem(sys.modules, "megalith.cli.try", module)
        monkeypatch.setitem(command.VERBS, "try", "a test")

    return install


@pytest.mark.parametrize("name", command.VERBS)
def test_every_verb_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        run(name, "--help")
    assert ended.value.code == 0
    assert f"megalith {name}" in capsys.readouterr().out.split("example", 1)[1]


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_names_every_verb_and_imports_none(argv, capsys, monkeypatch):
    monkeypatch.setattr(importlib, "import_module", None)
    with pytest.raises(SystemExit) as ended:
        run(*argv)
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name:12}{line}\n" in text for name, line in command.VERBS.items()) and "megalith demo" in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        run("--version")
    assert capsys.readouterr().out.startswith("megalith 0.")


def test_status_of_a_handler(verb):
    verb(lambda args: args.steps)
    assert run("try") == 1 and run("try", "--steps", "0") == 0
    verb(lambda args: None)
    assert run("try") == 0


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ConfigError("wrong flag"), 2, "megalith: wrong flag\n"),
        (DataError("bad file"), 1, "megalith: bad file\n"),
        (KeyboardInterrupt(), 130, "megalith: interrupted\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.bin"),
            1,
            "megalith: [Errno 28] No space left on device: 'x.bin'. Free space or correct the path, and give the "
            "same command again; "
            "what was finished is kept.\n",
        ),
    ],
)
def test_errors_become_messages_and_statuses(verb, capsys, error, status, message):
    def handler(args):
        raise error

    verb(handler)
    assert run("try") == status
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "Free space"),
        (errno.EDQUOT, "Free space"),
        (errno.ENOENT, "Correct the path"),
        (errno.EACCES, "Ask its owner"),
        (errno.EROFS, "can only be read"),
        (errno.ENOTDIR, "in the place of a folder"),
        (errno.EISDIR, "a file is needed"),
        (errno.EEXIST, "in the way"),
        (errno.EFBIG, "raise the limit"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EIO, "failed"),
    ],
)
def test_an_error_of_the_system_has_its_own_cure(verb, capsys, number, cure):
    """Free space was advised for a missing folder."""

    def handler(args):
        raise OSError(number, os.strerror(number), "x.bin")

    verb(handler)
    assert run("try") == 1
    told = capsys.readouterr().err
    assert cure in told and "'x.bin'" in told and ("Free space" in told) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_every_rank_says_what_is_wrong(verb, capsys, monkeypatch):
    """A launcher ends the others as soon as one has ended, so the first to fail may be the only one that is heard."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run("nothing") == 2
    assert "unknown verb" in capsys.readouterr().err


def test_ranks_of_a_torchrun_say_the_same_once(verb, capsys, monkeypatch, tmp_path):
    """Whoever is first says it; what one rank alone has to say is said."""

    def handler(args):
        raise DataError(f"{args.steps} (on rank {os.environ['RANK']} of 2, after step 7)")

    verb(handler)
    for rank, words, said in (("1", "4", True), ("0", "4", False), ("0", "5", True)):
        (tmp_path / "attempt_0" / rank).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt_0" / rank / "error.json"))
        monkeypatch.setenv("RANK", rank)
        assert run("try", "--steps", words) == 1
        text = f"megalith: {words} (on rank {rank} of 2, after step 7)"
        assert capsys.readouterr().err == (f"{text}\n" if said else "")
        # For torchrun's own report
        assert json.loads((tmp_path / "attempt_0" / rank / "error.json").read_text())["message"] == text
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    assert run("try", "--steps", "4") == 1 and "megalith: 4" in capsys.readouterr().err


@pytest.mark.parametrize("bug", [RuntimeError("bug"), OSError(errno.EBADF, "Bad file descriptor")])
def test_bugs_keep_their_traceback(verb, bug):
    def handler(args):
        raise bug

    verb(handler)
    with pytest.raises(type(bug)):
        run("try")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["pretrian"], "unknown verb pretrian: did you mean pretrain?"),
        (["xyz"], "unknown verb xyz: there are demo, "),
        (
            ["try", "--stpes", "3", "--sed", "1"],
            "unknown flag --stpes: did you mean --steps?; unknown flag --sed: did you mean --seed?",
        ),
        (
            ["generate", "--laod", "x"],
            "2 problems\n  1. unknown flag --laod: did you mean --load?\n  2. the following arg",
        ),
        (
            ["data", "bpe", "--inptu=x"],
            "1. unknown flag --inptu: did you mean --input?\n  2. the following arguments are required: ",
        ),
        (["try", "--ste", "3"], "unknown flag --ste: did you mean --steps?"),
        (["try", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["try", "word"], "unexpected word"),
    ],
)
def test_wrong_arguments(verb, capsys, argv, message):
    verb(lambda args: 0)
    assert run(*argv) == 2
    assert message in capsys.readouterr().err


def test_a_verb_may_read_its_arguments_itself(verb):
    seen = []
    verb(lambda args: 0)
    module = sys.modules["megalith.cli.try"]

    def register(subparsers):
        subparsers.add_parser("try").set_defaults(handler=lambda args: seen.append(args.reading), reads=list)

    module.register = register
    assert run("try", "--anything", "-1", "goes") == 0 and seen == [["--anything", "-1", "goes"]]


@pytest.mark.parametrize(
    "argv", [["--help"], ["pretrain", "--help"], ["pretrain", "gpt", "--hiden-size", "3", "--recipe", "cpu-tiny"]]
)
def test_answers_without_torch_or_numpy(argv):
    """The reason why --help and a wrong flag answer at once."""
    code = (
        "import sys\nfrom megalith.cli.main import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'numpy', 'rich', 'tokenizers'} & set(sys.modules)\n    print('HEAVY', sorted(heavy))"
    )
    found = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert "HEAVY []" in found.stdout, found.stderr


def test_python_m_megalith():
    found = subprocess.run([sys.executable, "-m", "megalith", "pretran"], capture_output=True, text=True, check=False)
    assert found.returncode == 2 and found.stderr == "megalith: unknown verb pretran: did you mean pretrain?\n"


def test_python_m_megalith_beside_a_folder_of_that_name(tmp_path):
    """As in the parent of a clone whose editable installation is found by a hook, after the folders of sys.path."""
    (tmp_path / "megalith").mkdir()
    code = (
        "import runpy, sys\nfrom importlib.machinery import PathFinder\nroot = sys.argv.pop(1)\n"
        "class Editable:\n    def find_spec(name, path=None, target=None):\n"
        "        return PathFinder.find_spec(name, [root + '/megalith' if '.' in name else root]) if name[:8] == "
        "'megalith' else None\n"
        "sys.meta_path.append(Editable)\nrunpy.run_module('megalith', run_name='__main__', alter_sys=True)"
    )
    root = command.__file__.removesuffix("/megalith/cli/main.py")
    argv = [sys.executable, "-S", "-c", code, root, "--version"]
    found = subprocess.run(argv, cwd=tmp_path, env={}, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and found.stdout.startswith("megalith 0."), found.stderr


def test_a_closed_pipe_is_no_error():
    code = f"{sys.executable} -m megalith pretrain --help | head -1"
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
    assert found.stdout.startswith("usage: megalith pretrain") and "Traceback" not in found.stderr


DATA, CHECKPOINT = "preprocess merge split convert inspect weights bpe", "inspect verify edit import export reshape"
EVERY = [[verb] for verb in command.VERBS]
EVERY += [["data", verb] for verb in DATA.split()] + [["checkpoint", verb] for verb in CHECKPOINT.split()]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_shows_choices_whole_and_defaults_of_lists(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")  # a line for each flag
    with pytest.raises(SystemExit):
        run(*words, "--help")
    text = capsys.readouterr().out
    assert not re.search(r"^  --[a-z-]+ [A-Z]+_[A-Z_]+", text, re.MULTILINE), "a metavar that repeats the flag"
    for line in text.splitlines():
        flag, _, about = line.strip().partition("  ")
        if flag.startswith("--print-config"):
            assert flag == "--print-config {changed,all,none}"
        if flag.startswith("--json-keys"):
            assert about.endswith("(default: text)")
        if flag.startswith("--qkv-layout"):
            assert "{auto,grouped,thirds,interleaved}" in flag
    if words[-1] in ("import", "export", "reshape"):
        assert re.search(r"\n  SOURCE +what to read.*\n  FOLDER +new folder to write", text)


def test_a_wrong_model_is_one_problem(capsys):
    assert run("pretrain", "gtp", "--dry-run") == 2
    assert capsys.readouterr().err == "megalith: unknown model gtp: did you mean gpt?\n"


@pytest.mark.parametrize(
    ("typed", "cure"), [("1k", "1000, or 1024"), ("2K", "2000, or 2048"), ("1M", "1000000, or 1048576")]
)
def test_a_length_in_thousands(capsys, typed, cure):
    assert run("pretrain", "gpt", "--recipe", "cpu-tiny", "--seq-length", typed, "--dry-run") == 2
    assert f"Write --seq-length {cure}." in capsys.readouterr().err


def test_megaliths_warnings_are_printed_as_other_lines_are(capsys):
    source = str(pathlib.Path(megalith.__file__).parent / "data/build.py")
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with command.warnings_as_notices():
            warnings.warn_explicit("nothing there", UserWarning, source, 7)
            warnings.warn_explicit("of another", UserWarning, "/elsewhere/torch.py", 7)
    assert capsys.readouterr().err == "megalith: nothing there\n"
    assert [str(each.message) for each in heard] == ["of another"]


@pytest.mark.parametrize(
    ("words", "told"), [(["pretrain"], True), (["pretrain", "--dry-run"], False), (["demo"], False)]
)
def test_a_run_whose_output_is_closed_says_so(words, told, monkeypatch, capfd):
    def handler(args):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    module = types.ModuleType(f"megalith.cli.{words[0]}")
    module.register = lambda subparsers: subparsers.add_parser(words[0]).set_defaults(handler=handler, reads=list)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(os, "dup2", lambda one, other: None)  # pytest's own output stays open
    assert run(*words) == 141
    assert ("standard output was closed by what read it, so the run has ended too" in capfd.readouterr().err) == told
