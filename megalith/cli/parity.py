"""megalith parity: does a layout give the loss and the gradients of one process?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megalith import recipes
from megalith.config.flags import flags
from megalith.config.flags.loading import resolve
from megalith.config.run import RunConfig
from megalith.workflows import run_config

if TYPE_CHECKING:
    from megalith.workflows.parity import Result

EXAMPLE = """\
examples:
  megalith parity --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --vocab-size 1000 \\
      --micro-batch-size 1 --global-batch-size 4 --tensor-model-parallel-size 2 --sequence-parallel
  megalith parity --config run.yaml --num-layers 2 --vocab-size 1000 --data-parallel-sharding full --processes 2

  megalith parity --finetune chat --train-data chats.jsonl --load Llama-3-8B --use-checkpoint-args --num-layers 2 \\
      --seq-length 512 --micro-batch-size 1 --lora-rank 8 --tensor-model-parallel-size 2

Runs one training step of the config on ranks of this machine's CPU, with random data, in its layout and in one process,
and compares the loss and every gradient by name. With --finetune TASK it runs two steps of `megalith finetune TASK` on
your --train-data, and compares loss masks, losses, gradients, and the weights after them, with adapters merged. Make
the model small by flags: what is right at two layers is right at ninety.
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
    parser.set_defaults(handler=parity, reads=read)


def read(argv: Sequence[str]) -> flags.CommandLine:
    """Read the words after the verb. `--finetune chat` is --task chat; without a word it is the flag of a run."""
    words = [
        "--task" if word == "--finetune" and following[:1] not in ("", "-") else word
        for word, following in zip(argv, [*argv[1:], ""])
    ]  # fmt: skip
    return flags.read(words, FLAGS)


def parity(args: argparse.Namespace) -> int:
    """Run the check, print what differs; the exit status."""
    reading = args.reading
    given, show = (flags.whole_number(reading, name) for name in ("processes", "show"))
    finetunes = "task" in reading.values

    def number(config: RunConfig) -> int:
        return given or config.parallel.smallest_world

    config, notices = resolve(
        reading, read_recipe=recipes.text, read_checkpoint=run_config.checkpoint_config,
        read_tokenizer=run_config.checkpoint_tokenizer, world_size=number, data=finetunes, one_step=True,
    )  # fmt: skip
    for notice in notices:
        print(f"megalith: {notice}", file=sys.stderr)
    processes = number(config)
    import torch

    from megalith.workflows.parity import check, check_finetuning, check_possible  # here, because it imports torch

    dtype = getattr(torch, reading.values.get("check_in", "float64"))
    if not finetunes:
        check_possible(config, processes)
    if reading.values.get("dry_run"):
        print(f"{processes} processes would be compared with one")
        return 0
    results = check_finetuning(config, processes, dtype) if finetunes else [check(config, processes, dtype)]
    for step, result in enumerate(results, 1):
        after = step == len(results) and finetunes
        if finetunes:
            print("merged weights after the last step" if after else f"step {step}")
        report(result, processes, show or 5, "weights" if after else "gradients")
    return 0 if all(result.equal for result in results) else 1


def report(result: Result, processes: int, show: int, what: str) -> None:
    """Print how a layout differs from one process. what: the tensors that are compared, gradients or weights."""
    loss, *differences = result.differences
    print(f"{processes} processes against one; differences over norms, at most {result.tolerance:g} allowed")
    if result.masks is not None:
        wrong = f"NOT equal for samples {result.masks.wrong[:10]}" if result.masks.wrong else "equal"
        print(f"loss masks      {wrong}: {result.masks.tokens} tokens of {result.masks.samples} samples count")
    if what == "gradients":
        print(f"loss            {result.found.loss:.12f}  against {result.expected.loss:.12f}  {loss.error:.1e}")
        print(f"gradient norm   {result.found.norm:.12f}  against {result.expected.norm:.12f}")
    if result.expected.weights:
        print(f"initial weights {'equal, bit for bit' if result.same_weights else 'NOT equal'}")
    for difference in differences[:show]:
        print(f"{difference.error:9.1e}  {difference.name}{'' if difference.error <= result.tolerance else '   WRONG'}")
    print(f"{'equal' if result.equal else 'NOT equal'}: {len(differences)} {what} compared")
