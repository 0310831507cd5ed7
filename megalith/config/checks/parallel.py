"""Rules of the layout (how many processes, what each axis splits) and of batch sizes on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalith.config.batch_math import data_parallel_size, global_batch
from megalith.config.flags.text import Problem, Words, around, divisors, flag, multiples, trouble
from megalith.config.run import RunConfig
from megalith.config.stages import LOOPING, SPLIT_BACKWARD, num_stages, schedule_of

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
SCHEDULE_NEEDS_STAGES = ("interleaved_1f1b", "zero_bubble", "zbv", "dualpipev")


def parallel_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """What of the sections parallel and batch cannot work together, or not on so many processes."""
    p = config.parallel
    yield from _splits(config, world_size)
    yield from _pipeline(config)
    device = {"nccl": "cuda", "xccl": "xpu"}.get(p.distributed_backend or "", p.device)
    if device != p.device != "auto":
        yield trouble(("distributed_backend", "device"), "--distributed-backend", p.distributed_backend,
                      f"it serves {device}, and --device is {p.device}", "Leave out one of the two")  # fmt: skip
    copy = p.model_parallel_size
    if world_size < copy or world_size % copy:
        yield trouble((TP, PP, CP), "number of processes", world_size,
                      f"it must be a multiple of tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size} "
                      f"x context {p.context_parallel_size} = {copy}", _way_out(config, world_size))  # fmt: skip
        return
    dp = data_parallel_size(config, world_size)
    if dp % p.data_parallel_replicas:
        cure = f"Write --data-parallel-replicas {around(p.data_parallel_replicas, divisors(dp))}"
        yield trouble(("data_parallel_replicas",), "--data-parallel-replicas", p.data_parallel_replicas,
                      f"the data-parallel size, {dp}, must be a multiple of it", cure)  # fmt: skip
    elif p.data_parallel_replicas > 1 and p.sharding == "none":
        yield trouble(("data_parallel_replicas",), "--data-parallel-replicas", p.data_parallel_replicas,
                      "without sharding every process is a replica already",
                      "Add --data-parallel-sharding optimizer or full, or leave it out")  # fmt: skip
    yield from _batches(config, dp)


def _batches(config: RunConfig, dp: int) -> Iterator[Problem]:
    b = config.batch
    if b.micro_batch_size is None:
        yield trouble(
            ("micro_batch_size",),
            "--micro-batch-size",
            None,
            "a step needs a size",
            "Write --micro-batch-size 4 (samples per device)",
        )
        return
    unit, full = b.micro_batch_size * dp, global_batch(config, dp)
    each = f"--micro-batch-size {b.micro_batch_size} x data-parallel size {dp} = {unit}"
    about = ("global_batch_size", "micro_batch_size")
    if full % unit:
        fitting = sorted({max(1, full // unit) * unit, -(-full // unit) * unit})
        yield trouble(about, "--global-batch-size", full, f"it must be a multiple of {each}",
                      f"Write --global-batch-size {' or '.join(map(str, fitting))}")  # fmt: skip
        return
    problems = list(_rampup(b.rampup_batch_size, full, unit, each))
    yield from problems
    sizes = range(b.rampup_batch_size[0], full, b.rampup_batch_size[1]) if b.rampup_batch_size and not problems else ()
    yield from next(
        (found for size in (full, *sizes) if (found := list(_micro_batches(config, size // unit, unit)))), ()
    )


def _rampup(rampup: list[int], full: int, unit: int, each: str) -> Iterator[Problem]:
    about = ("rampup_batch_size", "global_batch_size")
    if not rampup:
        return
    what, found = "--rampup-batch-size", Words(" ".join(map(str, rampup)))
    if len(rampup) != 3:
        yield trouble(
            about,
            what,
            found,
            "it is three numbers: first size, increment, samples",
            "Write for example --rampup-batch-size 16 16 5859375",
        )
        return
    start, increment, samples = rampup
    if start < 1 or increment < 1 or samples < 1:
        yield trouble(
            about, what, found, "its numbers are 1 or more", "Write for example --rampup-batch-size 16 16 5859375"
        )
    elif start >= full:
        yield trouble(
            about,
            what,
            found,
            f"the first size is less than --global-batch-size, {full}",
            "Write a smaller one, or leave ramp-up out",
        )
    elif (full - start) % increment:
        steps = [n for n in divisors(full - start) if n % unit == 0] or divisors(full - start)
        cure = " or ".join(f"{start} {n} {samples}" for n in around(increment, steps).split(" or "))
        yield trouble(about, what, found, f"increments lead from {start} to --global-batch-size, {full}, exactly",
                      f"Write --rampup-batch-size {cure}")  # fmt: skip
    elif start % unit or increment % unit:
        cure = f"Write multiples of {unit}, or a smaller micro-batch"
        yield trouble(about, what, found, f"first size and increment must be multiples of {each}", cure)


def _micro_batches(config: RunConfig, count: int, unit: int) -> Iterator[Problem]:
    """Numbers of micro-batches that a pipeline schedule cannot run (the rules of torch.distributed.pipelining)."""
    p = config.parallel
    stages = p.pipeline_model_parallel_size
    if stages == 1:
        return
    about = ("global_batch_size", "micro_batch_size", "pipeline_schedule")
    if schedule_of(p) in LOOPING:
        rounds = max(1, count // stages)
        if count % rounds:
            fitting = [n * unit for n in range(rounds * stages, (rounds + 1) * stages + 1) if n % (n // stages) == 0]
            yield trouble(about, "micro-batches of a step", count, f"the schedule runs them in {rounds} equal rounds",
                          f"Write --global-batch-size {around(count * unit, fitting)}")  # fmt: skip
        return
    needed = {"dualpipev": 2 * stages, "1f1b": stages}.get(p.pipeline_schedule, 1)
    if count < needed:
        yield trouble(about, "micro-batches of a step", count, f"the pipeline needs at least {needed}, to fill its stages",
                      f"Write --global-batch-size {needed * unit}, or --pipeline-schedule gpipe")  # fmt: skip


def _pipeline(config: RunConfig) -> Iterator[Problem]:
    p, layers, schedule = config.parallel, config.model.all_layers or None, schedule_of(config.parallel)
    called = "encoder and decoder layers" if config.model.decoder_layers else "--num-layers"
    stages, per_chunk = p.pipeline_model_parallel_size, p.num_layers_per_virtual_pipeline_stage
    if p.pipeline_schedule in SCHEDULE_NEEDS_STAGES and stages == 1:
        yield trouble(("pipeline_schedule", PP), "--pipeline-schedule", p.pipeline_schedule, "a pipeline has two stages or more",
                      "Write --pipeline-model-parallel-size 2, or leave the schedule out")  # fmt: skip
    if stages > 1 and schedule in SPLIT_BACKWARD:
        yield from _split_backward(config, schedule)
    if config.logging.profile_pipeline and stages == 1:
        yield trouble(("profile_pipeline", PP), "--profile-pipeline", Words("no pipeline"), "it draws one",
                      f"Write {flag(PP)} 2 or more, or leave it out")  # fmt: skip
    if layers is None:
        return
    if stages > layers:
        yield trouble(
            (PP, "num_layers"),
            flag(PP),
            stages,
            f"each stage has a layer, and {called} is {layers}",
            f"Write {layers} or less",
        )
    elif per_chunk and stages == 1:
        yield trouble(("num_layers_per_virtual_pipeline_stage", PP), "--num-layers-per-virtual-pipeline-stage", per_chunk,
                      "virtual stages divide the stages of a pipeline", f"Write {flag(PP)} 2, or leave it out")  # fmt: skip
    elif per_chunk and schedule not in LOOPING:
        yield trouble(("num_layers_per_virtual_pipeline_stage", "pipeline_schedule"), "--num-layers-per-virtual-pipeline-stage", per_chunk,
                      f"--pipeline-schedule {schedule} sets the number of stages itself; this is for {' and '.join(LOOPING)}",
                      "Leave out one of the two")  # fmt: skip
    elif num_stages(config) > layers:
        yield trouble(("pipeline_schedule", "num_layers"), called, layers,
                      f"--pipeline-schedule {schedule} has {num_stages(config)} stages on {stages} processes, each with a layer",
                      "Write --pipeline-schedule 1f1b")  # fmt: skip
    elif per_chunk and layers % (per_chunk * stages):
        fitting = [n for n in range(1, layers // stages + 1) if layers % (n * stages) == 0]
        cure = (
            f"Write {' or '.join(map(str, fitting))}"
            if fitting
            else f"Choose {called} as a multiple of {stages}, the pipeline stages"
        )
        yield trouble(("num_layers_per_virtual_pipeline_stage", "num_layers"), "--num-layers-per-virtual-pipeline-stage", per_chunk,
                      f"{called}, {layers}, must be a multiple of it times the {stages} pipeline stages", cure)  # fmt: skip


def _split_backward(config: RunConfig, schedule: str) -> Iterator[Problem]:
    """What a schedule that computes weight gradients apart from those of activations cannot work with."""
    cure = "Leave it out, or write --pipeline-schedule interleaved_1f1b"
    if config.precision.compile:
        yield trouble(("compile", "pipeline_schedule"), "--compile", Words(f"with --pipeline-schedule {schedule}"),
                      "a compiled block computes both kinds of gradients in one piece, and none can be put off", cure)  # fmt: skip
    if config.recompute.granularity == "full":
        yield trouble(("recompute_granularity", "pipeline_schedule"), "--recompute-granularity full",
                      Words(f"with --pipeline-schedule {schedule}"),
                      "weight gradients that are put off keep the inputs of layers, which full recompute is to free", cure)  # fmt: skip


def _splits(config: RunConfig, world_size: int) -> Iterator[Problem]:
    m, p, tp = config.model, config.parallel, config.parallel.tensor_model_parallel_size
    if p.sequence_parallel and tp == 1:
        yield trouble(("sequence_parallel", TP), "--sequence-parallel", Words(f"{flag(TP)} 1"), "it splits among tensor-parallel processes",
                      f"Write {flag(TP)} 2 or more, or leave it out")  # fmt: skip
    if tp > 1 and m.num_attention_heads:
        whole = {"num_attention_heads": m.num_attention_heads}
        if m.hidden_size and m.ffn_size:
            whole["ffn_hidden_size"] = m.ffn_size
        kv = m.num_kv_heads
        fits = [
            n for n in divisors(math.gcd(*whole.values())) if kv == m.num_attention_heads or kv % n == 0 or n % kv == 0
        ]
        here = [n for n in fits if world_size % (n * p.pipeline_model_parallel_size * p.context_parallel_size) == 0]
        others = [n for n in around(tp, fits).split(" or ") if int(n) not in here]
        cure = f"Write {flag(TP)} {around(tp, here or fits)}"
        cure += f", or with another number of processes {' or '.join(others)}" * bool(here and others)
        for name, value in whole.items():
            if value % tp:
                yield trouble((TP, name), flag(TP), tp, f"{flag(name)}, {value}, must be a multiple of it", cure)
        if kv != m.num_attention_heads and kv % tp and tp % kv:
            yield trouble(
                (TP, "num_query_groups"),
                flag(TP),
                tp,
                f"it must divide the {kv} key/value heads, or be a multiple of them",
                cure,
            )
    yield from _sequence(
        config, "seq_length", "--seq-length, the encoder's --encoder-seq-length" if m.decoder_layers else "--seq-length"
    )
    if m.decoder_layers:
        yield from _sequence(config, "decoder_seq_length", "--decoder-seq-length")


def _sequence(config: RunConfig, name: str, called: str) -> Iterator[Problem]:
    """Whether a sequence, of the length that field `name` has, can be split."""
    p, length = config.parallel, config.flat()[name]
    tp, cp = p.tensor_model_parallel_size, p.context_parallel_size
    if length is None:
        return
    chunks = 2 * cp if cp > 1 else 1
    cure = f"Write {flag(name)} {around(length, multiples(length, math.lcm(chunks, tp * cp) if p.sequence_parallel else chunks))}"
    if length % chunks:
        yield trouble(
            (name, CP), called, length, f"each of {cp} context-parallel processes takes two chunks of it", cure
        )
    elif p.sequence_parallel and length // cp % tp:
        yield trouble((name, TP), called, length, f"--sequence-parallel splits it among {tp} processes", cure)


def layouts(config: RunConfig, world_size: int, count: int = 3) -> list[tuple[int, int, int]]:
    """Up to `count` (tensor, pipeline, context) sizes that fit the processes and the model, nearest to the wanted ones first."""
    p, layers = config.parallel, config.model.all_layers or 1
    wanted = (p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size)

    def fits(tp: int, pp: int, cp: int) -> bool:
        if world_size % (tp * pp * cp) or pp > layers:
            return False
        sizes = {TP: tp, PP: pp, CP: cp, "sequence_parallel": p.sequence_parallel and tp > 1}
        return not list(_splits(config.replace(**sizes), world_size))

    def far(sizes: tuple[int, int, int]) -> float:
        return sum(abs(math.log2(size / want)) + (size > want == 1) for size, want in zip(sizes, wanted, strict=True))

    sizes = [n for n in range(1, world_size + 1) if world_size % n == 0]
    found = [(tp, pp, cp) for tp in sizes for pp in sizes for cp in sizes if fits(tp, pp, cp)]
    return sorted(found, key=lambda each: (far(each), each))[:count]


def _way_out(config: RunConfig, world_size: int) -> str:
    copy = config.parallel.model_parallel_size
    numbers = sorted({max(1, world_size // copy) * copy, -(-max(1, world_size) // copy) * copy})
    ways = [
        " ".join(f"{flag(name)} {size}" for name, size in zip((TP, PP, CP), sizes, strict=True) if size > 1)
        or "no model parallelism"
        for sizes in layouts(config, world_size)
    ]
    return f"Start {' or '.join(map(str, numbers))} processes, or with {world_size} use {'; or '.join(ways)}"
