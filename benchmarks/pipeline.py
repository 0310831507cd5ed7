"""Idle time of pipelines, measured on two processes, and simulated with those times for four and eight.

    python benchmarks/pipeline.py [--micro-batches 4] [--pictures docs/pictures]

A model of equal stages (a tiny vocabulary costs nothing) trains on two processes of one thread. For each schedule: the
bubble, median over steps; what the schedule takes at best if each piece of work lasts as long as it did in that step,
which leaves out everything that this code adds; and the theory, where all pieces of a kind last equally long. They do
not: on two cores that share a memory a piece beside which the other process waits is 3 % faster, which matters where
the bubble itself is 3 %.
For four and eight processes the schedule is simulated with the median times of forward and backward passes and of a
transfer. Then the price of deferred weight gradients: (activations + weights) over the fused backward pass of the same
stage.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from megalith.config.run import RunConfig
from megalith.config.stages import LOOPING
from megalith.optim.build import build_optimizer
from megalith.parallel import mesh as meshes
from megalith.parallel.pipeline.schedules import order
from megalith.planner.timeline import ideal_bubble, simulate, timeline_bubble
from megalith.runtime import timeline
from megalith.runtime.build import build_runtime
from megalith.testing import parity, run_ranks
from megalith.training.reporting.profile import draw

SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved_1f1b": 2, "zero_bubble": 2, "zbv": 2, "dualpipev": 2}
CONFIG = RunConfig().replace(  # pieces of half a second, so that the milliseconds of a transfer do not count
    num_layers=8,
    hidden_size=1536,
    num_attention_heads=24,
    seq_length=512,
    max_position_embeddings=512,
    vocab_size=64,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    micro_batch_size=1,
    pipeline_model_parallel_size=2,
    pipeline_split="even",
    device="cpu",
)


def transfer_seconds(config: RunConfig, times: int = 50) -> float:
    """How long an activation takes from one process to the other: half a round trip, median."""
    x, rank, taken = torch.zeros(config.data.seq_length, config.model.hidden_size), dist.get_rank(), []
    for _ in range(times):
        start = time.perf_counter()
        for sender in (0, 1):
            dist.send(x, 1 - rank) if rank == sender else dist.recv(x, 1 - rank)
        taken.append((time.perf_counter() - start) / 2)
    return statistics.median(taken)


def steps(config: RunConfig, number: int) -> tuple[list[timeline.Timeline], float]:
    """Timelines of steps, after two that warm up."""
    runtime = build_runtime(config, meshes.init_mesh(config.parallel))
    optimizer = build_optimizer(config.optimizer, runtime.named_parameters())
    found = []
    for step in range(number + 2):
        if step >= 2:
            timeline.record(runtime)
        parity.forward_backward_once(runtime, step)
        if step >= 2:
            found.append(timeline.collect(runtime))
        optimizer.step()
        optimizer.zero_grad()
    return found, transfer_seconds(config)


def medians(found: list[timeline.Timeline]) -> dict[str, float]:
    """Median seconds of each kind of work, over all stages, micro-batches and steps."""
    taken: dict[str, list[float]] = {}
    for span in (span for each in found for span in each.measured):
        taken.setdefault(span.work.kind, []).append(span.end - span.start)
    return {kind: statistics.median(values) for kind, values in taken.items()}


def theory(name: str, processes: int, micro_batches: int, seconds: dict[str, float]) -> float:
    """The bubble of equal stages with these times and no transfers."""
    if name in ("gpipe", "1f1b", "interleaved_1f1b"):
        return ideal_bubble(name, processes, micro_batches, SCHEDULES[name])
    return timeline_bubble(
        simulate(order(name, processes, micro_batches, SCHEDULES[name]), lambda work: seconds[work.kind])
    )


def at_best(each: timeline.Timeline, transfer: float) -> float:
    """The bubble of a step whose pieces of work last as measured and wait for nothing but what they need."""
    seconds = {span.work: span.end - span.start for span in each.measured}
    spans = sorted(each.measured, key=lambda span: span.start)
    works = [[span.work for span in spans if span.process == process] for process in range(each.processes)]
    return timeline_bubble(simulate(works, seconds.__getitem__, transfer))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--pictures", type=pathlib.Path, help="draw the middle step of each schedule into this folder")
    args = parser.parse_args()
    m, count = CONFIG.model, args.micro_batches
    print(
        f"torch {torch.__version__}, {m.num_layers} layers, hidden {m.hidden_size}, {CONFIG.data.seq_length} tokens, "
        f"{count} micro-batches"
    )
    print(
        "idle over computing time. 2 processes: median (quartiles) | at best | theory || 4: simulated | theory || 8: "
        "simulated | theory"
    )
    costs = {}
    for name in args.schedules:
        v = SCHEDULES[name]
        config = CONFIG.replace(
            pipeline_schedule=name,
            num_layers_per_virtual_pipeline_stage=2 if name in LOOPING else None,
            global_batch_size=count,
        )
        found, transfer = run_ranks(steps, 2, config, args.steps, timeout=900)[0]
        found.sort(key=lambda each: timeline_bubble(each.measured))
        low, middle, high = statistics.quantiles([timeline_bubble(each.measured) for each in found], n=4)
        costs[name] = seconds = medians(found)
        line = f"{name:18s} {middle:6.2%} ({low:.2%} to {high:.2%})"
        best = statistics.median(at_best(each, transfer) for each in found)
        line += f" | {best:6.2%} | {theory(name, 2, count, seconds):6.2%}"
        for processes in (4, 8):
            works = order(name, processes, 4 * processes, v)
            events = simulate(works, lambda work: seconds[work.kind], transfer)  # noqa: B023 - used at once
            simulated = timeline_bubble(events)
            line += f" || {simulated:6.2%} | {theory(name, processes, 4 * processes, seconds):6.2%}"
        times = ", ".join(f"{kind} {value * 1e3:.1f} ms" for kind, value in seconds.items())
        print(f"{line}  ({times}, transfer {transfer * 1e3:.2f} ms)", flush=True)
        if args.pictures:
            draw(found[len(found) // 2], args.pictures / f"pipeline_{name}.png")
    if {"zero_bubble", "interleaved_1f1b"} <= costs.keys():
        split, fused = costs["zero_bubble"], costs["interleaved_1f1b"]
        print(f"weight gradients put off: {(split['I'] + split['W']) / fused['B']:.3f} of the fused backward pass")


if __name__ == "__main__":
    main()
