"""megalith parity: does a layout give the loss and the gradients of one process?"""

from __future__ import annotations

import argparse
import functools

from megalith import recipes
from megalith.common.errors import problem
from megalith.config import flags
from megalith.config.loading import resolve
from megalith.config.text import Problem, flag

EXAMPLE = """\
examples:
  megalith parity --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 1000 \\
      --micro-batch-size 1 --global-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel
  megalith parity --config run.yaml --num-layers 2 --vocab-size 1000 --data-parallel-sharding full --processes 2

Runs one training step of the config on ranks of this machine's CPU, with made-up data, in its layout and in one process, and
compares the loss and every gradient by name. Make the model small by flags: what is right at two layers is right at ninety.
Exit status: 0 equal, 1 not.
"""
OWN = (
    *flags.RUN_FLAGS,
    flags.Flag("--processes", {"processes": flags.VALUE}, help="ranks to run (default: one copy of the model; two where that is one)"),
    flags.Flag("--check-in", {"check_in": flags.VALUE}, choices=("float64", "float32"), help="format of the check (default float64)"),
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
    flags.add_help(parser, OWN)
    parser.set_defaults(handler=parity, reads=functools.partial(flags.read, own=OWN))


def parity(args: argparse.Namespace) -> int:
    """Run the check, print what differs; the exit status."""
    reading = args.reading
    values = {"train_iters": str(10**9), "lr": "0.0001"} | reading.values  # one step is run; a config's warm-up must fit in all the same
    reading.values = values
    asked, shown = (_number(reading, name) for name in ("processes", "show"))
    config, _ = resolve(reading, read_recipe=recipes.text, world_size=asked, data=False)
    processes = asked or config.parallel.smallest_world
    if values.get("dry_run"):
        print(f"{processes} processes would be compared with one")
        return 0
    import torch

    from megalith.workflows.parity import check  # here, because it imports torch

    result = check(config, processes, getattr(torch, values.get("check_in", "float64")))
    loss, *gradients = result.differences
    print(f"{processes} processes against one; differences over norms, at most {result.tolerance:g} allowed")
    print(f"loss            {result.found.loss:.12f}  against {result.expected.loss:.12f}  {loss.error:.1e}")
    print(f"gradient norm   {result.found.norm:.12f}  against {result.expected.norm:.12f}")
    print(f"initial weights {'equal, bit for bit' if result.same_weights else 'NOT equal'}")
    for difference in gradients[: shown or 5]:
        print(f"{difference.error:9.1e}  {difference.name}{'' if difference.error <= result.tolerance else '   WRONG'}")
    print(f"{'equal' if result.equal else 'NOT equal'}: {len(gradients)} gradients compared")
    return 0 if result.equal else 1


def _number(reading: flags.Reading, name: str) -> int | None:
    """A count as typed, or None where nothing is; a wrong one is told with all that is wrong."""
    value = reading.values.get(name)
    if value is None:
        return None
    if value.isdecimal() and int(value) > 0:
        return int(value)
    reading.problems.append(Problem((), problem(flag(name), value, "it is a whole number above 0", f"Write {flag(name)} 4")))
    return None
