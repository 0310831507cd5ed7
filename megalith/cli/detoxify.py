"""megalith detoxify: a model trained further on the least toxic of its own texts, measured before and after."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys

from megalith.cli.flags.options import add_option_flags, given_options
from megalith.config.flags.text import check_minimum, flag
from megalith.workflows.detoxify.options import STEPS, DetoxifyOptions

EXAMPLE = """\
example:
  megalith detoxify --load runs/first --output runs/clean --prompt-file prompts.jsonl --valid-data held_out.txt \\
      --scorer-path bad_words.txt --num-samples 10000

The same command resumes what was killed. --steps does some of the steps alone; docs/detoxify.md explains each.
"""
FILES = ("load", "output", "prompt_file", "valid_data", "samples")


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "detoxify",
        help="train a model further on the least toxic of its own texts",
        description="Has a model write texts, scores them, trains it on the cleaner half, and measures both models.",
        epilog=EXAMPLE,
    )
    helps = {each.name: each.metadata["help"] for each in dataclasses.fields(DetoxifyOptions)}
    for name in FILES:
        several = {"nargs": "+"} if name in ("valid_data", "samples") else {}
        metavar = "FILE" if name in ("prompt_file", "valid_data", "samples") else "PATH"
        parser.add_argument(flag(name), default=argparse.SUPPRESS, metavar=metavar, help=helps[name], **several)
    add = parser.add_argument
    add("--steps", nargs="+", default=[], metavar="STEP", help=f"of {', '.join(STEPS)}; the others are left alone")
    add("--processes", type=int, default=1, metavar="N", help="in which texts are written and models trained")
    add("--overwrite", action="store_true", help="do a step anew that would now be another one")
    add("--dry-run", action="store_true", help="check what is given, say which steps are done, and exit")
    add_option_flags(parser.add_argument_group("how it is done"), DetoxifyOptions, FILES)
    parser.set_defaults(handler=detoxify)


def detoxify(args: argparse.Namespace) -> int:
    """Run the steps; the exit status."""
    from megalith.cli.main import main
    from megalith.workflows.detoxify.pipeline import detoxify as run
    from megalith.workflows.detoxify.verbs import Verbs

    check_minimum("processes", args.processes, 1)
    run(
        DetoxifyOptions(**given_options(args, DetoxifyOptions)), Verbs(main, args.processes), steps=args.steps,
        overwrite=args.overwrite, dry_run=args.dry_run, notice=functools.partial(print, file=sys.stderr, flush=True),
    )  # fmt: skip
    return 0
