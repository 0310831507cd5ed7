"""The `megalith` command: finds the verb, passes it the rest, turns errors into messages and exit statuses.

Only the chosen verb's module is imported, so that --help and a wrong flag answer at once.

Exit status: 0 done, 1 stopped by an error in data, checkpoints or training, 2 the command cannot work as given,
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence

import megalith
from megalith import __version__
from megalith.common.environment import error_file
from megalith.common.errors import ConfigError, MegalithError, problem
from megalith.config import environment
from megalith.config.flags.text import fail, nearest, unknown, value_text

FREE_SPACE = "Free space or correct the path, and give the same command again; what was finished is kept"
WRONG_PATH = "Correct the path, or make what it leads through"
NO_FILE = "Nothing can be read or written there: name an ordinary file"
NO_RIGHT = "Ask its owner for the right to read or write there, or name another place"
# Errors that a disk or a path can cause, and their cures; other system errors are bugs, and keep their traceback.
CURES = {
    errno.ENOSPC: FREE_SPACE, errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: "This disk or `ulimit -f` allows no file so large: raise the limit, or name a place on another disk",
    errno.EROFS: "This place can only be read: name another one",
    errno.EACCES: NO_RIGHT, errno.EPERM: NO_RIGHT,
    errno.ENOENT: WRONG_PATH,
    errno.ENOTDIR: "A file is in the place of a folder of the path: correct the path",
    errno.EEXIST: "Something of that name is in the way: correct the path, or move it away",
    errno.ENOTEMPTY: "The folder holds something: correct the path, or move it away",
    errno.EISDIR: "This is a folder, and a file is needed: correct the path",
    errno.ENAMETOOLONG: "The name is longer than this disk allows: choose a shorter one",
    errno.ELOOP: "Links lead in a circle: correct the path, or remove the link",
    errno.EMFILE: "Too many files are open in this process: raise `ulimit -n`",
    errno.ENFILE: "Too many files are open on this machine: end something, or ask for a higher limit",
    errno.EBUSY: "Something else uses it: wait for it, or name another place",
    errno.EXDEV: "It would have to move to another disk: name a place on one disk",
    errno.EIO: "The disk or network file system failed: look into the system's log, and name a place on another disk",
    errno.ESTALE: "The network file system lost it: mount it anew, and give the same command again",
    errno.ENODEV: NO_FILE, errno.ENXIO: NO_FILE,
}  # fmt: skip
SUMMARY = "Large transformers, trained and converted in any parallel layout, from raw text to generated text."
VERBS = {  # verb -> one line; the module is megalith.cli.VERB, with register(subparsers) that sets a default `handler`
    "demo": "corpus to trained model to text, on what every machine has",
    "data": "raw text to indexed datasets, and what is done with those",
    "pretrain": "train a model",
    "finetune": "train a model further, on a task",
    "index": "an index of block embeddings: build, search, verify",
    "retro": "the chunks that Retro retrieves, and the neighbours of its samples",
    "generate": "text out of a trained model",
    "evaluate": "perplexity, LAMBADA, and the tasks of lm-evaluation-harness",
    "detoxify": "train a model further on the least toxic of its own texts",
    "serve": "text out of a trained model over HTTP: Megatron's and OpenAI's interfaces, and a page",
    "ask": "write to a text server and read what it answers",
    "checkpoint": "inspect, verify, edit and convert checkpoints",
    "parity": "does a layout give the gradients of one process",
    "config": "answer a few questions, get a YAML file for pretrain or launch",
    "launch": "start a verb or a script in any number of processes, on one machine or a cluster",
}


RANK_SUFFIX = re.compile(r" \(on rank \d+ of \d+, after step \d+\)$")  # what training/failures.py adds


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written; N for whole numbers, X for others; adds defaults that the help does not name."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return "N" if action.type is int else "X" if action.type is float else action.dest.rpartition("_")[2].upper()

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.default in (None, False, [], argparse.SUPPRESS) or "default" in text:
            return text
        return f"{text} (default: {value_text(action.default)})".lstrip().replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are ConfigErrors that name the nearest flag.

    A verb may set the default `reads`, a function that is given the words after the verb and replaces argparse's own
    reading; what it returns is in the namespace as `reading`. Where some of the words belong to another program, `own`
    gives those that do not: a --help among them alone is for this parser.
    """

    def __init__(self, **options):
        options.setdefault("formatter_class", functools.partial(HelpFormatter, max_help_position=34))
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse, but underscores in flags count as dashes, and what is left over is an error here, where the
        flags that it may have meant are known.
        """
        reads = self.get_default("reads")
        if reads:
            if {"-h", "--help"}.intersection((self.get_default("own") or list)(args)):
                self.print_help()
                self.exit()
            return argparse.Namespace(handler=self.get_default("handler"), reading=reads(args)), []
        args = [self._dashed(word) for word in args]
        try:
            found, extra = super().parse_known_args(args, namespace)
        except ConfigError as error:
            # argparse stops at the first mistake; what it calls missing may be there, mistyped
            fail([*self._unknown_flags(args), str(error)] if self._subparsers is None else [str(error)])
        if extra:
            self.error("; ".join(self._unknown_flags(extra)) or f"unexpected {' '.join(extra)}")
        return found, extra

    def _dashed(self, word: str) -> str:
        """--top_p as --top-p, where that is a flag."""
        name, equals, value = word.partition("=")
        dashed, known = name.replace("_", "-"), self._option_string_actions
        return dashed + equals + value if name not in known and dashed in known else word

    def _unknown_flags(self, words: Sequence[str]) -> list[str]:
        """A line for each flag among the words, up to a `--`, that this parser does not have."""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        flags = [word.partition("=")[0] for word in itertools.takewhile(lambda word: word != "--", words)]
        return [
            unknown("flag", flag, known, "no option is near")
            for flag in flags
            if flag.startswith("--") and flag not in known
        ]

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """For an unknown verb or choice, name the nearest, or what it is called here."""
        if action.choices is None or value in action.choices:
            return
        known = list(map(str, action.choices))
        if isinstance(action, argparse._SubParsersAction):
            self.error(unknown("verb", str(value), known, f"there are {', '.join(known)}"))
        name = action.option_strings[0]
        cure = f"Write {name} {nearest(str(value), known) or known[0]}"
        self.error(problem(name, value, f"must be one of {', '.join(known)}", cure).removesuffix("."))

    def error(self, message: str):
        """Raise ConfigError instead of printing the usage and exiting."""
        raise ConfigError(f"{message} ({self.prog} --help shows the options)")


def parser_for(verb: str | None) -> Parser:
    """The command's parser: the list of verbs, and the options of this one."""
    lines = "\n".join(f"  {name:12}{line}" for name, line in VERBS.items())
    parser = Parser(
        prog="megalith",
        usage="megalith VERB ...",
        description=f"{SUMMARY}\n\nverbs:\n{lines}",
        epilog="example: megalith demo\n`megalith VERB --help` shows the options of a verb and an example.",
    )
    parser.add_argument("--version", action="version", version=f"megalith {__version__}")
    subparsers = parser.add_subparsers(prog="megalith", metavar="VERB", required=True, help=argparse.SUPPRESS)
    if verb is not None:
        importlib.import_module(f"megalith.cli.{verb}").register(subparsers)
    return parser


