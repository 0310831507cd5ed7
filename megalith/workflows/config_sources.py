"""A config from what other people have: a training script or command of Megatron-LM, a config.json, a checkpoint."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence

from megalith import recipes
from megalith.common.errors import ConfigError, problem
from megalith.config.flags import flags, verbs
from megalith.config.flags.foreign_names import megalith_name
from megalith.config.flags.loading import from_yaml, resolve
from megalith.config.megatron.counts import vocab_size_of_rows
from megalith.config.run import RunConfig
from megalith.workflows import run_config, script_words

PER_NODE = ("--nproc-per-node", "--num-gpus", "--ntasks-per-node", "--gpus-per-node", "-ppn", "--ppn")
NODES = ("--nnodes", "--num-nodes", "--nodes", "-N")
ALL = ("--ntasks", "-n", "--np", "-np", "--num-processes", "--world-size")
SHELLS = ("sh", "bash")


@dataclasses.dataclass(frozen=True)
class Training:
    """A training command: `pretrain` or `finetune`, the words after it, and how many processes its launcher starts."""

    verb: str
    words: list[str]
    processes: int | None


def from_script(script: str, arguments: Sequence[str]) -> tuple[RunConfig, int, list[str]]:
    """(config, processes, lines to show) of a bash script, or of a command on standard input (`-`).

    Raises ConfigError with every problem, and where there is no training command, or several that differ.
    """
    if script == "-":
        with tempfile.TemporaryDirectory(prefix="megalith-command-") as folder:
            file = pathlib.Path(folder, "command.sh")
            file.write_text(sys.stdin.read(), encoding="utf-8")
            return _from_file(file, "-", arguments)
    file = pathlib.Path(script)
    if not file.is_file():
        raise ConfigError(problem("--from-script", script, "must be a file that exists", "Correct the path"))
    return _from_file(file, script, arguments)


def _from_file(file: pathlib.Path, called: str, arguments: Sequence[str]) -> tuple[RunConfig, int, list[str]]:
    text = file.read_text(encoding="utf-8", errors="replace")
    commands = script_words.commands(file, arguments)
    found = [training for words in commands if (training := find_training(words)) is not None]
    if not found:
        started = ", ".join(dict.fromkeys(pathlib.PurePath(words[0]).name for words in commands)) or "nothing"
        rule = (
            f"must start a training: pretrain_gpt.py and the like, megalith pretrain, or finetune; it starts {started}"
        )
        raise ConfigError(problem("--from-script", called, rule, "Name the script that does, with what it needs set"))
    if any((each.verb, each.words) != (found[0].verb, found[0].words) for each in found):
        rule = f"must start one training; it starts {len(found)} that differ"
        raise ConfigError(problem("--from-script", called, rule, "Pass one by --from-script - on standard input"))
    directives = [word for line in re.findall(r"^#(?:SBATCH|PBS)\s+(.*)$", text, re.MULTILINE) for word in line.split()]
    return from_words(found[0].verb, found[0].words, found[0].processes or _processes(directives))


def from_words(verb: str, words: Sequence[str], processes: int | None) -> tuple[RunConfig, int, list[str]]:
    """As from_script, of the words after `megalith VERB`. Flags that nobody knows are told and left out."""
    reading = verbs.READERS[verb](words)
    unknown = [each for each in reading.problems if each.text.startswith("unknown flag ")]
    reading.problems = [each for each in reading.problems if each not in unknown]
    asked = flags.whole_number(reading, "world_size") or processes

    def number(config: RunConfig) -> int:
        return asked or config.parallel.least_processes

    config, notices = resolve(
        reading, read_recipe=recipes.text, read_checkpoint=run_config.checkpoint_config,
        read_tokenizer=run_config.checkpoint_tokenizer, world_size=number,
    )  # fmt: skip
    return config, number(config), [*(f"left out: {each.text}" for each in unknown), *notices]


def find_training(words: Sequence[str]) -> Training | None:
    """The training command in the words of a command that may begin with launchers (srun, torchrun, a shell)."""
    for at, word in enumerate(words):
        name = pathlib.PurePath(word).name
        if name in SHELLS and (text := _shell_text(words[at + 1 :])) is not None:
            inner = [part for part in _split_commands(text) if (found := find_training(part)) is not None]
            if inner and (found := find_training(inner[0])) is not None:
                return dataclasses.replace(found, processes=found.processes or _processes(words[:at]))
        if name == "megalith" and (verb := next((each for each in words[at + 1 :] if each in verbs.READERS), None)):
            begins = words.index(verb, at + 1) + 1
            return Training(verb, list(words[begins:]), _processes(words[:begins]))
        if name == "main.py" and "--task" in words[at + 1 :]:
            return Training("finetune", list(words[at + 1 :]), _processes(words[:at]))
        if word.endswith(".py") and (model := re.search(r"`megalith pretrain (\w+)", megalith_name(word) or "")):
            model_words = [model[1]] if model[1] != "MODEL" else []
            return Training("pretrain", [*model_words, *words[at + 1 :]], _processes(words[:at]))
    return None


def _shell_text(words: Sequence[str]) -> str | None:
    """The text that `sh -c TEXT` runs."""
    return next((words[at + 1] for at, word in enumerate(words[:-1]) if re.fullmatch(r"-[a-z]*c", word)), None)


def _split_commands(text: str) -> list[list[str]]:
    """The commands of a shell's text, split at ; && || and |. Raises ConfigError where it has variables of its own."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, ""
    parts: list[list[str]] = [[]]
    try:
        for word in lexer:
            if set(word) <= set(";&|"):
                parts.append([])
            else:
                parts[-1].append(word)
    except ValueError as error:
        raise ConfigError(
            problem("--from-script", text, f"must have commands that can be read ({error})", "Correct it")
        ) from error
    if any(re.search(r"\$[A-Za-z_{(]", word) for part in parts for word in part if find_training(part)):
        cure = "Put the text into double quotes, or pass the command alone by --from-script -"
        raise ConfigError(problem("--from-script", text, "must not leave variables to an inner shell", cure))
    return [part for part in parts if part]


