"""Where the time of a decoding step goes; `python benchmarks/generate.py --profile` prints it.

Kernels are grouped by their names and shapes, as torch.profiler records them; medians of the steps. What is left of a
step's time, measured without the profiler, is Python's and the framework's: calling modules, choosing kernels, views.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from megalith.generation.engine import Engine, Request

WARM, STEPS = 4, 16
TOKENS = WARM + 2 * STEPS  # new tokens of the requests that are profiled
PRODUCTS = {"addmm", "mm", "addmv", "mv", "mkldnn_linear", "_mkl_linear", "_linear_pointwise"}
CACHE_WRITES = {"scatter_", "index_put_", "_index_put_impl_", "index_copy_", "slice_scatter"}
NO_KERNEL = {  # views and wrappers: their own time is the framework's
    "linear", "matmul", "t", "transpose", "permute", "view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided",
    "expand", "expand_as", "unsqueeze", "squeeze", "slice", "select", "split", "split_with_sizes", "narrow", "flatten",
    "unflatten", "chunk", "unbind", "alias", "detach", "empty", "empty_like", "empty_strided", "resolve_conj",
    "resolve_neg", "result_type", "to", "_to_copy", "contiguous", "item", "_local_scalar_dense", "is_nonzero",
    "lift_fresh", "detach_", "set_", "resize_", "broadcast_to", "new_empty", "new_zeros", "layer_norm", "dropout",
}  # fmt: skip
GROUPS = (
    "weight products: head", "weight products: layers", "attention", "cache writes", "norms, activations, residuals",
    "sampling and checks", "Python and framework",
)  # fmt: skip


def profile_decoding(engine: Engine, requests: Sequence[Request]) -> list[str]:
    """A table for the requests' number of rows. Each request must have TOKENS new tokens."""
    for request in requests:
        engine.add(request)
    for _ in range(WARM):  # the first reads the prompts
        engine.step()
    seconds = [_timed(engine.step) for _ in range(STEPS)]
    decode = engine.runner.decode
    engine.runner.decode = _recorded(decode, "decode")  # type: ignore[method-assign]
    step = _recorded(engine.step, "step")
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        profiled = [_timed(step) for _ in range(STEPS)]
    del engine.runner.decode  # the method again
    model = engine.text_model.model
    found = collections.defaultdict[str, list[tuple[float, int]]](list)  # group -> (us, calls) of each step
    for event in prof.events():
        if event.name == "step":
            of_step = collections.defaultdict[str, list[float]](list)
            for each in _descendants(event):
                of_step[group_of(each, model.config.vocab_size)].append(each.self_cpu_time_total)
            for group in GROUPS:
                found[group].append((sum(of_step[group]), len(of_step[group])))
    spent = {group: statistics.median(us for us, _ in steps) for group, steps in found.items()}
    calls = {group: statistics.median(number for _, number in steps) for group, steps in found.items()}
    wall = statistics.median(seconds) * 1e6
    spent["Python and framework"] = wall - sum(spent[group] for group in GROUPS[:-1])
    head = model.head.weight.nbytes
    layers = sum(p.nbytes for p in model.layers.parameters() if p.dim() == 2)
    read = dict(zip(GROUPS, (head, layers)))
    lines = [f"{f'a step of {len(requests)} row' + 's' * (len(requests) > 1):34}{'us':>8}{'share':>8}{'calls':>8}"]
    for group in GROUPS:
        rate = f"   {read[group] / spent[group] / 1e3:.1f} GB/s of weights" if group in read else ""
        lines.append(f"{group:34}{spent[group]:8.0f}{spent[group] / wall:8.2f}{calls[group]:8.0f}{rate}")
    return [*lines, f"{'whole step':34}{wall:8.0f}   (with the profiler {statistics.median(profiled) * 1e6:.0f})"]


def group_of(event: FunctionEvent, vocab: int) -> str:
    """The group to which an event's own time belongs."""
    names, parent = [event.name.split("::")[-1]], event.cpu_parent
    while parent is not None:
        names.append(parent.name.split("::")[-1])
        parent = parent.cpu_parent
    sizes = {n for shape in event.input_shapes for n in (shape if isinstance(shape, (list, tuple)) else ())}
    if names[0] in NO_KERNEL or event.name == "decode":
        return "Python and framework"
    if names[0] in PRODUCTS:
        return "weight products: head" if vocab in sizes else "weight products: layers"
    if any("scaled_dot_product" in name for name in names):
        return "attention"
    if not CACHE_WRITES.isdisjoint(names):
        return "cache writes"
    if "decode" not in names or (vocab in sizes and "embedding" not in names):
        return "sampling and checks"
    return "norms, activations, residuals"


def _descendants(event: FunctionEvent) -> Iterator[FunctionEvent]:
    for child in event.cpu_children:
        yield child
        yield from _descendants(child)


def _recorded(function: Callable, name: str) -> Callable:
    def recorded(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return recorded


def _timed(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
