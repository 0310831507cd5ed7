"""The commands of a shell script, with its variables replaced, without running any program: bash runs the script, and
each program that it would start is written down instead.

bash itself reads the script, because nothing else expands arrays, arithmetic and functions as it does. Assignments,
conditions, loops and functions act; programs do not, except a few that only print (READERS). A command's output goes to
no file, and noclobber keeps every file that a loop or a group of commands is redirected into.
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
set -o noclobber
PATH=$1; __file=$2; shift 2
__write() { printf '%s\0' "$@" $'\n' >>"$__file"; }
command_not_found_handle() { __write "$@"; }
# Sets __text to a command's text without redirections into files (but /dev/null). What is quoted is taken whole.
__without_files() {
    local rest=$1 found; __text=
    while [[ -n $rest ]]; do
        if [[ $rest =~ $__plain || $rest =~ ^\>\&[0-9-]+ || $rest =~ ^\&?\>\>?[[:space:]]*/dev/null ]]; then
            found=${BASH_REMATCH[0]} __text+=${BASH_REMATCH[0]}
        elif [[ $rest =~ $__into_file ]]; then
            found=${BASH_REMATCH[0]}
            if [[ $__text =~ (^|[[:space:]])([0-9]+)$ ]]; then __text=${__text%"${BASH_REMATCH[2]}"}; fi
        else
            found=${rest:0:1} __text+=${rest:0:1}
        fi
        rest=${rest:${#found}}
    done
}
# Sets __skip: run (bash does it), write (a program), leave (neither). Takes a command's text, the same without
# redirections into files, and its first word, expanded.
__judge() {
    __skip=write
    case $1 in
        '(('*|'[['*|for\ *|select\ *|case\ *) __skip=run; return ;;
        kill\ *|enable\ *|sort\ *-o*|uniq\ [!-]*|date\ -s*|date\ --set*|hostname\ [!-]*) __skip=leave; return ;;
    esac
    case $3 in
        exec|__write|*/*) ;;
        *) case $(type -t -- "$3") in
            function|keyword|alias) __skip=run ;;
            builtin|file) if [[ $1 == "$2" ]]; then __skip=run; else __skip=leave; fi ;;
            *) if [[ -z $3 ]]; then __skip=run; fi ;;
        esac ;;
    esac
}
__plain=$'^([^\'"\\\\<>&]+|\\\\.|\'[^\']*\'|"([^"\\\\]|\\\\.)*")'
__into_file=$'^(&>>?|>[>|&]?)[[:space:]]*(>\\([^()]*\\)|\'[^\']*\'|"([^"\\\\]|\\\\.)*"|\\\\.|[^][:space:];|&()<>\'"\\\\])+'
__prefix='^[A-Za-z_][A-Za-z0-9_]*=("[^"]*"|'\''[^'\'']*'\''|([^][:space:]"'\''`(){}[]|\$\{[A-Za-z0-9_]*\})*)[[:space:]]+(.*)$'
__dynamic=$'[$"\'`\\\\~]'
__assignment='^[A-Za-z_][A-Za-z0-9_]*(\[[^]]*\])?\+?='
trap '
    __match=("${BASH_REMATCH[@]}") __text=$BASH_COMMAND
    while [[ $__text =~ $__prefix ]]; do __text=${BASH_REMATCH[3]}; done
    if [[ $__text =~ $__assignment ]]; then
        BASH_REMATCH=("${__match[@]}") # the script has set it
    else
        __first=${__text%%[[:space:]]*}
        if [[ $__first =~ $__dynamic ]]; then
            if eval "__words=($__first)" 2>/dev/null; then __first=${__words[0]-}; else __first=/; fi
        fi
        __whole=$__text
        __without_files "$__whole"
        __judge "$__whole" "$__text" "$__first"
        if [[ $__text =~ ^exec[[:space:]]*([0-9]*[\<\>].*)?$ ]]; then __skip=leave; fi
        if [[ $__skip == run ]]; then :
        elif [[ $__skip == leave ]]; then ! true
        elif [[ $__first == exec ]]; then
            eval "__write ${__text#exec}"; builtin exit 0
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
