"""The attention of one decoding step over ragged rows: keys and values in slots or in pages.

    python benchmarks/cache.py --out benchmarks/results/cache.txt

slots: generation/cache.py; a row of the longest length for each sequence, and a call for neighbours whose tokens fill
the same number of blocks of 64. pages: a pool [pages, kv heads, 64, d] and a table [rows, blocks] of pages, in random
order. Each call of attention gathers its rows' pages by one index_select, and is then the same
scaled_dot_product_attention with the same bias. "neighbours": the calls of the slots; "equal lengths": one for each
number of blocks, whatever the order of the rows (slots would have to be copied for that); "one call": one for all rows,
padded to the longest. FlexAttention: torch's PagedAttention under torch.compile, on one call.

All store a new token's keys and values in each layer. A step's preparation (indices, biases, block masks) is counted,
once for its layers. Peak: of the step's own memory, beside the cache. Variants take turns; medians.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import pathlib
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from megalith.config.sections.model import ModelConfig
from megalith.generation.cache import BLOCK, KVCache, cached_attentions
from megalith.generation.cached_attention import DecodeCache
from megalith.layers.mask import AttentionMask
from megalith.runtime.build import build_model

Step = Callable[[], list[Tensor]]  # the output of each layer, [rows, heads, 1, d]


class Inputs:
    """Lengths of the rows, new token included; queries, and the new token's keys and values, of each layer."""

    def __init__(self, args: argparse.Namespace):
        self.layers, self.heads, self.width = args.num_layers, args.heads, args.hidden_size // args.heads
        draw = random.Random(1)
        self.lengths = [draw.randint(*args.lengths) for _ in range(args.rows)]
        self.positions = [length - 1 for length in self.lengths]
        self.blocks = [-(-length // BLOCK) for length in self.lengths]
        torch.manual_seed(1)
        shape = (self.layers, args.rows, self.heads)
        self.q, self.k, self.v = (torch.randn(*shape, 1, self.width) for _ in range(3))
        self.keys, self.values = (torch.randn(*shape, max(self.blocks) * BLOCK, self.width) for _ in range(2))


def slots(args: argparse.Namespace, inputs: Inputs) -> tuple[Step, int]:
    """A step with generation/cache.py, and the bytes of its cache."""
    config = ModelConfig(
        num_layers=args.num_layers, hidden_size=args.hidden_size, num_attention_heads=args.heads, vocab_size=64,
        max_position_embeddings=max(inputs.lengths),
    )  # fmt: skip
    model = build_model(config, torch.device("cpu"), seed=1)
    cache = KVCache(model, args.rows, max(inputs.lengths))
    cores = [attention.core for attention in cached_attentions(model)]
    for core, keys, values in zip(cores, inputs.keys, inputs.values):
        cache.layers[core.site].keys.copy_(keys)
        cache.layers[core.site].values.copy_(values)
    view, mask = DecodeCache(cache), AttentionMask()

    def step() -> list[Tensor]:
        view.begin(range(args.rows), inputs.positions)
        return [view.attend(core, *qkv, mask) for core, *qkv in zip(cores, inputs.q, inputs.k, inputs.v)]

    return step, cache.bytes_allocated


def pages(inputs: Inputs, calls: Sequence[Sequence[int]]) -> tuple[Step, int]:
    """A step with pages, whose calls of attention are of these rows; and the bytes of the pools."""
    count, heads, longest = sum(inputs.blocks), inputs.heads, max(inputs.blocks)
    free = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.zeros(len(inputs.lengths), longest, dtype=torch.int64)  # page 0 where a row has no block: masked
    key_pools, value_pools = (torch.zeros(inputs.layers, count, heads, BLOCK, inputs.width) for _ in range(2))
    for row, blocks in enumerate(inputs.blocks):
        table[row, :blocks] = torch.tensor([free.pop() for _ in range(blocks)])
        for pools, full in ((key_pools, inputs.keys), (value_pools, inputs.values)):
            split = full[:, row, :, : blocks * BLOCK].unflatten(2, (blocks, BLOCK))  # [layers, heads, blocks, 64, d]
            pools[:, table[row, :blocks]] = split.transpose(1, 2)

    def step() -> list[Tensor]:
        positions = torch.tensor(inputs.positions)
        page = table.gather(1, (positions // BLOCK)[:, None])[:, 0]
        prepared = []
        for rows in calls:
            index, blocks = torch.tensor(rows), max(inputs.blocks[row] for row in rows)
            # A page is one slab of each head, so that what is gathered is [rows, heads, blocks x 64, d] at once.
            slabs = table[index, None, :blocks] * heads + torch.arange(heads)[None, :, None]
            hidden = torch.arange(blocks * BLOCK) > positions[index, None, None, None]
            bias = torch.zeros(()).masked_fill(hidden, float("-inf"))
            prepared.append((index, slabs.flatten(), (len(rows), heads, blocks * BLOCK, inputs.width), bias))
        return [layer(number, prepared, page, positions % BLOCK) for number in range(inputs.layers)]

    def layer(number: int, prepared: list, page: Tensor, offset: Tensor) -> Tensor:
        key_pool, value_pool, q = key_pools[number], value_pools[number], inputs.q[number]
        key_pool[page, :, offset], value_pool[page, :, offset] = inputs.k[number, :, :, 0], inputs.v[number, :, :, 0]
        out = torch.empty_like(q)
        for index, slabs, shape, bias in prepared:
            keys, values = (pool.flatten(0, 1).index_select(0, slabs).view(shape) for pool in (key_pool, value_pool))
            out[index] = scaled_dot_product_attention(q[index], keys, values, attn_mask=bias)
        return out

    return step, key_pools.nbytes + value_pools.nbytes


def flex(inputs: Inputs) -> tuple[Step, int]:
    """A step with torch's PagedAttention, and the bytes of its pools."""
    from torch.nn.attention.experimental._paged_attention import PagedAttention
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    count, longest, rows = sum(inputs.blocks), max(inputs.blocks) * BLOCK, len(inputs.lengths)
    paged = PagedAttention(count, BLOCK, rows, device="cpu")
    key_pools, value_pools = (torch.zeros(inputs.layers, 1, inputs.heads, count * BLOCK, inputs.width) for _ in "kv")
    for row, blocks in enumerate(inputs.blocks):
        index, length = torch.tensor([row]), torch.tensor([blocks * BLOCK])
        paged.reserve(index[0], length[0])
        for pools, full in zip(zip(key_pools, value_pools), zip(inputs.keys, inputs.values)):
            first = [each[row : row + 1, :, : blocks * BLOCK] for each in full]
            paged.assign(index, torch.arange(blocks * BLOCK)[None], *first, *pools)
    compiled, every = torch.compile(flex_attention), torch.arange(rows)

    def step() -> list[Tensor]:
        positions = torch.tensor(inputs.positions)
        logical = create_block_mask(
            lambda b, h, i, j: j <= positions[b], rows, None, 1, longest, device="cpu", BLOCK_SIZE=(BLOCK, BLOCK)
        )  # fmt: skip
        mask = paged.convert_logical_block_mask(logical)
        outputs = []
        for q, k, v, keys, values in zip(inputs.q, inputs.k, inputs.v, key_pools, value_pools):
            paged.assign(every, positions[:, None], k, v, keys, values)
            outputs.append(compiled(q, keys, values, block_mask=mask))
        return outputs

    return step, key_pools.nbytes + value_pools.nbytes


@torch.no_grad()
def main() -> None:
    """Measure every variant and print the table."""
    args = arguments()
    torch.set_num_threads(args.threads)
    inputs = Inputs(args)
    by_blocks = sorted(range(args.rows), key=lambda row: inputs.blocks[row])
    neighbours = [list(rows) for _, rows in itertools.groupby(range(args.rows), lambda row: inputs.blocks[row])]
    equal = [list(rows) for _, rows in itertools.groupby(by_blocks, lambda row: inputs.blocks[row])]
    variants = {
        f"slots, neighbours ({len(neighbours)} calls)": lambda: slots(args, inputs),
        f"pages, neighbours ({len(neighbours)} calls)": lambda: pages(inputs, neighbours),
        f"pages, equal lengths ({len(equal)} calls)": lambda: pages(inputs, equal),
        "pages, one call": lambda: pages(inputs, [range(args.rows)]),
        "pages, FlexAttention": lambda: flex(inputs),
    }
    steps, seconds = dict[str, tuple[Step, int]](), dict[str, list[float]]()
    failed, expected = dict[str, str](), list[Tensor]()
    for name, build in variants.items():
        try:
            step, cached = build()
            made = step()
        except Exception as error:  # FlexAttention does not run everywhere
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            continue
        expected = expected or made
        for found, right in zip(made, expected):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)
        steps[name], seconds[name] = (step, cached), []
    for _ in range(args.rounds):
        for name, (step, _) in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append((time.perf_counter() - started) / args.num_layers)
    text = report(args, inputs, steps, seconds, failed)
    print(text, end="")
    if args.out:
        pathlib.Path(args.out).write_text(text)


def report(args: argparse.Namespace, inputs: Inputs, steps: dict, seconds: dict, failed: dict) -> str:
    """The table."""
    name = pathlib.Path(sys.argv[0]).name
    lines = [
        f"command: python benchmarks/{shlex.join([name, *sys.argv[1:]])}",
        f"machine: {datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f}, torch {torch.__version__}, {args.threads} threads",
        f"{args.rows} rows of {min(inputs.lengths)} to {max(inputs.lengths)} tokens ({sum(inputs.lengths)} in all), "
        f"{args.heads} heads of {inputs.width}, {args.num_layers} layers, float32; medians of {args.rounds} steps",
        "",
        f"{'':36}{'us a layer':>11}{'quartiles':>16}{'ratio':>7}{'cache':>10}{'peak':>10}",
    ]
    first = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        step, cached = steps[name]
        lines.append(
            f"{name:36}{middle * 1e6:11.0f}{f'{low * 1e6:.0f} to {high * 1e6:.0f}':>16}{middle / first:7.2f}"
            f"{cached / 2**20:6.1f} MiB{peak_bytes(step) / 2**20:6.2f} MiB"
        )
    return "\n".join([*lines, *(f"{name} failed: {why}" for name, why in failed.items())]) + "\n"


def peak_bytes(step: Step) -> int:
    """The most bytes that a step holds at one time, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    changes = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(changes, key=lambda each: each.start_ns())))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 32, "num-layers": 6, "hidden-size": 384, "heads": 6, "rounds": 50, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lengths", type=int, nargs=2, default=[32, 512], help="least and most tokens of a row")
    parser.add_argument("--out", help="file for the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
