"""megalith config: a few questions, and a YAML file for `megalith pretrain --config` or `megalith launch`."""

from __future__ import annotations

import argparse
import pathlib
import shlex

from megalith.common.environment import accelerate_config_file
from megalith.common.errors import ConfigError
from megalith.common.files import write_text
from megalith.common.outputs import check as check_output
from megalith.common.outputs import writing
from megalith.config.flags.loading import to_yaml
from megalith.launcher import accelerate_yaml, questions
from megalith.workflows import wizard

EXAMPLE = """\
examples:
  megalith config --output run.yaml
  printf 'cpu-tiny\\ncorpus_text_document\\ntokenizer.json\\n' | megalith config --output run.yaml --force
  megalith config --accelerate --config_file megatron_gpt_config.yaml

An empty answer, or the end of the input, takes the default shown in brackets. For more than one process, layout, number
format, recomputation and clipping are asked for too; what cannot work is asked again. Nothing is written before all
answers fit. --accelerate asks what `accelerate config` asks, and writes the file that `accelerate config` writes, by
default where it writes it, for `megalith launch`.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "config",
        help="answer a few questions, get a YAML file for pretrain or launch",
        description="Ask a few questions and write a YAML file for `megalith pretrain --config`, or `megalith launch`.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--output", "--config-file", "--config_file", metavar="FILE", help="file to write (default run.yaml)"
    )
    parser.add_argument("--accelerate", action="store_true", help="the questions and the file of `accelerate config`")
    parser.add_argument("--force", "--overwrite", action="store_true", help="replace the file if it exists")
    parser.set_defaults(handler=ask_and_write)


def ask_and_write(args: argparse.Namespace) -> int:
    """Ask, check, write, and print what to do next; the exit status. Answers that cannot work write nothing."""
    output = pathlib.Path(args.output or (accelerate_config_file() if args.accelerate else "run.yaml"))
    if output.exists() and not args.force:
        raise ConfigError(f"--output: {output} exists already. Name another file, or add --force to replace it.")
    check_output([output], overwrite=True)
    text, next_commands = _of_accelerate(output, bool(args.output)) if args.accelerate else _of_pretrain(output)
    with writing(output, overwrite=args.force):
        write_text(output, text)
    print(f"\n{next_commands}")
    return 0


def _of_pretrain(output: pathlib.Path) -> tuple[str, str]:
    """(the file's text, what to type next) of the answers for a run."""
    answers = wizard.ask()
    about = f"about:\n  processes: {answers.processes}\n"
    text = about + to_yaml(answers.config, changed_only=True, always=("model_type",))
    return text, wizard.next_commands(answers, str(output))


def _of_accelerate(output: pathlib.Path, named: bool) -> tuple[str, str]:
    """(the file's text, what to type next) of the answers for a script written for Accelerate."""
    text = accelerate_yaml.to_yaml(questions.ask())
    file = f" --config_file {shlex.quote(str(output))}" if named else ""
    return text, f"wrote {output}; next:\n  megalith launch{file} SCRIPT.py ARGS"
