"""Stages: every layer on one stage, every stage on one process, the dearest stage as cheap as can be."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.config.run import RunConfig
from megalith.config.stages import (
    end_costs,
    layers_of,
    num_stages,
    partition,
    schedule_of,
    split,
    stages_of,
    stages_per_process,
)

MODEL = RunConfig().replace(num_layers=8, hidden_size=64, num_attention_heads=4, vocab_size=256, seq_length=32)


def pipeline_of(processes, **values):
    return MODEL.replace(pipeline_model_parallel_size=processes, **values)


@given(st.integers(1, 8), st.integers(0, 40), st.floats(0, 9), st.floats(0, 9))
def test_no_layer_is_dropped(stages, more, first, last):
    counts = split(stages + more, stages, first, last)
    assert len(counts) == stages and sum(counts) == stages + more and min(counts) >= 1


@given(st.integers(1, 4), st.integers(0, 6), st.floats(0, 5), st.floats(0, 5))
def test_the_dearest_stage_is_as_cheap_as_can_be(stages, more, first, last):
    layers = stages + more
    ends = [first, *[0.0] * (stages - 2), last] if stages > 1 else [first + last]

    def dearest(counts):
        return max(count + end for count, end in zip(counts, ends, strict=True))

    every = (counts for counts in itertools.product(range(1, layers + 1), repeat=stages) if sum(counts) == layers)
    assert dearest(split(layers, stages, first, last)) == pytest.approx(min(map(dearest, every)))


@given(
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from(["auto", "gpipe", "1f1b", "interleaved_1f1b", "zero_bubble", "zbv", "dualpipev"]),
    st.sampled_from(["cost", "even"]),
    st.integers(8, 4096),
)
def test_each_layer_on_one_stage_and_each_stage_on_one_process(processes, factor, schedule, how, vocabulary):
    config = pipeline_of(
        processes,
        num_layers=2 * processes * factor + 1,
        pipeline_schedule=schedule,
        pipeline_split=how,
        vocab_size=vocabulary,
    )
    assert [layer for layers in layers_of(config) for layer in layers] == list(range(config.model.num_layers))
    assert len(layers_of(config)) == num_stages(config)
    assert sorted(stage for process in range(processes) for stage in stages_of(config, process)) == list(
        range(num_stages(config))
    )


def test_looping_and_v_shaped_placement():
    assert [stages_of(pipeline_of(2, num_layers_per_virtual_pipeline_stage=2), process) for process in (0, 1)] == [
        [0, 2],
        [1, 3],
    ]
    assert [stages_of(pipeline_of(2, pipeline_schedule="zbv"), process) for process in (0, 1)] == [[0, 3], [1, 2]]


def test_auto_is_interleaved_where_stages_are_virtual():
    assert schedule_of(pipeline_of(2).parallel) == "1f1b"
    assert schedule_of(pipeline_of(2, num_layers_per_virtual_pipeline_stage=1).parallel) == "interleaved_1f1b"
    assert stages_per_process(pipeline_of(2, num_layers_per_virtual_pipeline_stage=1)) == 4
    assert stages_per_process(pipeline_of(2, pipeline_schedule="interleaved_1f1b")) == 2
    assert stages_per_process(pipeline_of(2, pipeline_schedule="zero_bubble")) == 1


def test_embedding_and_head_count_as_cost():
    """A layer of 12 h^2 parameters and a head of 24 h^2: the last stage has two layers fewer, the first none more."""
    config = pipeline_of(2, vocab_size=24 * 64, seq_length=1)
    first, last = end_costs(config.model, 1)
    assert last == pytest.approx(2.0, rel=0.01) and first == pytest.approx(last / 10)
    assert [len(layers) for layers in layers_of(config)] == [5, 3]
    assert [len(layers) for layers in layers_of(config.replace(pipeline_split="even"))] == [4, 4]


def test_gpt2_large_split_evenly_is_megatrons():
    config = RunConfig().replace(
        num_layers=36,
        hidden_size=1280,
        num_attention_heads=20,
        vocab_size=50257,
        seq_length=1024,
        pipeline_model_parallel_size=2,
        pipeline_split="even",
    )
    assert [len(layers) for layers in layers_of(config)] == [18, 18]
    assert [len(layers) for layers in layers_of(config.replace(pipeline_split="cost"))] == [19, 17]


@given(st.lists(st.floats(0.1, 9), min_size=1, max_size=8), st.integers(1, 4))
def test_layers_of_different_costs(costs, stages):
    stages = min(stages, len(costs))

    def dearest(counts):
        ends = [sum(counts[:number]) for number in range(len(counts) + 1)]
        return max(sum(costs[first:last]) for first, last in itertools.pairwise(ends))

    every = (
        counts for counts in itertools.product(range(1, len(costs) + 1), repeat=stages) if sum(counts) == len(costs)
    )
    counts = partition(costs, stages)
    assert sum(counts) == len(costs) and min(counts) >= 1 and dearest(counts) == pytest.approx(min(map(dearest, every)))


def test_stages_of_an_encoder_and_a_decoder():
    """A short decoder costs little, so that it shares a stage; even stages do not ask."""
    t5 = pipeline_of(2, model_type="t5", num_layers=4, decoder_num_layers=4, seq_length=512, decoder_seq_length=64)
    assert layers_of(t5.replace(pipeline_split="even")) == [range(4), range(4, 8)]
    first, second = layers_of(t5)
    assert first.stop < 4 and second.stop == 8
