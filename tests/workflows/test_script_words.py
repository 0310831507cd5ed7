"""Scripts are read as bash reads them, and no program that they name is started."""

import pathlib

import pytest

from megalith.common.errors import ConfigError
from megalith.workflows.script_words import commands

SCRIPT = r"""#!/bin/bash
set -euo pipefail
export CUDA_DEVICE_MAX_CONNECTIONS=1
N=${N:-4}
HERE="$(cd "$(dirname "$0")" && pwd)"
DATA="--data-path $1 \
  --split 1,2,3"
ARGS=(--a "x y" --n $((N*2)))
mkdir -p made
module load cuda
echo text > written
echo more >> kept
LINES_OF_HOSTS=$(cat hosts | wc -l)
SPACED=${UNSET:-a b}
for number in 1 2; do FOO=${N} BAR=$N /bin/rm hosts; done
for number in 1 2; do FOO="a b" /usr/bin/touch touched$number; done
run() { local start=(python train.py); "${start[@]}" "${ARGS[@]}" "${@:2}" $DATA --hosts $LINES_OF_HOSTS "$SPACED"; }
run one two 2>&1 | tee log
if [[ $N -gt 3 ]]; then A=1 B="c d" torchrun --x "$HERE"/train.py; else never; fi
exec > everything 2>&1
exec /usr/bin/python3 -m mine "$@"
after
"""


def test_what_a_script_would_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("hosts").write_text("a\nb\n")
    pathlib.Path("kept").write_text("kept\n")
    pathlib.Path("s.sh").write_text(SCRIPT)
    found = commands(tmp_path / "s.sh", ["my data"])
    data = ["--data-path", "my", "data", "--split", "1,2,3"]
    assert ["mkdir", "-p", "made"] in found and ["module", "load", "cuda"] in found
    assert [words for words in found if "touch" in words[0]] == [["/usr/bin/touch", f"touched{n}"] for n in (1, 2)]
    assert ["python", "train.py", "--a", "x y", "--n", "8", "two", *data, "--hosts", "2", "a b"] in found
    assert found.count(["/bin/rm", "hosts"]) == 2
    assert ["torchrun", "--x", f"{tmp_path}/train.py"] in found
    assert found[-1] == ["/usr/bin/python3", "-m", "mine", "my data"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "kept", "s.sh"]
    assert pathlib.Path("kept").read_text() == "kept\n"


def test_variables_of_the_command_count(tmp_path, monkeypatch):
    (tmp_path / "s.sh").write_text("python train.py ${N:-4} ${M:?the size}\n")
    with pytest.raises(ConfigError, match="the size"):
        commands(tmp_path / "s.sh")
    monkeypatch.setenv("N", "9")
    monkeypatch.setenv("M", "2")
    assert commands(tmp_path / "s.sh") == [["python", "train.py", "9", "2"]]


def test_a_script_that_is_none(tmp_path):
    (tmp_path / "s.sh").write_text("if then\n")
    with pytest.raises(ConfigError, match="must be a bash script that runs"):
        commands(tmp_path / "s.sh")


def test_no_file_is_written(tmp_path, monkeypatch):
    """Redirections of a program, a builtin, a reader, a loop and a group; a match in between is the script's own."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("log").write_text("kept\n")
    pathlib.Path("s.sh").write_text(
        "if [[ a12 =~ ([0-9]+) ]]; then n=${BASH_REMATCH[1]}; fi\n"
        "lines=$(cat log 2>/dev/null | wc -l)\n"
        "torchrun --n $n --lines $lines 'a > log' \"b > log\" 1> log 2>&1\n"
        "python x.py >> log 2> errors &\n"
        "echo one >| log; printf two > new; cat log > copy; sort -o log s.sh; kill $$; kill -9 $PPID\n"
        "[ b \\> a ] && python y.py &> log\n"
        "for i in 1 2; do python loop.py $i; done > log || python full.py\n"
        "{ python group.py; } > log || true\n"
        "exec > >(tee log) 2> errors\n"
        "exec python end.py 3 > log\n"
    )
    found = commands(tmp_path / "s.sh")
    assert [words for words in found if words[0] != "tee"] == [
        ["torchrun", "--n", "12", "--lines", "1", "a > log", "b > log"], ["python", "x.py"], ["python", "y.py"],
        ["python", "full.py"], ["python", "end.py", "3"],
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {"log", "s.sh"} and pathlib.Path("log").read_text() == "kept\n"
