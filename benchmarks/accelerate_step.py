"""What a training step costs through megalith.accelerate: beside `pretrain`'s own step, and plain Accelerate.

    python benchmarks/accelerate_step.py     writes benchmarks/results/accelerate.txt (a quiet machine)

The same GPT-2, weights and batches, AdamW, float32, one process. "door": the loop of a script with megalith.accelerate.
"pretrain": train_step of megalith.training, which `megalith pretrain` runs. "accelerate": the same script with
Accelerate and transformers' model. All take turns in one process; medians are compared.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import accelerate
import torch
import transformers
from torch.utils.data import DataLoader

import megalith.accelerate
from megalith.config.parameters import weight_decays
from megalith.optim.build import build_optimizer
from megalith.optim.loss_scale import StaticLossScale
from megalith.optim.schedule import Schedule
from megalith.runtime.build import build_runtime, init_mesh
from megalith.runtime.load import weights_of
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer, train_step
from megalith.training.tasks import LanguageModelling

RESULT = pathlib.Path(__file__).parent / "results" / "accelerate.txt"


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"num-layers": 6, "hidden-size": 384, "heads": 6, "vocab-size": 8192, "sequence": 256, "batch": 8}
    for name, default in (sizes | {"rounds": 12, "threads": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    candidates = {name: build(args) for name, build in BUILDERS.items()}
    losses = {name: [step() for _ in range(2)] for name, step in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(args.rounds):
        for name, step in candidates.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    lines = [
        f"command: python benchmarks/{shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]])}",
        f"machine: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"accelerate {accelerate.__version__}",
        f"{args.num_layers} layers, hidden {args.hidden_size}, vocabulary {args.vocab_size}, {args.batch} x "
        f"{args.sequence} tokens, float32, AdamW, {args.threads} threads; medians of {args.rounds} steps in turns",
        "",
        f"{'':12}{'ms a step':>10}  {'quartiles':>16}  {'to pretrain':>12}  first losses",
    ]
    base = statistics.median(seconds["pretrain"])
    for name, taken in seconds.items():
        low, middle, high = (1e3 * each for each in statistics.quantiles(taken, n=4))
        shown = " ".join(f"{loss:.5f}" for loss in losses[name])
        lines.append(f"{name:12}{middle:10.1f}  {low:7.1f} to {high:5.1f}  {middle / 1e3 / base:12.3f}  {shown}")
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if args.rounds >= 10:
        RESULT.write_text(text)


def build_model(args: argparse.Namespace) -> transformers.GPT2LMHeadModel:
    """The same weights each time."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_embd=args.hidden_size, n_layer=args.num_layers, n_head=args.heads, n_positions=args.sequence,
        vocab_size=args.vocab_size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def ids_of(args: argparse.Namespace) -> torch.Tensor:
    """One batch, [b, s]."""
    return torch.randint(0, args.vocab_size, (args.batch, args.sequence), generator=torch.Generator().manual_seed(2))


def script(library: Any, args: argparse.Namespace, **options: Any) -> Callable[[], float]:
    """A script's step. It clips nothing; the loss is read in each step, as scripts that log do."""
    accelerator = library.Accelerator(cpu=True, **options)
    model, data = build_model(args), [{"input_ids": row, "labels": row} for row in ids_of(args)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=args.batch))
    model.train()

    def step() -> float:
        (batch,) = loader
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def reset_accelerate() -> None:
    """Forget what the Accelerator before has left in the process."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def door(args: argparse.Namespace) -> Callable[[], float]:
    """megalith.accelerate."""
    reset_accelerate()
    plugin = megalith.accelerate.utils.MegatronLMPlugin(tp_degree=1, gradient_clipping=0.0)
    return script(megalith.accelerate, args, megatron_lm_plugin=plugin)


def plain(args: argparse.Namespace) -> Callable[[], float]:
    """Accelerate."""
    reset_accelerate()
    return script(accelerate, args)


def pretrain(args: argparse.Namespace) -> Callable[[], float]:
    """The step that `megalith pretrain` runs."""
    source = weights_of(build_model(args))
    config = source.config.replace(
        seq_length=args.sequence, micro_batch_size=args.batch, global_batch_size=args.batch, lr=1e-4, weight_decay=0.0,
        lr_decay_style="constant", train_iters=1000, clip_grad=0.0, adam_eps=1e-8, adam_beta2=0.999, device="cpu",
    )  # fmt: skip
    runtime = build_runtime(config, init_mesh(config.parallel), weights=source)
    optimizer = build_optimizer(
        config.optimizer, runtime.named_parameters(), lambda *each: weight_decays(config.model, *each)
    )
    schedule = Schedule(config.optimizer, config.schedule, args.batch)
    trainer = Trainer(runtime, LanguageModelling(), optimizer, schedule, StaticLossScale())
    ids = ids_of(args)
    batch = {
        "input_ids": ids, "labels": torch.cat((ids[:, 1:], torch.full_like(ids[:, :1], -100)), dim=1),
        "loss_mask": torch.ones(ids.shape).index_fill_(1, torch.tensor([args.sequence - 1]), 0.0),
        "samples": torch.arange(args.batch),
    }  # fmt: skip
    progress = Progress()
    return lambda: train_step(trainer, [dict(batch)], progress).total_loss


BUILDERS = {"pretrain": pretrain, "door": door, "accelerate": plain}


if __name__ == "__main__":
    main()