def print_error(text: str) -> None:
    """Print an error; one that several ranks of a torchrun have on a machine is printed by the first of them.

    Any rank may be the first: a launcher ends the others as soon as one has ended.
    """
    previous = None
    with contextlib.suppress(ValueError):  # outside the main thread
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that the launcher does not end it first
    try:
        if _is_first_on_machine(RANK_SUFFIX.sub("", text)):
            print(text, file=sys.stderr, flush=True)
        if file := error_file():  # what torchrun shows last, below its own traceback
            with contextlib.suppress(OSError):
                pathlib.Path(file).write_text(
                    json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8"
                )
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _is_first_on_machine(text: str) -> bool:
    """Whether no other rank on this machine has printed this text, by a file in torchrun's folder of this attempt.

    (The folder is ATTEMPT in ATTEMPT/RANK/error.json.)
    """
    if not (file := error_file()):
        return True
    with contextlib.suppress(OSError):
        printed = pathlib.Path(file).parents[1] / f".megalith-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        try:
            printed.touch(exist_ok=False)
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def warnings_as_notices() -> Iterator[None]:
    """Within the block megalith's own warnings are printed as its other lines are, by the main process."""
    package = os.path.dirname(megalith.__file__) + os.sep
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message, category, filename, *more):
            if not filename.startswith(package):
                others(message, category, filename, *more)
            elif environment.rank() == 0:
                print(f"megalith: {message}", file=sys.stderr, flush=True)

        warnings.showwarning = show
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` defaults to the process's own. Returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = next((word for word in argv if not word.startswith("-")), None)
    try:
        if verb is not None and verb not in VERBS:
            raise ConfigError(unknown("verb", verb, VERBS, f"there are {', '.join(VERBS)}"))
        args = parser_for(verb).parse_args(argv or ["--help"])
        with warnings_as_notices():
            return args.handler(args) or 0
    except MegalithError as error:
        print_error(f"megalith: {error}")
        return 2 if isinstance(error, ConfigError) else 1
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `megalith ... | head`
            if verb in ("pretrain", "finetune") and "--dry-run" not in argv:
                print(
                    "megalith: standard output was closed by what read it, so the run has ended too",
                    file=sys.stderr,
                    flush=True,
                )
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        if error.errno not in CURES or isinstance(error, ConnectionError):
            raise
        print_error(f"megalith: {error}. {CURES[error.errno]}.")
        return 1
    except KeyboardInterrupt:
        print("megalith: interrupted", file=sys.stderr)
        return 130
