"""megalith finetune: `pretrain` on a task, which brings its own data, loss and metrics."""

from __future__ import annotations

import argparse

from megalith.cli import pretrain
from megalith.config.finetuning import TASKS
from megalith.config.flags import flags, verbs
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
    flags.add_help(parser, verbs.FLAGS)
    parser.set_defaults(handler=finetune, reads=verbs.read_finetune)


def finetune(args: argparse.Namespace) -> int:
    """As `pretrain`, for a task; the exit status."""
    reading = args.reading
    if not {"task", "config"} & reading.values.keys():
        text = f"The task is not named. Write it after the verb, as in megalith finetune mnli: {', '.join(TASKS)}"
        reading.problems.append(Problem(("task", "dataset", "data_path", "train_iters"), text))
    return pretrain.run(reading)
