"""Training speed and memory against peers, same shapes, same weights, same data, same run.

    python benchmarks/train.py        # CPU: 6 layers, hidden 384, sequence 512, batch 8, vocabulary 50304, float32
    python benchmarks/train.py --device cuda --dtype bfloat16 --num-layers 24 --hidden-size 1024 --heads 16 \\
        --sequence 2048

Each candidate runs in a separate process, in turn, several rounds; medians are compared. "limit" runs nothing but the
model's matrix products, forward and backward: what the machine would reach if all else were free.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # the project itself, where it is not installed
CANDIDATES = ("megalith", "megalith-compile", "hf", "hf-compile", "megatron-core", "limit")


def main() -> None:
    """Run every candidate in turn and print the table; with --worker, be one of them."""
    args = arguments()
    if args.worker:
        print("RESULT " + json.dumps(work(args)))
        return
    results: dict[str, list[dict]] = {name: [] for name in args.candidates}
    for number in range(args.rounds):
        for name in args.candidates:
            result = apart(name, sys.argv[1:])
            if isinstance(result, str):
                print(f"{name}: failed\n{result}", flush=True)
                continue
            results[name].append(result)
            print(f"round {number + 1} {name}: {results[name][-1]['tokens_per_second']:.0f} tokens/s", flush=True)
    report(args, results)


def apart(name: str, words: list[str]) -> dict | str:
    """What `work` measures of a candidate in a separate process with these arguments, or the end of its errors."""
    done = subprocess.run([sys.executable, __file__, "--worker", name, *words], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(lines[-1][7:]) if lines else done.stderr[-2000:]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=CANDIDATES)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=50304)
    parser.add_argument("--hidden-dropout", type=float, default=0.0, help="of ours and Hugging Face's (see dropout.py)")
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="peak of the device, for MFU")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table here")
    return parser.parse_args()


def work(args: argparse.Namespace) -> dict:
    """Be one candidate: time its steps, and tell its losses and its peak memory."""
    import torch
    from peers import BUILDERS

    device = torch.device(args.device)
    torch.manual_seed(0)
    ids = torch.randint(0, args.vocab_size, (args.batch, args.sequence + 1)).to(device)
    step = BUILDERS[args.worker](args, device, ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def timed() -> tuple[float, float | None]:
        started = time.perf_counter()
        loss = step()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started, loss

    first = [timed()[1] for _ in range(3)]  # warm-up, compilation, and the losses to compare
    seconds = [timed()[0] for _ in range(args.steps)]
    memory = (
        torch.accelerator.max_memory_allocated()
        if device.type != "cpu"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "losses": first,
        "tokens_per_second": args.batch * args.sequence / statistics.median(seconds),
        "memory": memory,
    }


def report(args: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    """Print the medians, the ratios and whether the losses agree."""
    import torch

    lines = [
        f"machine: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{platform.platform()}; "
        f"torch {torch.__version__}, Python {platform.python_version()}",
        f"command: python benchmarks/train.py {' '.join(sys.argv[1:])}",
        f"model: {args.num_layers} layers, hidden {args.hidden_size}, {args.heads} heads, sequence {args.sequence}, "
        f"batch {args.batch}, "
        f"vocabulary {args.vocab_size}, {args.dtype}, AdamW; median of {args.rounds} rounds of {args.steps} steps",
        f"{'':18} {'tokens/s':>10} {'min':>8} {'max':>8} {'memory MiB':>11}  first losses",
    ]
    speed, memory = {}, {}
    for name, rounds in results.items():
        if not rounds:
            lines.append(f"{name:18} failed")
            continue
        rates = [each["tokens_per_second"] for each in rounds]
        speed[name] = statistics.median(rates)
        memory[name] = statistics.median(each["memory"] for each in rounds)
        losses = " ".join(f"{loss:.5f}" for loss in rounds[0]["losses"] if loss is not None)
        lines.append(
            f"{name:18} {speed[name]:10.0f} {min(rates):8.0f} {max(rates):8.0f} {memory[name] / 2**20:11.0f}  {losses}"
        )
    ours = [name for name in speed if name.startswith("megalith")]
    peers = [name for name in speed if name not in ours and name != "limit"]
    if ours and peers:
        best, rival = max(ours, key=speed.get), max(peers, key=speed.get)
        lines.append(f"best of ours ({best}) / fastest peer ({rival}): {speed[best] / speed[rival]:.3f}")
        lines.append(f"its memory / smallest peer's: {memory[best] / min(memory[name] for name in peers):.3f}")
        lines.append(
            f"smallest memory of ours / smallest peer's: "
            f"{min(memory[n] for n in ours) / min(memory[n] for n in peers):.3f}"
        )
    for name, rate in speed.items():
        lines += [mfu(args, name, rate)] if args.device != "cpu" and name != "limit" else []
    if ours and "limit" in speed:
        lines.append(f"best of ours / limit: {max(speed[name] for name in ours) / speed['limit']:.3f}")
    print("\n".join(lines))
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


def mfu(args: argparse.Namespace, name: str, tokens_per_second: float) -> str:
    """Model FLOP/s of one device against its peak, attention counted whole and causal."""
    import torch
    from peers import our_config

    from megalith.planner.flops import flops_per_token
    from megalith.training.reporting.peaks import peak_flops

    peak = peak_flops(torch.get_device_module().get_device_name(), args.dtype, args.peak_tflops)
    rates = [
        tokens_per_second * flops_per_token(our_config(args).model, args.sequence, causal_half=half)
        for half in (False, True)
    ]
    shares = (
        "unknown peak"
        if peak is None
        else f"MFU {rates[0] / peak:.1%} full attention, {rates[1] / peak:.1%} causal half"
    )
    return f"{name}: {rates[0] / 1e12:.1f} TFLOP/s full attention, {rates[1] / 1e12:.1f} causal half; {shares}"


if __name__ == "__main__":
    main()
