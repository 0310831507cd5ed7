"""Does finetuning learn? A small BERT on 4,500 pairs of MNLI and of QQP, three seeds each, against the majority class.

    python benchmarks/finetune_tasks.py ../shared/data/glue ../shared/data/bert/bert-base-uncased-vocab.txt

The model begins with random weights (--pretrained-checkpoint names others), so that what it learns it learns of these
pairs. Prints the accuracy on all of the validation file after each epoch, and draws docs/pictures/finetune_tasks.png.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import platform
import statistics
import tempfile

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megalith.config.finetuning import task_defaults
from megalith.config.run import RunConfig
from megalith.training.pretrain import train

FILES = {"mnli": ("MNLI/train_big.tsv", "MNLI/dev_matched_big.tsv"), "qqp": ("QQP/train_big.tsv", "QQP/dev_big.tsv")}
ROOT = pathlib.Path(__file__).parents[1]


def config_of(task: str, args: argparse.Namespace, seed: int, run: str) -> RunConfig:
    """A run of `args.epochs` epochs."""
    train_file, valid_file = (str(args.glue / name) for name in FILES[task])
    return RunConfig().replace(
        **task_defaults(task), task=task, train_data=[train_file], valid_data=[valid_file], epochs=args.epochs,
        num_layers=2, hidden_size=args.hidden_size, num_attention_heads=2, seq_length=48, max_position_embeddings=48,
        tokenizer_type="BertWordPieceLowerCase", vocab_file=str(args.vocab), micro_batch_size=32, lr=args.lr,
        lr_warmup_fraction=0.1, weight_decay=0.1, seed=seed, run_dir=run, progress="none", keep_best=False,
        log_interval=10**6, device=args.device, pretrained_checkpoint=args.pretrained_checkpoint,
    )  # fmt: skip


def majority(path: pathlib.Path) -> float:
    """The share of the most frequent label."""
    labels = collections.Counter(line.rpartition("\t")[2] for line in path.read_text().splitlines()[1:])
    return max(labels.values()) / labels.total()


def curve(run: str) -> list[tuple[float, float]]:
    """(step, accuracy) of each validation."""
    lines = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["validation_metrics"]["accuracy"]) for line in lines if "validation_loss" in line]


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", type=pathlib.Path, help="folder of MNLI/ and QQP/")
    parser.add_argument("vocab", type=pathlib.Path, help="vocabulary of WordPiece")
    parser.add_argument("--epochs", type=float, default=8.0)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pretrained-checkpoint")
    args = parser.parse_args()
    print(f"{platform.machine()}; {args.epochs:g} epochs, hidden size {args.hidden_size}", flush=True)
    figure = Figure(figsize=(9, 3.8), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, 2), FILES):
        base, curves = majority(args.glue / FILES[task][1]), []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                run = f"{folder}/run"
                train(config_of(task, args, seed, run))
                curves.append(curve(run))
            print(f"{task} seed {seed}: " + " ".join(f"{value:.3f}" for _, value in curves[-1]), flush=True)
            axes.plot(*zip(*curves[-1]), marker="o", markersize=3, label=f"seed {seed}")
        last = [points[-1][1] for points in curves]
        spread = f"{statistics.mean(last):.3f} +- {statistics.pstdev(last):.3f}"
        print(f"{task}: at the end {spread}, majority {base:.3f}", flush=True)
        axes.axhline(base, color="#8a8a8a", linestyle="--", label="majority class")
        axes.set(title=task.upper(), xlabel="step", ylabel="accuracy on the validation file")
        axes.legend(frameon=False)
    figure.savefig(ROOT / "docs/pictures/finetune_tasks.png")


if __name__ == "__main__":
    main()
