"""What tensor, data and pipeline parallelism reach of the machine: two processes of one thread each, on one model.

    python benchmarks/parallel.py                writes benchmarks/results/parallel.txt (ten minutes of a quiet machine)

The limit is measured in the same run: two processes that train the same model side by side and never communicate. Every
two-process layout trains on as many tokens a step as those two together, optimizer included. Layouts take turns;
medians are compared.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
RESULT = pathlib.Path(__file__).parent / "results" / "parallel.txt"
# Tokens of a sample, samples of a step for each process, micro-batches of the pipeline
SEQUENCE, HERE, MICRO_BATCHES = (
    512,
    4,
    8,
)
LAYOUTS: dict[str, dict] = {  # name -> what differs from one process; `alone`: that many processes that do not speak
    "one process": {"alone": 1},
    "two alone": {"alone": 2},
    "tensor": {"tensor_model_parallel_size": 2, "micro_batch_size": 2 * HERE},
    "data, replicated": {},
    "data, sharded optimizer": {"use_distributed_optimizer": True},
    "pipeline": {
        "pipeline_model_parallel_size": 2,
        "micro_batch_size": 2 * HERE // MICRO_BATCHES,
        "pipeline_split": "even",
    },
}
# Shares of the limit
ASKED = {
    "tensor": 0.80,
    "data, replicated": 0.92,
    "data, sharded optimizer": 0.92,
    "pipeline": 0.90,
}


def work(name: str, steps: int) -> None:
    """Be one process of a layout: train when told to, and tell the seconds of each step."""
    import torch

    torch.set_num_threads(1)
    from megalith.config.run import RunConfig
    from megalith.optim.build import build_optimizer
    from megalith.optim.loss_scale import build_loss_scale
    from megalith.optim.schedule import Schedule
    from megalith.parallel import mesh as meshes
    from megalith.runtime.build import build_runtime
    from megalith.testing import parity
    from megalith.training.resume.state import Progress
    from megalith.training.step import Trainer, train_step
    from megalith.training.tasks import LanguageModelling

    given = {key: value for key, value in LAYOUTS[name].items() if key != "alone"}
    samples = HERE if "alone" in LAYOUTS[name] else 2 * HERE
    config = RunConfig().replace(
        num_layers=4,
        hidden_size=1024,
        num_attention_heads=16,
        seq_length=SEQUENCE,
        max_position_embeddings=SEQUENCE,
        vocab_size=1024,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        global_batch_size=samples,
        device="cpu",
        train_iters=1000,
        lr=1e-4,
        **{"micro_batch_size": HERE} | given,
    )
    mesh = meshes.init_mesh(config.parallel)
    runtime = build_runtime(config, mesh)
    runtime.train()
    optimizer = build_optimizer(config.optimizer, runtime.named_parameters())
    schedule = Schedule(config.optimizer, config.schedule, samples)
    trainer = Trainer(runtime, LanguageModelling(), optimizer, schedule, build_loss_scale(config.precision))
    batches = parity.micro_batches(parity.batch(config), config.batch.micro_batch_size, mesh)

    def timed() -> tuple[float, float]:
        started = time.perf_counter()
        losses = train_step(trainer, batches, Progress()).losses
        return time.perf_counter() - started, losses["lm loss"]

    first = [timed()[1] for _ in range(2)]
    print("READY", flush=True)
    sys.stdin.readline()
    print("RESULT " + json.dumps({"seconds": [timed()[0] for _ in range(steps)], "losses": first}), flush=True)


def measure(name: str, steps: int) -> list[dict]:
    """Run a layout's processes; what each of them told."""
    command, alone = [__file__, "--worker", name, "--steps", str(steps)], LAYOUTS[name].get("alone")
    return run_workers(command, alone or 2, distributed=alone is None)


def run_workers(script: list[str], number: int, distributed: bool, threads: int = 1) -> list[dict]:
    """Run a script in several processes, which print READY, wait for a line, and print RESULT and a JSON object.

    script: its path and arguments. distributed: whether they are ranks of one process group.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(number):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number)} | {
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | (place if distributed else {})
        command = [sys.executable, *script]
        processes.append(
            subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
    for process in processes:
        _line(process, "READY")
    for process in processes:  # all at once
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(_line(process, "RESULT ")) for process in processes]
    for process in processes:
        process.wait()
    return found


def _line(process: subprocess.Popen, start: str) -> str:
    """The rest of the next line that begins with `start`."""
    for line in process.stdout:
        if line.startswith(start):
            return line[len(start) :]
    raise SystemExit(f"a process ended without {start.strip()}; see its error above")


def report(rates: dict[str, list[float]], losses: dict[str, list[float]], steps: str) -> str:
    """The table: tokens a second of each layout, and their shares of the limit."""
    import torch

    limit = statistics.median(rates["two alone"])
    bubble = 1 / (MICRO_BATCHES + 1)  # (p - 1) / (m + p - 1) of the step
    lines = [
        "command: python benchmarks/parallel.py",
        f"machine: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        f"4 layers, hidden 1024, vocabulary 1024, sequence {SEQUENCE}, float32, AdamW; {HERE * SEQUENCE} tokens each "
        f"step; {steps}",
        f"{'':26}{'tokens/s':>9}  {'quartiles':>15}  share of the limit  asked  losses of the first two steps",
    ]
    for name, values in rates.items():
        low, middle, high = statistics.quantiles(values, n=4)
        share = middle / (limit * (1 - bubble)) if name == "pipeline" else middle / limit
        asked = f"{ASKED[name]:.2f}" if name in ASKED else ""
        what = f"{share:.3f}" + (" (bubble taken off)" if name == "pipeline" else "")
        lines.append(
            f"{name:26}{middle:9.0f}  {low:6.0f} to {high:5.0f}  {what:>18}  {asked:>5}  "
            + " ".join(f"{loss:.6f}" for loss in losses[name])
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Take turns, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a round")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    args = parser.parse_args()
    if args.worker:
        work(args.worker, args.steps)
        return
    rates: dict[str, list[float]] = {name: [] for name in args.layouts}
    losses = {}
    for number in range(args.rounds):
        for name in args.layouts:
            found = measure(name, args.steps)
            tokens = len(found) * HERE * SEQUENCE
            for seconds in zip(*(each["seconds"] for each in found)):
                rates[name].append(tokens / statistics.mean(seconds))
            losses[name] = found[0]["losses"]
            print(
                f"round {number + 1} {name}: {statistics.median(rates[name][-args.steps :]):.0f} tokens/s", flush=True
            )
    text = report(rates, losses, f"medians of {args.rounds} x {args.steps} steps")
    print(text)
    if args.rounds * args.steps >= 9:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
