"""Latency and bandwidth of an all-reduce over all processes of a run: `python -m megalith.runtime.all_reduce`.

Bandwidth is NCCL's "bus bandwidth", 2 (n-1)/n times bytes over seconds, which does not depend on the number of
processes n (nccl-tests, doc/PERFORMANCE.md).
"""

from __future__ import annotations

import argparse
import datetime
import time

import torch
import torch.distributed as dist

from megalith.parallel.devices import backend_of, pick_device, synchronize

SMALL, REPEATS = 2, 10  # elements of the message that measures latency; how often each is sent
BYTES = {"cpu": 4 * 2**20}  # of the large message, by device
DEFAULT_BYTES = 64 * 2**20
TIMEOUT = datetime.timedelta(seconds=60)


def measure(device: torch.device, elements: int) -> float:
    """Seconds of one all-reduce of so many float32 numbers: the median of ten, after one that is not counted.

    Raises RuntimeError where the sum is wrong.
    """
    seconds = []
    for _ in range(REPEATS + 1):
        values = torch.ones(elements, device=device)
        synchronize(device)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(values)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        if values[-1].item() != dist.get_world_size():
            raise RuntimeError(f"an all-reduce of ones over {dist.get_world_size()} processes gave {values[-1].item()}")
    return sorted(seconds[1:])[REPEATS // 2]


def main() -> None:
    """Measure, and print one line on rank 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="auto")
    device = pick_device(parser.parse_args().device)
    dist.init_process_group(backend_of(device), timeout=TIMEOUT)
    size, n = BYTES.get(device.type, DEFAULT_BYTES), dist.get_world_size()
    latency, large = measure(device, SMALL), measure(device, size // 4)
    if dist.get_rank() == 0:
        bandwidth = 2 * (n - 1) / n * size / large / 1e9
        print(
            f"  all-reduce over {n} processes ({dist.get_backend()}): {1e6 * latency:.0f} µs for {4 * SMALL} bytes, "
            f"{bandwidth:.2f} GB/s for {size // 2**20} MiB",
            flush=True,
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
