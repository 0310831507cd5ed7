"""Rules of the layout (how many processes, what each axis splits) and of batch sizes on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megalith.config.batch_math import data_parallel_size, global_batch
from megalith.config.flags.text import Problem, Words, around, divisors, field_problem, flag, multiples
from megalith.config.run import RunConfig
from megalith.config.stages import LOOPING, SPLIT_BACKWARD, num_stages, schedule_of

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VIRTUAL, REPLICAS = "num_layers_per_virtual_pipeline_stage", "data_parallel_replicas"
SCHEDULE_NEEDS_STAGES = ("interleaved_1f1b", "zero_bubble", "zbv", "dualpipev")


def parallel_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """What in the sections parallel and batch cannot work together, or not on so many processes."""
    yield from layout_problems(config, world_size)
    p = config.parallel
    if world_size % p.model_parallel_size:
        return
    dp = data_parallel_size(config, world_size)
    if dp % p.data_parallel_replicas:
        cure = f"Write --data-parallel-replicas {around(p.data_parallel_replicas, divisors(dp))}"
        rule = f"must divide the data-parallel size, {dp}"
        yield field_problem((REPLICAS,), flag(REPLICAS), p.data_parallel_replicas, rule, cure)
    elif p.data_parallel_replicas > 1 and p.sharding == "none":
        rule = "is for --data-parallel-sharding, without which every process is a replica already"
        cure = "Add --data-parallel-sharding optimizer or full, or leave it out"
        yield field_problem((REPLICAS,), flag(REPLICAS), p.data_parallel_replicas, rule, cure)
    yield from _batches(config, dp)


def layout_problems(config: RunConfig, world_size: int) -> Iterator[Problem]:
    """What in the section parallel cannot work with the model, or not on so many processes."""
    p = config.parallel
    yield from _splits(config, world_size)
    yield from _pipeline(config)
    device = {"nccl": "cuda", "xccl": "xpu"}.get(p.distributed_backend or "", p.device)
    if device != p.device != "auto":
        yield field_problem(("distributed_backend", "device"), "--distributed-backend", p.distributed_backend,
                      f"must serve --device {p.device}, and not {device}", "Leave out one of the two")  # fmt: skip
    copy = p.model_parallel_size
    if world_size < copy or world_size % copy:
        degrees = f"tensor {p.tensor_model_parallel_size} x pipeline {p.pipeline_model_parallel_size}"
        rule = f"must be a multiple of {degrees} x context {p.context_parallel_size} = {copy}"
        cure = _process_count_cure(config, world_size)
        yield field_problem((TP, PP, CP), "The number of processes", world_size, rule, cure)


def _batches(config: RunConfig, dp: int) -> Iterator[Problem]:
    b = config.batch
    if b.micro_batch_size is None:
        rule, cure = "must be given, because a step needs a size", "Write --micro-batch-size 4 (samples per device)"
        yield field_problem(("micro_batch_size",), "--micro-batch-size", None, rule, cure)
        return
    unit, full = b.micro_batch_size * dp, global_batch(config, dp)
    each = f"--micro-batch-size {b.micro_batch_size} x data-parallel size {dp} = {unit}"
    about = ("global_batch_size", "micro_batch_size")
    if full % unit:
        fitting = sorted({max(1, full // unit) * unit, -(-full // unit) * unit})
        cure = f"Write --global-batch-size {' or '.join(map(str, fitting))}"
        yield field_problem(about, "--global-batch-size", full, f"must be a multiple of {each}", cure)
        return
    problems = list(_rampup(b.rampup_batch_size, full, unit, each))
    yield from problems
    sizes = range(b.rampup_batch_size[0], full, b.rampup_batch_size[1]) if b.rampup_batch_size and not problems else ()
    yield from next(
        (found for size in (full, *sizes) if (found := list(micro_batch_problems(config, size // unit, unit)))), ()
    )


def _rampup(rampup: list[int], full: int, unit: int, each: str) -> Iterator[Problem]:
    about = ("rampup_batch_size", "global_batch_size")
    if not rampup:
        return
    what, found = "--rampup-batch-size", Words(" ".join(map(str, rampup)))
    if len(rampup) != 3:
        rule = "must be three numbers: first size, increment, samples"
        yield field_problem(about, what, found, rule, "Write for example --rampup-batch-size 16 16 5859375")
        return
    start, increment, samples = rampup
    if start < 1 or increment < 1 or samples < 1:
        rule = "must have numbers of 1 or more"
        yield field_problem(about, what, found, rule, "Write for example --rampup-batch-size 16 16 5859375")
    elif start >= full:
        rule = f"must have a first size less than --global-batch-size, {full}"
        yield field_problem(about, what, found, rule, "Write a smaller one, or leave ramp-up out")
    elif (full - start) % increment:
        steps = [n for n in divisors(full - start) if n % unit == 0] or divisors(full - start)
        cure = " or ".join(f"{start} {n} {samples}" for n in around(increment, steps).split(" or "))
        rule = f"must have increments that lead from {start} to --global-batch-size, {full}, exactly"
        yield field_problem(about, what, found, rule, f"Write --rampup-batch-size {cure}")
    elif start % unit or increment % unit:
        cure = f"Write multiples of {unit}, or a smaller micro-batch"
        rule = f"must have a first size and an increment that are multiples of {each}"
        yield field_problem(about, what, found, rule, cure)


def micro_batch_problems(config: RunConfig, count: int, unit: int) -> Iterator[Problem]:
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
            rule = f"must be a multiple of the schedule's {rounds} rounds"
            cure = f"Write --global-batch-size {around(count * unit, fitting)}"
            yield field_problem(about, "The number of micro-batches of a step", count, rule, cure)
        return
    needed = {"dualpipev": 2 * stages, "1f1b": stages}.get(p.pipeline_schedule, 1)
    if count < needed:
        rule = f"must be at least {needed}, to fill the stages of the pipeline"
        cure = f"Write --global-batch-size {needed * unit}, or --pipeline-schedule gpipe"
        yield field_problem(about, "The number of micro-batches of a step", count, rule, cure)


def _pipeline(config: RunConfig) -> Iterator[Problem]:
    p, layers, schedule = config.parallel, config.model.all_layers or None, schedule_of(config.parallel)
    called = "the number of encoder and decoder layers" if config.model.decoder_layers else "--num-layers"
    stages, per_chunk = p.pipeline_model_parallel_size, p.num_layers_per_virtual_pipeline_stage
    if p.pipeline_schedule in SCHEDULE_NEEDS_STAGES and stages == 1:
        rule = "needs a pipeline of two stages or more"
        cure = "Write --pipeline-model-parallel-size 2, or leave the schedule out"
        yield field_problem(("pipeline_schedule", PP), "--pipeline-schedule", p.pipeline_schedule, rule, cure)
    if stages > 1 and schedule in SPLIT_BACKWARD:
        yield from _split_backward(config, schedule)
    if config.logging.profile_pipeline and stages == 1:
        rule, cure = "needs a pipeline to draw", f"Write {flag(PP)} 2 or more, or leave it out"
        yield field_problem(("profile_pipeline", PP), "--profile-pipeline", Words("none"), rule, cure)
    if layers is None:
        return
    if stages > layers:
        rule = f"must be at most {called}, {layers}, because each stage has a layer"
        yield field_problem((PP, "num_layers"), flag(PP), stages, rule, f"Write {layers} or less")
    elif per_chunk and stages == 1:
        rule, cure = "needs a pipeline, whose stages it divides", f"Write {flag(PP)} 2, or leave it out"
        yield field_problem((VIRTUAL, PP), flag(VIRTUAL), per_chunk, rule, cure)
    elif per_chunk and schedule not in LOOPING:
        rule = f"is for {' and '.join(LOOPING)}: --pipeline-schedule {schedule} sets the number of stages itself"
        yield field_problem((VIRTUAL, "pipeline_schedule"), flag(VIRTUAL), per_chunk, rule, "Leave out one of the two")
    elif num_stages(config) > layers:
        rule = f"must be at least {num_stages(config)}, a layer for each stage of --pipeline-schedule {schedule} "
        rule += f"on {stages} processes"
        about = ("pipeline_schedule", "num_layers")
        yield field_problem(about, called[0].upper() + called[1:], layers, rule, "Write --pipeline-schedule 1f1b")
    elif per_chunk and layers % (per_chunk * stages):
        fitting = [n for n in range(1, layers // stages + 1) if layers % (n * stages) == 0]
        cure = f"Choose {called} as a multiple of {stages}, the pipeline stages"
        if fitting:
            cure = f"Write {' or '.join(map(str, fitting))}"
        rule = f"times the {stages} pipeline stages must divide {called}, {layers}"
        yield field_problem((VIRTUAL, "num_layers"), flag(VIRTUAL), per_chunk, rule, cure)


def _split_backward(config: RunConfig, schedule: str) -> Iterator[Problem]:
    """What a schedule that computes weight gradients apart from those of activations cannot work with."""
    cure = "Leave it out, or write --pipeline-schedule interleaved_1f1b"
    found = Words("both")
    if config.precision.compile:
        rule = f"excludes --pipeline-schedule {schedule}: a compiled block computes both kinds of gradients in one "
        rule += "piece, so that no weight gradient can be deferred"
        yield field_problem(("compile", "pipeline_schedule"), "--compile", found, rule, cure)
    if config.recompute.granularity == "full":
        rule = f"excludes --pipeline-schedule {schedule}: deferred weight gradients keep the inputs of layers, "
        rule += "which full recompute is to free"
        about = ("recompute_granularity", "pipeline_schedule")
        yield field_problem(about, "--recompute-granularity full", found, rule, cure)


def _splits(config: RunConfig, world_size: int) -> Iterator[Problem]:
    m, p, tp = config.model, config.parallel, config.parallel.tensor_model_parallel_size
    if p.sequence_parallel and tp == 1:
        rule = "needs tensor-parallel processes to split sequences among"
        cure = f"Write {flag(TP)} 2 or more, or leave it out"
        yield field_problem(("sequence_parallel", TP), "--sequence-parallel", Words(f"{flag(TP)} 1"), rule, cure)
    if tp > 1 and m.num_attention_heads:
        multiples_of_tp = {"num_attention_heads": m.num_attention_heads}
        if m.hidden_size and m.ffn_size:
            multiples_of_tp["ffn_hidden_size"] = m.ffn_size
        kv = m.num_kv_heads
        common = divisors(math.gcd(*multiples_of_tp.values()))
        fits = [n for n in common if kv == m.num_attention_heads or kv % n == 0 or n % kv == 0]
        here = [n for n in fits if world_size % (n * p.pipeline_model_parallel_size * p.context_parallel_size) == 0]
        others = [n for n in around(tp, fits).split(" or ") if int(n) not in here]
        cure = f"Write {flag(TP)} {around(tp, here or fits)}"
        cure += f", or with another number of processes {' or '.join(others)}" * bool(here and others)
        for name, value in multiples_of_tp.items():
            if value % tp:
                yield field_problem((TP, name), flag(TP), tp, f"must divide {flag(name)}, {value}", cure)
        if kv != m.num_attention_heads and kv % tp and tp % kv:
            rule = f"must divide the {kv} key/value heads, or be a multiple of them"
            yield field_problem((TP, "num_query_groups"), flag(TP), tp, rule, cure)
    called = "--seq-length (the encoder's, --encoder-seq-length)" if m.decoder_layers else "--seq-length"
    yield from _sequence(config, "seq_length", called)
    if m.decoder_layers:
        yield from _sequence(config, "decoder_seq_length", "--decoder-seq-length")


def _sequence(config: RunConfig, name: str, called: str) -> Iterator[Problem]:
    """Whether a sequence, of the length that field `name` has, can be split."""
    p, length = config.parallel, config.flat()[name]
    tp, cp = p.tensor_model_parallel_size, p.context_parallel_size
    if length is None:
        return
    chunks = 2 * cp if cp > 1 else 1
    unit = math.lcm(chunks, tp * cp) if p.sequence_parallel else chunks
    cure = f"Write {flag(name)} {around(length, multiples(length, unit))}"
    if length % chunks:
        rule = f"must be a multiple of {chunks}, because each of {cp} context-parallel processes takes two chunks of it"
        yield field_problem((name, CP), called, length, rule, cure)
    elif p.sequence_parallel and length // cp % tp:
        rule = f"must be a multiple of {tp * cp}, because --sequence-parallel splits it among {tp} processes"
        yield field_problem((name, TP), called, length, rule, cure)


def layouts(config: RunConfig, world_size: int, count: int = 3) -> list[tuple[int, int, int]]:
    """Up to `count` (tensor, pipeline, context) sizes that fit processes and model, nearest to the wanted first."""
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


def _process_count_cure(config: RunConfig, world_size: int) -> str:
    copy = config.parallel.model_parallel_size
    numbers = sorted({max(1, world_size // copy) * copy, -(-max(1, world_size) // copy) * copy})
    ways = [
        " ".join(f"{flag(name)} {size}" for name, size in zip((TP, PP, CP), sizes, strict=True) if size > 1)
        or "no model parallelism"
        for sizes in layouts(config, world_size)
    ]
    return f"Start {' or '.join(map(str, numbers))} processes, or with {world_size} use {'; or '.join(ways)}"
