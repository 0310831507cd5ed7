"""megalith finetune: `pretrain` on a task, which brings its own data, loss and metrics."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megalith.cli import pretrain
from megalith.config.finetuning import TASKS
from megalith.config.flags import flags
from megalith.config.flags.text import Problem

EXAMPLE = """\
examples:
  megalith finetune mnli --pretrained-checkpoint bert_345m --use-checkpoint-args --train-data MNLI/train.tsv \\
      --valid-data MNLI/dev_matched.tsv MNLI/dev_mismatched.tsv --epochs 5 --micro-batch-size 8 --lr 5e-5 --save mnli
  torchrun --nproc-per-node 8 -m megalith finetune my_task.yaml --config run.yaml --train-data train.jsonl --epochs 3
  megalith finetune mnli --pretrained-checkpoint mnli --use-checkpoint-args --valid-data dev.tsv --epochs 0 \\
      --micro-batch-size 8 --save measured

All flags are those of `megalith pretrain`. The task decides on model, data and loss; `--task NAME` names it too, as in
Megatron's tasks/main.py. --epochs 0 measures what --pretrained-checkpoint names, and trains nothing.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "finetune",
        help="train a model further, on a task",
        usage="megalith finetune [TASK] [--recipe NAME] [--config FILE] [--FIELD VALUE ...]",
        description="Train a model further, on a task, or measure it on one.",
        epilog=EXAMPLE + "\ntasks: " + ", ".join(TASKS),
    )
    parser.add_argument("task", nargs="?", metavar="TASK", help=f"{', '.join(TASKS)}, or FILE.yaml that describes one")
    flags.add_help(parser, pretrain.FLAGS)
    parser.set_defaults(handler=finetune, reads=read)


def read(argv: Sequence[str]) -> flags.CommandLine:
    """Read the words after the verb. In Megatron's tasks --keep-last is a switch; here it has a number."""
    bare = [
        at for at, word in enumerate(argv)
        if word in ("--keep-last", "--keep_last") and (at + 1 == len(argv) or argv[at + 1].startswith("--"))
    ]  # fmt: skip
    reading = flags.read([word for at, word in enumerate(argv) if at not in bare], pretrain.FLAGS)
    if bare:
        reading.notices.append("--keep-last without a number is not needed: no sample of a last batch is ever dropped")
    if "task" not in reading.values and reading.words:
        reading.values["task"] = reading.words.pop(0)
    if reading.words:
        rule = "a value follows its flag, and one task follows the verb or --task"
        reading.problems += [Problem((), f"unexpected {word!r}: {rule}") for word in reading.words]
        reading.words = []
    return reading


def finetune(args: argparse.Namespace) -> int:
    """As `pretrain`, for a task; the exit status."""
    reading = args.reading
    if not {"task", "config"} & reading.values.keys():
        text = f"The task is not named. Write it after the verb, as in megalith finetune mnli: {', '.join(TASKS)}"
        reading.problems.append(Problem(("task", "dataset", "data_path", "train_iters"), text))
    return pretrain.run(reading)
