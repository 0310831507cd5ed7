"""megalith config: a YAML file for `megalith pretrain --config` or `megalith launch`, from questions or other files."""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys
from collections.abc import Callable

from megalith.common.environment import accelerate_config_file
from megalith.common.errors import ConfigError, problem
from megalith.common.files import write_text
from megalith.common.outputs import check as check_output
from megalith.common.outputs import writing
from megalith.config.flags.loading import to_yaml
from megalith.config.flags.text import Words
from megalith.config.run import RunConfig
from megalith.launcher import accelerate_yaml, questions
from megalith.workflows import config_sources, wizard

EXAMPLE = """\
examples:
  megalith config --output run.yaml
  printf 'cpu-tiny\\ncorpus_text_document\\ntokenizer.json\\n' | megalith config --output run.yaml --force
  megalith config --from-script examples/pretrain_gpt.sh --output run.yaml -- --train-iters 1000
  echo 'torchrun --nproc_per_node 8 pretrain_gpt.py --num-layers 24 ...' | megalith config --from-script -
  megalith config --from-huggingface Llama-3-8B/config.json --output llama.yaml
  megalith config --from-checkpoint runs/first --output again.yaml
  megalith config --accelerate --config_file megatron_gpt_config.yaml

An empty answer, or the end of the input, takes the default shown in brackets. For more than one process, layout, number
format, recomputation and clipping are asked for too; what cannot work is asked again. Nothing is written before all
answers fit. --accelerate asks what `accelerate config` asks, and writes the file that `accelerate config` writes, by
default where it writes it, for `megalith launch`.

--from-script has bash read a script, without starting any program that it names: variables, arrays and conditions are
the script's own, the flags are those of the training command that it would start. Flags that nobody knows are named and
left out. What follows -- are the script's arguments.
"""
SOURCES: dict[str, Callable[..., tuple[RunConfig, int, list[str]]]] = {  # flag -> what makes a config of it
    "from_script": config_sources.from_script,
    "from_huggingface": config_sources.from_huggingface,
    "from_checkpoint": config_sources.from_checkpoint,
}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "config",
        help="a YAML file for pretrain or launch, from questions, a script or a checkpoint",
        usage="megalith config [--from-script FILE | --from-huggingface PATH | --from-checkpoint PATH | --accelerate] "
        "[--output FILE] [--force] [-- ARG ...]",
        description="Write a YAML file for `megalith pretrain --config`, or `megalith launch`: from a few questions, "
        "or from a script, a config.json or a checkpoint.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--output", "--config-file", "--config_file", metavar="FILE", help="file to write (default run.yaml)"
    )
    parser.add_argument("--accelerate", action="store_true", help="the questions and the file of `accelerate config`")
    add = parser.add_argument
    add("--from-script", metavar="FILE", help="bash script of Megatron-LM or of examples/; - for a command on stdin")
    add("--from-huggingface", metavar="PATH", help="config.json of Hugging Face, or its folder")
    add("--from-checkpoint", metavar="PATH", help="run or checkpoint, in any format that --load takes")
    add("arguments", nargs="*", metavar="-- ARG", help="arguments of the script of --from-script")
    parser.add_argument("--force", "--overwrite", action="store_true", help="replace the file if it exists")
    parser.set_defaults(handler=ask_and_write)


def ask_and_write(args: argparse.Namespace) -> int:
    """Ask, check, write, and print what to do next; the exit status. Answers that cannot work write nothing."""
    given = [name for name in (*SOURCES, "accelerate") if getattr(args, name)]
    if len(given) > 1:
        found = Words(" and ".join(f"--{name.replace('_', '-')}" for name in given))
        raise ConfigError(problem("The source of the config", found, "must be one", "Leave the others out"))
    if args.arguments and given != ["from_script"]:
        found = Words(" ".join(args.arguments))
        raise ConfigError(problem("Arguments", found, "are for --from-script alone", "Leave them out"))
    output = pathlib.Path(args.output or (accelerate_config_file() if args.accelerate else "run.yaml"))
    if output.exists() and not args.force:
        raise ConfigError(f"--output: {output} exists already. Name another file, or add --force to replace it.")
    check_output([output], overwrite=True)
    if given and not args.accelerate:
        text, next_commands = _of_source(given[0], args, output)
    else:
        text, next_commands = _of_accelerate(output, bool(args.output)) if args.accelerate else _of_pretrain(output)
    with writing(output, overwrite=args.force):
        write_text(output, text)
    print(f"\n{next_commands}")
    return 0


def _of_pretrain(output: pathlib.Path) -> tuple[str, str]:
    """(the file's text, what to type next) of the answers for a run."""
    answers = wizard.ask()
    return _yaml(answers.config, answers.processes), wizard.next_commands(answers, str(output))


def _of_source(name: str, args: argparse.Namespace, output: pathlib.Path) -> tuple[str, str]:
    """(the file's text, what to type next) of a script, a config.json or a checkpoint."""
    more = [args.arguments] if name == "from_script" else []
    config, processes, lines = SOURCES[name](getattr(args, name), *more)
    for line in lines:
        print(f"megalith: {line}", file=sys.stderr)
    if name == "from_script":
        per_node = max(number for number in range(1, 9) if processes % number == 0)
        return _yaml(config, processes), wizard.next_commands(wizard.Answers(config, processes, per_node), str(output))
    command = f"megalith pretrain {config.model.model_type} --config {shlex.quote(str(output))} --dry-run"
    return _yaml(config, processes), f"wrote {output}; to see what a run of it still needs:\n  {command}"


def _yaml(config: RunConfig, processes: int) -> str:
    return f"about:\n  processes: {processes}\n" + to_yaml(config, changed_only=True, always=("model_type",))


def _of_accelerate(output: pathlib.Path, named: bool) -> tuple[str, str]:
    """(the file's text, what to type next) of the answers for a script written for Accelerate."""
    text = accelerate_yaml.to_yaml(questions.ask())
    file = f" --config_file {shlex.quote(str(output))}" if named else ""
    return text, f"wrote {output}; next:\n  megalith launch{file} SCRIPT.py ARGS"
