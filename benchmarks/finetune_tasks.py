"""Does finetuning learn? A small BERT on tasks; writes benchmarks/results/finetune_tasks.txt and a picture in docs.

    python benchmarks/finetune_tasks.py ../shared/data/glue ../shared/data/bert/bert-base-uncased-vocab.txt

Learned: 4,500 pairs of MNLI and of QQP, three seeds each, against the majority class of 500 other pairs, whose accuracy
is given after each epoch. Fitted: RACE, and the short files of MNLI, QQP and RTE; they are too few to learn a task of,
so that what is given is the accuracy on the training set. The model begins with random weights
(--pretrained-checkpoint names others), so that what it learns it learns of these texts.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import io
import json
import multiprocessing
import os
import pathlib
import platform
import shlex
import statistics
import sys
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megalith.config.finetuning import task_defaults
from megalith.config.run import RunConfig
from megalith.training.pretrain import train

LEARNED = {"mnli": ("MNLI/train_big.tsv", "MNLI/dev_matched_big.tsv"), "qqp": ("QQP/train_big.tsv", "QQP/dev_big.tsv")}
FITTED = {"mnli": "MNLI/train.tsv", "qqp": "QQP/train.tsv", "rte": "RTE/train.tsv", "race": "../race/raw"}
ROOT = pathlib.Path(__file__).parents[1]


def accuracies(
    args: argparse.Namespace, task: str, seed: int, train_file: pathlib.Path, valid_file: pathlib.Path, **changes: Any
) -> list[tuple[int, float]]:  # fmt: skip
    """(step, accuracy) on all of a validation file, at the start and after each epoch of training."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"hidden_size": args.hidden_size, "epochs": args.epochs, "lr": args.lr, **changes}
        length = values.setdefault("seq_length", 48)
        config = RunConfig().replace(
            **task_defaults(task), task=task, train_data=[str(train_file)], valid_data=[str(valid_file)],
            num_layers=2, num_attention_heads=2, max_position_embeddings=length, weight_decay=0.1, seed=seed,
            tokenizer_type="BertWordPieceLowerCase", vocab_file=str(args.vocab), lr_warmup_fraction=0.1,
            micro_batch_size=values.pop("batch", 32), run_dir=f"{folder}/run", progress="none", keep_best=False,
            log_interval=10**6, device=args.device, pretrained_checkpoint=args.pretrained_checkpoint, **values,
            # BERT's 0.02 is for hidden 768; with it this model did not leave the majority class of MNLI (docs/log.md).
            init_method_std=values["hidden_size"] ** -0.5,
        )  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            train(config)
        lines = [json.loads(line) for line in (pathlib.Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_metrics"]["accuracy"]) for line in lines if "validation_loss" in line]


def majority(path: pathlib.Path) -> tuple[float, int]:
    """The share of the most frequent label, and how many there are in all."""
    labels = collections.Counter(line.rpartition("\t")[2] for line in path.read_text().splitlines()[1:])
    return max(labels.values()) / labels.total(), labels.total()


def learned(args: argparse.Namespace, pool: ProcessPoolExecutor, log: list[str]) -> None:
    """Accuracy on other pairs than those of training."""
    figure = Figure(figsize=(9, 3.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    runs = {
        task: [pool.submit(accuracies, args, task, seed, *(args.glue / name for name in files)) for seed in args.seeds]
        for task, files in LEARNED.items()
    }
    for axes, (task, found) in zip(figure.subplots(1, 2), runs.items()):
        base, examples = majority(args.glue / LEARNED[task][1])
        note(log, f"learned: {task}, accuracy on {examples} pairs, first and after each epoch; majority {base:.3f}")
        for seed, points in zip(args.seeds, [each.result() for each in found]):
            note(log, f"  seed {seed}: " + " ".join(f"{value:.3f}" for _, value in points))
            axes.plot(*zip(*points), marker="o", markersize=3, label=f"seed {seed}")
        last = statistics.mean(each.result()[-1][1] for each in found)
        error = (base * (1 - base) / examples) ** 0.5
        note(log, f"  at the end {last:.3f} (standard error of a share of {examples}: {error:.3f})")
        axes.axhline(base, color="#8a8a8a", linestyle="--", label="majority class")
        axes.set(title=task.upper(), xlabel="step", ylabel="accuracy on other pairs")
        axes.legend(frameon=False)
    figure.savefig(ROOT / "docs/pictures/finetune_tasks.png")


def fitted(args: argparse.Namespace, pool: ProcessPoolExecutor, log: list[str]) -> None:
    """Accuracy on the training set itself."""
    runs = dict[tuple[str, int], Future]()
    for task, name in FITTED.items():
        file, size = (args.glue / name).resolve(), {"epochs": 40.0, "batch": 16, "lr": 1e-3}
        if task == "race":
            size |= {"epochs": 24.0, "seq_length": 128}
        for seed in args.seeds:
            runs[task, seed] = pool.submit(accuracies, args, task, seed, file, file, **size)
    for (task, seed), found in runs.items():
        points = found.result()
        shown = [points[round(number * (len(points) - 1) / 8)] for number in range(9)]
        text = " ".join(f"{value:.3f} ({step})" for step, value in shown)
        note(log, f"fitted: {task} seed {seed}, accuracy on the training set (step): {text}")


def note(log: list[str], line: str) -> None:
    """Show a line, and keep it for the log."""
    print(line, flush=True)
    log.append(line)


def main() -> None:
    """Train, draw, write the log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", type=pathlib.Path, help="folder of MNLI/, QQP/ and RTE/, beside race/raw")
    parser.add_argument("vocab", type=pathlib.Path, help="vocabulary of WordPiece")
    parser.add_argument("--epochs", type=float, default=8.0, help="of what is learned")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=2, help="runs at a time")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pretrained-checkpoint")
    args = parser.parse_args()
    log = [
        f"command: python benchmarks/{shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"machine: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}, torch {torch.__version__}",
        f"2 layers, hidden {args.hidden_size}, random weights" if args.pretrained_checkpoint is None
        else f"weights of {args.pretrained_checkpoint}",
        "",
    ]  # fmt: skip
    print("\n".join(log), flush=True)
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        learned(args, pool, log)
        fitted(args, pool, log)
    (ROOT / "benchmarks/results/finetune_tasks.txt").write_text("\n".join(log) + "\n")


if __name__ == "__main__":
    main()