def _processes(words: Sequence[str]) -> int | None:
    """How many processes the flags of launchers ask for; None where they do not say."""
    given: dict[str, int] = {}
    for at, word in enumerate(words):
        name, equals, value = word.partition("=")
        name = "--" + name[2:].replace("_", "-") if name.startswith("--") else name
        value = value if equals else words[at + 1] if at + 1 < len(words) else ""
        if value.rpartition(":")[2].isdecimal():  # of --nnodes 1:2 the most
            given[name] = int(value.rpartition(":")[2])
    total = next((given[name] for name in ALL if name in given), None)
    per_node = next((given[name] for name in PER_NODE if name in given), None)
    nodes = next((given[name] for name in NODES if name in given), None)
    if total is None and (per_node or nodes):
        total = math.prod(number or 1 for number in (per_node, nodes))
    return total


def from_checkpoint(path: str) -> tuple[RunConfig, int, list[str]]:
    """(config, processes, lines) of a run or a checkpoint in any format: the model, and the rest as far as it says."""
    config = from_yaml(run_config.checkpoint_config({"load": path}), f"config of {path}")
    tokenizer = {name: value for name, value in run_config.checkpoint_tokenizer({"load": path}).items() if value}
    tokenizer.pop("vocab_size", None)
    if rows := config.model.vocab_size:  # of the embedding, which some tokenizers make larger than --vocab-size
        kind = tokenizer.get("tokenizer_type", config.data.tokenizer_type)
        config = config.replace(vocab_size=vocab_size_of_rows(rows, kind))
    lines = [f"the model and what else {path} states; the weights themselves are taken by --load {path}"]
    return config.replace(**tokenizer), config.parallel.least_processes, lines


def from_huggingface(path: str) -> tuple[RunConfig, int, list[str]]:
    """(config, processes, lines) of a config.json of Hugging Face, or the folder that has one; no weights are read."""
    from megalith.checkpoint.formats.huggingface.config_file import read_config  # here, because it imports torch

    config, notes = read_config(pathlib.Path(path))
    return config, 1, notes
