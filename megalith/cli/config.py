"""megalith config: a few questions, and a YAML file for `megalith pretrain --config`."""

from __future__ import annotations

import argparse
import pathlib

from megalith.common.errors import ConfigError
from megalith.common.files import write_text
from megalith.common.outputs import check as check_output
from megalith.common.outputs import writing
from megalith.config.flags.loading import to_yaml
from megalith.workflows import wizard

EXAMPLE = """\
examples:
  megalith config --output run.yaml
  printf 'cpu-tiny\\ncorpus_text_document\\ntokenizer.json\\n' | megalith config --output run.yaml --force

An empty answer, or the end of the input, takes the default shown in brackets. For more than one process, layout, number
format, recomputation and clipping are asked for too; what cannot work is asked again. Nothing is written before all
answers fit.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "config",
        help="answer a few questions, get a YAML file for pretrain",
        description="Ask a few questions and write a YAML file for `megalith pretrain --config`.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--output", default="run.yaml", metavar="FILE", help="file to write (default run.yaml)")
    parser.add_argument("--force", "--overwrite", action="store_true", help="replace the file if it exists")
    parser.set_defaults(handler=ask_and_write)


def ask_and_write(args: argparse.Namespace) -> int:
    """Ask, check, write, and print what to do next; the exit status. Answers that cannot work write nothing."""
    output = pathlib.Path(args.output)
    if output.exists() and not args.force:
        raise ConfigError(f"--output: {output} exists already. Name another file, or add --force to replace it.")
    check_output([output], overwrite=True)
    answers = wizard.ask()
    about = f"about:\n  processes: {answers.processes}\n"
    with writing(output, overwrite=args.force):
        write_text(output, about + to_yaml(answers.config, changed_only=True, always=("model_type",)))
    print(f"\n{wizard.next_commands(answers, str(output))}")
    return 0
