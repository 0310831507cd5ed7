"""megalith parity: does a layout give the loss and the gradients of one process?"""

from __future__ import annotations

import argparse
import functools
import sys

from megalith import recipes
from megalith.config.flags import flags
from megalith.config.flags.loading import resolve
from megalith.config.run import RunConfig

EXAMPLE = """\
examples:
  megalith parity --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 1000 \\
      --micro-batch-size 1 --global-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel
  megalith parity --config run.yaml --num-layers 2 --vocab-size 1000 --data-parallel-sharding full --processes 2

Runs one training step of the config on ranks of this machine's CPU, with random data, in its layout and in one process,
and compares the loss and every gradient by name. Make the model small by flags: what is right at two layers is right at
ninety.
Exit status: 0 equal, 1 not.
"""
FLAGS = (
    *flags.RUN_FLAGS,
    flags.Flag(
        "--processes",
        {"processes": flags.VALUE},
        help="ranks to run (default: one copy of the model; two where that is one)",
    ),
    flags.Flag(
        "--check-in",
        {"check_in": flags.VALUE},
        choices=("float64", "float32"),
        help="format of the check (default float64)",
    ),
    flags.Flag("--show", {"show": flags.VALUE}, help="gradients to list, the worst first (default: 5)"),
)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "parity",
        help="does a layout give the gradients of one process",
        usage="megalith parity [--recipe NAME] [--config FILE] [--FIELD VALUE ...] [--processes N]",
        description="Does this layout give the loss and every gradient of one process?",
        epilog=EXAMPLE,
    )
    flags.add_help(parser, FLAGS)
    parser.set_defaults(handler=parity, reads=functools.partial(flags.read, command_flags=FLAGS))


def parity(args: argparse.Namespace) -> int:
    """Run the check, print what differs; the exit status."""
    reading = args.reading
    given, show = (flags.whole_number(reading, name) for name in ("processes", "show"))

    def number(config: RunConfig) -> int:
        return given or config.parallel.smallest_world

    config, notices = resolve(reading, read_recipe=recipes.text, world_size=number, data=False, one_step=True)
    for notice in notices:
        print(f"megalith: {notice}", file=sys.stderr)
    processes = number(config)
    import torch

    from megalith.workflows.parity import check, check_possible  # here, because it imports torch

    check_possible(config, processes)
    if reading.values.get("dry_run"):
        print(f"{processes} processes would be compared with one")
        return 0
    result = check(config, processes, getattr(torch, reading.values.get("check_in", "float64")))
    loss, *gradients = result.differences
    print(f"{processes} processes against one; differences over norms, at most {result.tolerance:g} allowed")
    print(f"loss            {result.found.loss:.12f}  against {result.expected.loss:.12f}  {loss.error:.1e}")
    print(f"gradient norm   {result.found.norm:.12f}  against {result.expected.norm:.12f}")
    print(f"initial weights {'equal, bit for bit' if result.same_weights else 'NOT equal'}")
    for difference in gradients[: show or 5]:
        print(f"{difference.error:9.1e}  {difference.name}{'' if difference.error <= result.tolerance else '   WRONG'}")
    print(f"{'equal' if result.equal else 'NOT equal'}: {len(gradients)} gradients compared")
    return 0 if result.equal else 1
