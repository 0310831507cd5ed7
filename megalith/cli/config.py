"""megalith config: a few questions, and a YAML file for `megalith pretrain --config`."""

from __future__ import annotations

import argparse
import pathlib
import shlex

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

An empty answer, or the end of the input, takes the default shown in brackets. Where more than one process is meant, layout,
number format, recomputation and clipping are asked for too; what cannot work is asked again. Nothing is written before all fits.
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
    """Ask, check, write, and say what to do next; the exit status. Nothing is written where the answers cannot work."""
    output = pathlib.Path(args.output)
    if output.exists() and not args.force:
        raise ConfigError(f"--output: {output} exists already. Name another file, or add --force to replace it.")
    check_output([output], overwrite=True)
    answers = wizard.ask()
    about = f"about:\n  processes: {answers.processes}\n"
    with writing(output, overwrite=args.force):
        write_text(output, about + to_yaml(answers.config, changed_only=True, always=("model_type",)))
    command = f"-m megalith pretrain {answers.config.model.model_type} --config {shlex.quote(str(output))}"
    machines, on_this = answers.processes // answers.per_machine, command.removeprefix("-m ")
    many = f"--nproc-per-node {answers.per_machine} {command}"
    if machines == 1:
        print(f"\nwrote {output}; next:\n  {on_this if answers.processes == 1 else f'torchrun {many}'}")
        return 0
    print(f"\nwrote {output}; to check it, on any machine:\n  {on_this} --dry-run")
    print(f"next, on each of {machines} machines, with the name of one of them for FIRST:")
    print(f"  torchrun --nnodes {machines} --rdzv-backend c10d --rdzv-endpoint FIRST:29500 {many}")
    return 0
