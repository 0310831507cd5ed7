"""Arithmetic of batches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalith.common.errors import ConfigError
from megalith.config.batch_math import (
    batch_size_at,
    data_parallel_size,
    global_batch,
    micro_batches,
    ramp,
    run_summary,
    total_samples,
    total_steps,
)
from megalith.config.run import RunConfig


def test_golden_numbers_of_gpt3_175b():
    """Megatron-LM's own example: 19,802 steps of ramp-up over 5,859,424 samples, 111,354 steps in all."""
    config = RunConfig().replace(
        micro_batch_size=1, global_batch_size=1536, rampup_batch_size=[16, 16, 5859375], train_samples=146484375
    )
    assert ramp(config, 8) == (19802, 5859424)
    assert total_steps(config, 8) == 111354
    assert (
        batch_size_at(config, 8, 0) == 16
        and batch_size_at(config, 8, 61677) == 16
        and batch_size_at(config, 8, 61678) == 32
    )
    assert batch_size_at(config, 8, 5859375) == 1536 and batch_size_at(config, 8, 5859376) == 1536
    assert micro_batches(config, 8, 0) == 2 and micro_batches(config, 8, 10**8) == 192


def test_data_parallel_size():
    config = RunConfig().replace(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=2)
    assert data_parallel_size(config, 24) == 2
    with pytest.raises(ConfigError, match=r"The number of processes must be .* 12; found 13\. Start 12 processes"):
        data_parallel_size(config, 13)
    assert data_parallel_size(RunConfig(), 7) == 7


def test_global_batch_defaults_to_one_micro_batch_of_each_rank():
    assert global_batch(RunConfig().replace(micro_batch_size=3), 4) == 12
    assert global_batch(RunConfig().replace(micro_batch_size=3, global_batch_size=24), 4) == 24


def test_what_the_header_says():
    config = RunConfig().replace(micro_batch_size=2, global_batch_size=8, train_samples=100)
    assert run_summary(config, 1) == "1 process, 1 data-parallel; 12 steps, each of 8 samples"
    grown = config.replace(rampup_batch_size=[2, 2, 30])
    steps, samples = ramp(grown, 1)
    assert run_summary(
        grown, 2
    ) == f"2 processes, 2 data-parallel; {total_steps(grown, 2)} steps: {steps} while the batch grows from 2 to 8 " + (
        f"samples, then {(100 - samples) // 8} of 8"
    )
    assert (
        run_summary(config.replace(skip_train=True), 1)
        == "1 process, 1 data-parallel; no training steps (--skip-train)"
    )


def test_lengths_without_rampup():
    steps = RunConfig().replace(micro_batch_size=2, train_iters=7)
    assert total_steps(steps, 3) == 7 and total_samples(steps, 3) == 42
    samples = RunConfig().replace(micro_batch_size=2, train_samples=43)
    assert total_steps(samples, 3) == 7 and total_samples(samples, 3) == 42


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 500), st.integers(0, 3000))
def test_rampup_grows_to_the_full_size_and_the_steps_add_up(unit, start, increments, samples, more):
    full = unit * (start + increments)
    config = RunConfig().replace(
        micro_batch_size=unit,
        global_batch_size=full,
        rampup_batch_size=[unit * start, unit, samples],
        train_samples=samples + more,
    )
    sizes, consumed = [], 0
    for _ in range(total_steps(config, 1)):
        sizes.append(batch_size_at(config, 1, consumed))
        assert sizes[-1] % unit == 0 and micro_batches(config, 1, consumed) * unit == sizes[-1]
        consumed += sizes[-1]
    assert sizes == sorted(sizes) and sizes[0] == unit * start and sizes[-1] <= full
    assert consumed == total_samples(config, 1)
    assert consumed + full > samples + more, "no whole batch of what was asked for is left out"
