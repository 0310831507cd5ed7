"""The commands of a shell script, with its variables replaced, without running any program: bash runs the script, and
each program that it would start is written down instead.

bash itself reads the script, because nothing else expands arrays, arithmetic and functions as it does. Assignments,
conditions, loops and functions act; programs do not, except a few that only print (READERS). Output redirected by the
script's own echo and printf is left out too.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from megalith.common.errors import ConfigError, problem

READERS = (  # programs that print and change nothing, which scripts need to know where they are and how much there is
    "dirname", "basename", "date", "hostname", "nproc", "wc", "cat", "head", "tail", "cut", "sort", "uniq", "seq", "tr",
    "grep", "realpath", "readlink", "expr", "uname", "whoami", "id",
)  # fmt: skip
TIMEOUT = 60.0  # seconds; a script that waits for what a program would have made never ends
END = "\n"  # after the words of a command, each of which ends with NUL
# (`! true` fails without ending a script that has set -e.)
# A DEBUG trap runs before each simple command; where it fails, bash (extdebug) skips the command. BASH_COMMAND is the
# command's text before expansion, so that it is expanded here, where "$@" is the script's own.
PRELUDE = r"""
shopt -s extdebug
PATH=$1; __file=$2; shift 2
__write() { printf '%s\0' "$@" $'\n' >>"$__file"; }
command_not_found_handle() { __write "$@"; }
# Sets __skip: run (bash does it), write (a program), leave (neither); of a command's text and its first word, expanded.
__judge() {
    __skip=write
    case $1 in
        '(('*|'[['*|for\ *|select\ *|case\ *) __skip=run ;;
        *) case $2 in
            exec|__write) ;;
            echo|printf|cat) if [[ $1 =~ \>[^\&] ]]; then __skip=leave; else __skip=run; fi ;;
            */*) ;;
            *) if [[ -z $2 || -n $(type -t -- "$2") ]]; then __skip=run; fi ;;
        esac ;;
    esac
}
__prefix='^[A-Za-z_][A-Za-z0-9_]*=("[^"]*"|'\''[^'\'']*'\''|([^][:space:]"'\''`(){}[]|\$\{[A-Za-z0-9_]*\})*)[[:space:]]+(.*)$'
__dynamic=$'[$"\'`\\\\~]'
__assignment='^[A-Za-z_][A-Za-z0-9_]*(\[[^]]*\])?\+?='
trap '
    __text=$BASH_COMMAND
    while [[ $__text =~ $__prefix ]]; do __text=${BASH_REMATCH[3]}; done
    if [[ $__text =~ $__assignment ]]; then :; else
        __first=${__text%%[[:space:]]*}
        if [[ $__first =~ $__dynamic ]]; then
            if eval "__words=($__first)" 2>/dev/null; then __first=${__words[0]-}; else __first=/; fi
        fi
        __judge "$__text" "$__first"
        if [[ $__skip == run ]]; then :
        elif [[ $__skip == leave ]]; then ! true
        elif [[ $__first == exec ]]; then
            __text=${__text#exec}
            if [[ $__text =~ ^[[:space:]]*([0-9]*[\<\>]|$) ]]; then ! true
            else eval "__write $__text"; builtin exit 0
            fi
        else eval "__write $__text"; ! true
        fi
    fi' DEBUG
source "$0" "$@"
"""


def commands(script: pathlib.Path, arguments: Sequence[str] = ()) -> list[list[str]]:
    """The words of every program that a bash script would start, in order.

    Raises ConfigError where bash cannot run it, as where a variable that it needs is not set.
    """
    bash = shutil.which("bash")
    if bash is None:
        raise ConfigError("--from-script needs bash, which is not on this machine.")
    with tempfile.TemporaryDirectory(prefix="megalith-script-") as folder:
        programs, file = pathlib.Path(folder, "bin"), pathlib.Path(folder, "words")
        programs.mkdir()
        file.touch()
        for name in READERS:
            if path := shutil.which(name):
                (programs / name).symlink_to(path)
        words = [bash, "-c", PRELUDE, str(script), str(programs), str(file), *arguments]
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT, errors="replace"
            )
        except subprocess.TimeoutExpired as error:
            rule = f"must end within {TIMEOUT:g} s, without the programs that it would start"
            raise ConfigError(problem("--from-script", str(script), rule, "Pass its training command alone")) from error
        found = _split(file.read_text(encoding="utf-8", errors="replace"))
    if done.returncode and not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"status {done.returncode}"
        rule = f"must be a bash script that runs ({said})"
        raise ConfigError(problem("--from-script", str(script), rule, "Set the variables that it needs, and try again"))
    return found


def _split(text: str) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for word in text.split("\0")[:-1]:
        if word == END:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]
