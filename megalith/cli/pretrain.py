"""megalith pretrain: one checked config from recipe, YAML and flags, passed to the training loop."""

from __future__ import annotations

import argparse
import sys

from megalith import recipes
from megalith.config import environment
from megalith.config.architectures import ARCHITECTURES
from megalith.config.batch_math import check_length, data_parallel_size
from megalith.config.flags import flags, verbs
from megalith.config.flags.loading import resolve, source_texts
from megalith.config.flags.text import Problem, unknown
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig
from megalith.workflows import dry_run, run_config

EXAMPLE = """\
examples:
  megalith pretrain gpt --recipe cpu-tiny --data-path corpus_text_document --tokenizer-model tokenizer.json --dry-run
  torchrun --nproc-per-node 2 -m megalith pretrain gpt --config run.yaml --train-iters 1000
  torchrun --nproc-per-node 2 -m megalith pretrain gpt --load Llama-3-8B --use-checkpoint-args --config run.yaml

Flags override --config, which overrides the recipe; `none` unsets an optional value. Flags of Megatron's commands work
as typed: old spellings and flags that are not needed here are accepted with a line that says so.

--dry-run needs no corpus, no accelerator and no launcher: it checks for --world-size N processes, else for the number
that the config or recipe is for (its about: processes), else for the fewest that the layout allows. It lists the files
that are missing, and ends with status 1 where one that is named is not there or cannot be used.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a model",
        usage="megalith pretrain [MODEL] [--recipe NAME] [--config FILE] [--FIELD VALUE ...]",
        description="Train a model from the start, or continue from a checkpoint.",
        epilog=EXAMPLE + "\nrecipes: " + ", ".join(recipes.names()),
    )
    models = f"{', '.join(ARCHITECTURES)} (default gpt), or module:name of your own"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=models)
    flags.add_help(parser, verbs.FLAGS)
    parser.set_defaults(handler=pretrain, reads=verbs.read_pretrain)


def pretrain(args: argparse.Namespace) -> int:
    """Resolve and check the config, print it, and train unless --dry-run is given; the exit status."""
    for name in args.reading.words[:1]:
        if name not in ARCHITECTURES and ":" not in name:
            otherwise = f"there are {', '.join(ARCHITECTURES)}, and your own by module:name"
            every = tuple(fields())  # fields that the model's defaults would have set are not reported as missing too
            args.reading.problems.append(Problem(every, unknown("model", name, ARCHITECTURES, otherwise)))
    return run(args.reading)


def run(reading: flags.CommandLine) -> int:
    """Resolve and check the config of a command line, print it, and train unless --dry-run is given."""
    notice = _print_notice if environment.rank() == 0 else lambda line: None
    dry = bool(reading.values.get("dry_run"))
    for line in environment.notices() if not dry else ():
        notice(line)
    # What is wrong with the texts is reported by `resolve`.
    texts = source_texts(reading.values.get("recipe"), reading.values.get("config"), recipes.text, [])
    processes = dry_run.number_of_processes(reading, texts)

    def world_size(config: RunConfig) -> int:
        number, origin = processes(config)
        if origin:
            notice(origin)  # before the problems, which name a number that nobody typed
        return number

    config, notices = resolve(
        reading, read_recipe=recipes.text, read_checkpoint=run_config.checkpoint_config,
        read_tokenizer=run_config.checkpoint_tokenizer,
        world_size=world_size, corpus=not dry, paths=lambda config: () if dry else dry_run.wrong_paths(config),
    )  # fmt: skip
    for line in notices:
        notice(line)
    check_length(config, data_parallel_size(config, processes(config)[0]))
    if environment.rank() == 0:
        how_much = reading.values.get("print_config", "changed")
        print(run_config.describe(config, processes(config)[0], how_much), end="", flush=True)
    if dry:
        faults, unnamed = dry_run.faults(config), list(dry_run.unnamed(config.data))
        if faults or unnamed:
            lines = "".join(f"\n  {line}" for line in [*faults, *unnamed])
            notice(f"the config can work; what a run of it would not find here:{lines}")
        return 1 if faults else 0
    from megalith.training.pretrain import train  # here, because it imports torch

    train(config)
    return 0


def _print_notice(line: str) -> None:
    print(f"megalith: {line}", file=sys.stderr)
