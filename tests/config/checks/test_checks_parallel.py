"""Rules of layouts and batches; what is proposed instead does fit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.config.checks.checks import find_problems
from megalith.config.checks.parallel import CP, PP, TP, layouts, parallel_problems
from megalith.config.flags.text import around, divisors, multiples
from megalith.config.run import RunConfig

GOOD = RunConfig().replace(num_layers=8, hidden_size=64, num_attention_heads=8, seq_length=32, micro_batch_size=2)
RAMP = {"global_batch_size": 16, "train_samples": 100}


def texts(world_size=1, **values):
    return [problem.text for problem in parallel_problems(GOOD.replace(**values), world_size)]


CASES = [
    (
        6,
        {TP: 4},
        "The number of processes must be a multiple of tensor 4 x pipeline 1 x context 1 = 4; found 6. Start "
        "4 or 8 processes, or with 6 use --tensor-model-parallel-size 2; or no model parallelism; or "
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 3.",
    ),
    (1, {TP: 2, PP: 2}, "Start 4 processes, or with 1 use no model parallelism."),
    (
        2,
        {"data_parallel_replicas": 3, "data_parallel_sharding": "full"},
        "--data-parallel-replicas must divide the data-parallel size, 2; found 3. Write --data-parallel-replicas 2.",
    ),
    (
        2,
        {"data_parallel_replicas": 2},
        "--data-parallel-replicas is for --data-parallel-sharding, without which every process is a replica "
        "already; found 2. Add --data-parallel-sharding optimizer or full, or leave it out.",
    ),
    (
        1,
        {"micro_batch_size": None},
        "--micro-batch-size must be given, because a step needs a size; found nothing. Write "
        "--micro-batch-size 4 (samples per device).",
    ),
    (
        3,
        {"global_batch_size": 16},
        "--global-batch-size must be a multiple of --micro-batch-size 2 x data-parallel size 3 = 6; found 16."
        " Write --global-batch-size 12 or 18.",
    ),
    (1, {"global_batch_size": 1}, "Write --global-batch-size 2."),
    (
        1,
        {**RAMP, "rampup_batch_size": [2, 2]},
        "--rampup-batch-size must be three numbers: first size, increment, samples; found 2 2. Write for "
        "example --rampup-batch-size 16 16 5859375.",
    ),
    (
        1,
        {**RAMP, "rampup_batch_size": [2, 0, 9]},
        "--rampup-batch-size must have numbers of 1 or more; found 2 0 9. Write for example "
        "--rampup-batch-size 16 16 5859375.",
    ),
    (
        1,
        {**RAMP, "rampup_batch_size": [16, 2, 9]},
        "--rampup-batch-size must have a first size less than --global-batch-size, 16; found 16 2 9. Write a "
        "smaller one, or leave ramp-up out.",
    ),
    (
        1,
        {**RAMP, "rampup_batch_size": [2, 4, 9]},
        "--rampup-batch-size must have increments that lead from 2 to --global-batch-size, 16, exactly; found"
        " 2 4 9. Write --rampup-batch-size 2 2 9 or 2 14 9.",
    ),
    (
        1,
        {**RAMP, "rampup_batch_size": [3, 13, 9]},
        "--rampup-batch-size must have a first size and an increment that are multiples of --micro-batch-size"
        " 2 x data-parallel size 1 = 2; found 3 13 9. Write multiples of 2, or a smaller micro-batch.",
    ),
    (
        1,
        {"device": "cpu", "distributed_backend": "nccl"},
        "--distributed-backend must serve --device cpu, and not cuda; found 'nccl'. Leave out one of the two.",
    ),
    (
        1,
        {"sequence_parallel": True},
        "--sequence-parallel needs tensor-parallel processes to split sequences among; found "
        "--tensor-model-parallel-size 1. Write --tensor-model-parallel-size 2 or more, or leave it out.",
    ),
    (
        16,
        {TP: 16},
        "--tensor-model-parallel-size must divide --num-attention-heads, 8; found 16. Write "
        "--tensor-model-parallel-size 8.",
    ),
    (
        4,
        {TP: 4, "ffn_hidden_size": 90},
        "--tensor-model-parallel-size must divide --ffn-hidden-size, 90; found 4. Write "
        "--tensor-model-parallel-size 2.",
    ),
    (
        6,
        {TP: 6, "num_attention_heads": 12, "hidden_size": 96, "num_query_groups": 4},
        "--tensor-model-parallel-size must divide the 4 key/value heads, or be a multiple of them; found 6. "
        "Write --tensor-model-parallel-size 2, or with another number of processes 4 or 12.",
    ),
    (
        2,
        {TP: 2, "num_attention_heads": 9, "hidden_size": 72},
        "--tensor-model-parallel-size must divide --num-attention-heads, 9; found 2. Write "
        "--tensor-model-parallel-size 1, or with another number of processes 3.",
    ),
    (6, {TP: 2, "num_attention_heads": 9, "hidden_size": 72}, "Write --tensor-model-parallel-size 1 or 3."),
    (2, {TP: 2, "sequence_parallel": True, "seq_length": 31}, "Write --seq-length 30 or 32."),
    (
        2,
        {CP: 2, "seq_length": 30},
        "--seq-length must be a multiple of 4, because each of 2 context-parallel processes takes two chunks "
        "of it; found 30. Write --seq-length 28 or 32.",
    ),
    (2, {CP: 2, "seq_length": 3}, "Write --seq-length 4."),
    (
        6,
        {TP: 3, CP: 2, "sequence_parallel": True, "num_attention_heads": 9, "hidden_size": 72, "seq_length": 32},
        "Write --seq-length 24 or 36.",
    ),
    (
        1,
        {"pipeline_schedule": "zbv"},
        "--pipeline-schedule needs a pipeline of two stages or more; found 'zbv'. Write "
        "--pipeline-model-parallel-size 2, or leave the schedule out.",
    ),
    (
        16,
        {PP: 16},
        "--pipeline-model-parallel-size must be at most --num-layers, 8, because each stage has a layer; "
        "found 16. Write 8 or less.",
    ),
    (
        1,
        {"num_layers_per_virtual_pipeline_stage": 2},
        "--num-layers-per-virtual-pipeline-stage needs a pipeline, whose stages it divides; found 2. Write "
        "--pipeline-model-parallel-size 2, or leave it out.",
    ),
    (
        2,
        {PP: 2, "num_layers_per_virtual_pipeline_stage": 2, "pipeline_schedule": "zbv"},
        "--num-layers-per-virtual-pipeline-stage is for interleaved_1f1b and zero_bubble: --pipeline-schedule"
        " zbv sets the number of stages itself; found 2. Leave out one of the two.",
    ),
    (
        2,
        {PP: 2, "num_layers": 3, "pipeline_schedule": "zbv"},
        "--num-layers must be at least 4, a layer for each stage of --pipeline-schedule zbv on 2 processes; "
        "found 3. Write --pipeline-schedule 1f1b.",
    ),
    (
        2,
        {PP: 2, "pipeline_schedule": "zero_bubble", "compile": True},
        "--compile excludes --pipeline-schedule zero_bubble: a compiled block computes both kinds of "
        "gradients in one piece, so that no weight gradient can be deferred; found both. Leave it out, or "
        "write --pipeline-schedule interleaved_1f1b.",
    ),
    (
        2,
        {PP: 2, "pipeline_schedule": "zbv", "recompute_granularity": "full", "recompute_method": "uniform"},
        "--recompute-granularity full excludes --pipeline-schedule zbv: deferred weight gradients keep the "
        "inputs of layers, which full recompute is to free; found both. Leave it out, or write "
        "--pipeline-schedule interleaved_1f1b.",
    ),
    (
        1,
        {"profile_pipeline": True},
        "--profile-pipeline needs a pipeline to draw; found none. Write --pipeline-model-parallel-size 2 or "
        "more, or leave it out.",
    ),
    (
        2,
        {PP: 2, "num_layers_per_virtual_pipeline_stage": 3},
        "--num-layers-per-virtual-pipeline-stage times the 2 pipeline stages must divide --num-layers, 8; "
        "found 3. Write 1 or 2 or 4.",
    ),
    (3, {PP: 3, "num_layers_per_virtual_pipeline_stage": 1}, "Choose --num-layers as a multiple of 3"),
    (
        2,
        {PP: 2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 10},
        "Write --global-batch-size 8 or 12.",
    ),
    (
        4,
        {PP: 4, "pipeline_schedule": "1f1b"},
        "The number of micro-batches of a step must be at least 4, to fill the stages of the pipeline; found "
        "1. Write --global-batch-size 8, or --pipeline-schedule gpipe.",
    ),
    (
        2,
        {PP: 2, "pipeline_schedule": "dualpipev", "global_batch_size": 6},
        "The number of micro-batches of a step must be at least 4, to fill the stages of the pipeline; found "
        "3. Write --global-batch-size 8, or --pipeline-schedule gpipe.",
    ),
    (
        2,
        {PP: 2, "pipeline_schedule": "1f1b", **RAMP, "rampup_batch_size": [2, 2, 50]},
        "The number of micro-batches of a step must be at least 2, to fill the stages of the pipeline; found "
        "1. Write --global-batch-size 4, or --pipeline-schedule gpipe.",
    ),
]


@pytest.mark.parametrize(("world_size", "values", "message"), CASES)
def test_each_rule(world_size, values, message):
    (text,) = texts(world_size, **values)
    assert message in text


@pytest.mark.parametrize(
    ("world_size", "values"),
    [
        (1, {}),
        (3, {}),
        (8, {TP: 2, PP: 2, CP: 2, "sequence_parallel": True}),
        (4, {TP: 4, "num_query_groups": 2}),
        (4, {TP: 4, "attention_head_type": "multiquery"}),
        (2, {PP: 2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 6}),
        (3, {PP: 3, "num_layers": 8}),
        (4, {"data_parallel_sharding": "full", "data_parallel_replicas": 2}),
        (1, {**RAMP, "rampup_batch_size": [2, 2, 50]}),
        (2, {PP: 2, "pipeline_schedule": "dualpipev", "global_batch_size": 8}),
        (4, {PP: 4}),
    ],
)
def test_what_is_allowed(world_size, values):
    assert texts(world_size, **values) == []


@given(
    st.integers(1, 24),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.integers(1, 6),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
)
def test_proposed_layouts_fit(world_size, tp, pp, cp, groups):
    config = GOOD.replace(**{TP: tp, PP: pp, CP: cp, "num_query_groups": groups})
    proposed = layouts(config, world_size)
    assert 1 <= len(proposed) <= 3
    for sizes in proposed:
        assert not list(parallel_problems(config.replace(**dict(zip((TP, PP, CP), sizes))), world_size)), sizes
    if world_size % (tp * pp * cp) == 0 and not list(parallel_problems(config, world_size)):
        assert proposed[0] == (tp, pp, cp)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 100))
def test_proposed_batch_sizes_fit(dp, micro, full):
    found = texts(dp, micro_batch_size=micro, global_batch_size=full)
    for size in map(int, re.findall(r"\d+", found[0].split("--global-batch-size")[-1])) if found else ():
        assert texts(dp, micro_batch_size=micro, global_batch_size=size) == []


ADVICE = re.compile(r"Write (--[a-z-]+) ((?:\d+(?: or |, or with another number of processes )?)+)")


@given(
    world_size=st.integers(1, 12),
    heads=st.integers(1, 12),
    width=st.integers(1, 4),
    groups=st.none() | st.integers(1, 12),
    tp=st.integers(1, 8),
    cp=st.integers(1, 3),
    length=st.integers(1, 100),
    sequence_parallel=st.booleans(),
    batch=st.integers(1, 40),
    replicas=st.integers(1, 6),
    interval=st.integers(1, 9),
    keep=st.integers(1, 30),
)
def test_every_number_advised_works_and_both_sides_are_named(
    world_size, heads, width, groups, tp, cp, length, sequence_parallel, batch, replicas, interval, keep
):
    config = GOOD.replace(
        num_attention_heads=heads,
        hidden_size=heads * width * 2 + 1,
        num_query_groups=groups,
        seq_length=length,
        keep_every=keep,
        sequence_parallel=sequence_parallel and tp > 1,
        global_batch_size=batch,
        data_parallel_replicas=replicas,
        data_parallel_sharding="full",
        save_interval=interval,
        vocab_size=9,
        **{TP: tp, CP: cp},
    )

    def rules(config: RunConfig) -> dict[tuple[str, str], str]:
        parts = [
            re.fullmatch(r"(.+?): found .*?; (.*?)\. (.*)", each.text)
            for each in find_problems(config, world_size, data=False)
        ]
        return {(part[1], part[2]): part[3] for part in parts if part}

    for rule, cure in rules(config).items():
        for flag, numbers in ADVICE.findall(cure):
            for number in map(int, re.findall(r"\d+", numbers)):
                assert rule not in rules(config.replace(**{flag[2:].replace("-", "_"): number})), (rule, flag, number)


def test_numbers_around_are_the_nearest() -> None:
    assert around(5, divisors(36)) == "4 or 6" and around(1, divisors(7)) == "7" and around(9, divisors(3)) == "3"
    assert around(31, multiples(31, 2)) == "30 or 32" and around(3, multiples(3, 4)) == "4"
    assert sorted(divisors(36)) == [1, 2, 3, 4, 6, 6, 9, 12, 18, 36] and max(divisors(10**20)) == 10**20
