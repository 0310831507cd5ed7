"""Accelerate's configuration: what it becomes for a script, and what of it cannot work together."""

import pytest

from megalith.launcher.accelerate_config import AccelerateConfig, find_problems, keys, notices, typed


def test_environment_of_nothing_is_empty():
    """So that variables which the user set are not replaced by defaults."""
    assert AccelerateConfig().environment() == {}


def test_environment():
    config = AccelerateConfig(
        distributed_type="MEGATRON_LM", num_processes=4, mixed_precision="bf16", use_cpu=False, debug=True,
        gpu_ids="0,1,2,3", enable_cpu_affinity=True, megatron_lm_tp_degree=2, megatron_lm_gradient_clipping=0.5,
        megatron_lm_sequence_parallelism=False,
    )  # fmt: skip
    assert config.environment() == {
        "ACCELERATE_USE_CPU": "false", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_MEGATRON_LM": "true",
        "MEGATRON_LM_TP_DEGREE": "2", "MEGATRON_LM_GRADIENT_CLIPPING": "0.5",
        "MEGATRON_LM_SEQUENCE_PARALLELISM": "false", "ACCELERATE_DEBUG_MODE": "true", "ACCELERATE_CPU_AFFINITY": "1",
        "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"distributed_type": "MULTI_CPU"}, {"ACCELERATE_USE_CPU": "true"}),
        ({"distributed_type": "MULTI_XPU", "gpu_ids": "1"}, {"ZE_AFFINITY_MASK": "1"}),
        ({"gpu_ids": "all"}, {}),
        (
            {"dynamo_backend": "inductor", "dynamo_use_dynamic": True, "dynamo_mode": "default"},
            {
                "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
                "ACCELERATE_DYNAMO_USE_DYNAMIC": "true",
                "ACCELERATE_DYNAMO_MODE": "default",
            },
        ),
    ],
)
def test_environment_of_other_types(values, expected):
    assert AccelerateConfig(**values).environment() == expected


@pytest.mark.parametrize(
    ("values", "processes", "here"),
    [
        ({}, 1, 1),
        ({"num_processes": 8, "num_machines": 2}, 8, 4),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_tp_degree": 2, "megatron_lm_pp_degree": 3}, 6, 6),
        ({"distributed_type": "MEGATRON_LM", "megatron_lm_tp_degree": 2, "num_machines": 4}, 4, 1),
    ],
)
def test_processes(values, processes, here):
    config = AccelerateConfig(**values)
    assert (config.processes, config.processes_here) == (processes, here)
    assert not values or "num_processes" in values or f"not given: {processes} start" in "".join(notices(config))


MEGATRON = {"distributed_type": "MEGATRON_LM", "megatron_lm_tp_degree": 2}
MACHINES = {"num_machines": 2, "num_processes": 4, "main_process_ip": "10.0.0.1"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (MEGATRON | {"num_processes": 3}, "a copy of the model takes (tp x pp x cp), 2; found 3. Write 2 or 4."),
        (MACHINES | {"num_processes": 5}, "must be a multiple of --num-machines, 2"),
        (MACHINES | {"machine_rank": 2}, "--machine-rank must be from 0 to --num-machines - 1, 1; found 2"),
        (MACHINES | {"main_process_ip": None}, "--main-process-ip must be the address of machine 0"),
        (MACHINES | {"main_process_port": 0}, "--main-process-port must be a port that all machines know"),
        ({"main_process_port": 70000}, "must be a port, a whole number up to 65535"),
        ({"num_processes": 4, "gpu_ids": "0,1"}, "--gpu-ids must name a device for each process of this machine, 4"),
        ({"megatron_lm_pp_degree": 2}, "distributed_type must be MEGATRON_LM, because megatron_lm_pp_degree is given"),
        (MEGATRON | {"dynamo_backend": "INDUCTOR"}, 'other_megatron_args={"compile": True}'),
    ],
)
def test_problems(values, message):
    (found,) = find_problems(AccelerateConfig(**values))
    assert message in found.text


@pytest.mark.parametrize(
    "values",
    [
        {},
        MEGATRON,
        MACHINES,
        MEGATRON | {"dynamo_backend": "no"},
        {"num_processes": 4, "gpu_ids": "0", "use_cpu": True},
    ],
)
def test_no_problem(values):
    assert list(find_problems(AccelerateConfig(**values))) == []


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("distributed_type", False, "NO"),
        ("distributed_type", "multi_gpu", "MULTI_GPU"),
        ("mixed_precision", False, "no"),
        ("mixed_precision", "BF16", "bf16"),
        ("main_process_port", "29500", 29500),
        ("megatron_lm_sequence_parallelism", "True", True),
        ("gpu_ids", 0, "0"),
        ("num_processes", None, None),
    ],
)
def test_values_as_they_are_written(name, raw, value):
    assert typed(keys()[name], raw, name) == (value, None)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("distributed_type", "MULTI_GPUS", "found 'MULTI_GPUS'. Write MULTI_GPU."),
        ("distributed_type", "DEEPSPEED", "megatron_lm_use_distributed_optimizer: true"),
        ("distributed_type", "FSDP", "megatron_lm_use_custom_fsdp: true"),
        ("distributed_type", "TPU", "start the script with accelerate launch itself"),
        ("compute_environment", "AMAZON_SAGEMAKER", "Write LOCAL_MACHINE, or start the script with accelerate launch"),
        ("mixed_precision", "fp8", "Write bf16, or"),
        ("mixed_precision", "bf61", "Write bf16."),
        ("num_processes", -1, "must be at least 1; found -1"),
        ("megatron_lm_gradient_clipping", -0.5, "must be at least 0; found -0.5"),
        ("megatron_lm_tp_degree", "two", "must be a whole number, or none (tensor-parallel processes"),
        ("megatron_lm_recompute_granularity", "ful", "Write full."),
    ],
)
def test_wrong_values(name, raw, message):
    value, failure = typed(keys()[name], raw, f"file: {name}")
    assert value is None and failure.text.startswith(f"file: {name} must be") and message in failure.text
