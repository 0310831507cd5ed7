"""The configuration of `accelerate launch`: its keys, what of them cannot work, the environment variables they become.

A key of YAML and its flag have one name: `num_processes`, `--num_processes`. Keys below `megatron_lm_config` and
`dynamo_config` begin with `megatron_lm_` and `dynamo_`, and are fields beside the others here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

from megalith.common.errors import problem
from megalith.config.flags.text import Problem, Words, around, flag, multiples, nearest, value_text
from megalith.config.flags.values import Field, convert, fields_of
from megalith.config.options import option, section

DEVICE_VARIABLES = {  # distributed_type -> the variable that chooses devices; CUDA_VISIBLE_DEVICES for all others
    "MULTI_XPU": "ZE_AFFINITY_MASK",
    "MULTI_HPU": "HABANA_VISIBLE_MODULES",
    "MULTI_NPU": "ASCEND_RT_VISIBLE_DEVICES",
    "MULTI_MLU": "MLU_VISIBLE_DEVICES",
    "MULTI_SDAA": "SDAA_VISIBLE_DEVICES",
    "MULTI_MUSA": "MUSA_VISIBLE_DEVICES",
    "MULTI_NEURON": "NEURON_RT_VISIBLE_CORES",
}
TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", *DEVICE_VARIABLES, "MEGATRON_LM")
ITSELF = "start the script with accelerate launch itself"
REFUSED_TYPES = {  # distributed_type that is not started here -> what to do instead
    "DEEPSPEED": "Write MEGATRON_LM with megatron_lm_use_distributed_optimizer: true, which shards the optimizer's "
    f"state as ZeRO does, or {ITSELF}",
    "FSDP": "Write MEGATRON_LM with megatron_lm_use_custom_fsdp: true, which shards parameters, gradients and the "
    f"optimizer's state, or {ITSELF}",
    "XLA": f"Write MULTI_CPU, MULTI_GPU or MEGATRON_LM, or {ITSELF}",
    "TPU": f"Write MULTI_CPU, MULTI_GPU or MEGATRON_LM, or {ITSELF}",
}


@section
class AccelerateConfig:
    """What `accelerate config` writes, as far as it has an effect here. None: not given."""

    compute_environment: str = option("LOCAL_MACHINE", "where the script runs", choices=("LOCAL_MACHINE",))
    distributed_type: str | None = option(None, "what the processes do together", choices=TYPES)
    num_processes: int | None = option(None, "processes on all machines together", minimum=1)
    num_machines: int = option(1, "machines; this command is given on each", minimum=1)
    machine_rank: int = option(0, "number of this machine, counted from 0", minimum=0)
    main_process_ip: str | None = option(None, "address of machine 0")
    main_process_port: int | None = option(None, "port of machine 0; 0: any that is free", minimum=0)
    rdzv_backend: str = option("static", "how machines meet: static, c10d or another of torchrun")
    gpu_ids: str | None = option(None, "devices of this machine, such as 0,2; all for all")
    use_cpu: bool | None = option(None, "train on the CPU")
    mixed_precision: str | None = option(None, "number format of computation", choices=("no", "fp16", "bf16"))
    debug: bool = option(False, "Accelerate checks shapes in collective operations (slower)")
    enable_cpu_affinity: bool = option(False, "Accelerate binds processes to the cores near their device (NVIDIA)")

    megatron_lm_tp_degree: int | None = option(None, "tensor-parallel processes (default: 1)", minimum=1)
    megatron_lm_pp_degree: int | None = option(None, "pipeline-parallel processes (default: 1)", minimum=1)
    megatron_lm_context_parallel_size: int | None = option(None, "processes that split sequences", minimum=1)
    megatron_lm_num_micro_batches: int | None = option(None, "micro-batches of a step (default: 1)", minimum=1)
    megatron_lm_gradient_clipping: float | None = option(None, "largest norm of gradients; 0: any", minimum=0.0)
    megatron_lm_sequence_parallelism: bool | None = option(None, "split activations along the sequence too (tp > 1)")
    megatron_lm_use_distributed_optimizer: bool | None = option(None, "shard the optimizer over data parallelism")
    megatron_lm_use_custom_fsdp: bool | None = option(None, "shard parameters over data parallelism too")
    megatron_lm_recompute_activations: bool | None = option(None, "compute core attention again in backward")
    megatron_lm_recompute_granularity: str | None = option(None, "recompute", choices=("full", "selective"))
    megatron_lm_recompute_method: str | None = option(None, "of full recomputation", choices=("uniform", "block"))
    megatron_lm_recompute_num_layers: int | None = option(None, "layers to recompute", minimum=1)
    megatron_lm_decoder_last_pipeline_num_layers: int | None = option(None, "layers of the last stage", minimum=1)
    megatron_lm_attention_dropout: float | None = option(None, "dropout of attention (default: the model's)")
    megatron_lm_hidden_dropout: float | None = option(None, "dropout of hidden states (default: the model's)")
    megatron_lm_attention_softmax_in_fp32: bool | None = option(None, "softmax of attention in float32")
    megatron_lm_attention_backend: str | None = option(None, "kernel of core attention")
    megatron_lm_calculate_per_token_loss: bool | None = option(None, "mean over tokens instead of micro-batches")
    megatron_lm_use_rotary_position_embeddings: bool | None = option(None, "rotary positions (random weights only)")
    megatron_lm_eod_mask_loss: bool | None = option(None, "no loss at ends of documents")
    megatron_lm_no_load_optim: bool | None = option(None, "load no state of the optimizer")
    megatron_lm_no_save_optim: bool | None = option(None, "save no state of the optimizer")
    megatron_lm_optimizer_cpu_offload: bool | None = option(None, "optimizer on the CPU")
    megatron_lm_overlap_cpu_optimizer_d2h_h2d: bool | None = option(None, "overlap its copies")
    megatron_lm_use_precision_aware_optimizer: bool | None = option(None, "optimizer state in fewer bits")
    megatron_lm_expert_model_parallel_size: int | None = option(None, "processes that split experts", minimum=1)
    megatron_lm_expert_tensor_parallel_size: int | None = option(None, "processes that split each expert", minimum=1)

    dynamo_backend: str | None = option(None, "backend of torch.compile, without Megatron-LM")
    dynamo_mode: str | None = option(None, "mode of torch.compile")
    dynamo_use_fullgraph: bool | None = option(None, "compile as one graph, or fail")
    dynamo_use_dynamic: bool | None = option(None, "compile for changing shapes")
    dynamo_use_regional_compilation: bool | None = option(None, "compile repeated blocks once")

    @property
    def uses_megatron(self) -> bool:
        """Whether megalith.accelerate splits the model, by a MegatronLMPlugin."""
        return self.distributed_type == "MEGATRON_LM"

    @property
    def model_parallel_size(self) -> int:
        """Processes that one copy of the model takes."""
        sizes = (self.megatron_lm_tp_degree, self.megatron_lm_pp_degree, self.megatron_lm_context_parallel_size)
        return math.prod(size or 1 for size in sizes) if self.uses_megatron else 1

    @property
    def processes(self) -> int:
        """Processes on all machines; where not given, one copy of the model, and at least one on each machine."""
        return self.num_processes or math.lcm(self.model_parallel_size, self.num_machines)

    @property
    def processes_here(self) -> int:
        """Processes on this machine."""
        return self.processes // self.num_machines

    @property
    def on_cpu(self) -> bool:
        """Whether the script trains on the CPU."""
        return self.distributed_type == "MULTI_CPU" if self.use_cpu is None else self.use_cpu

    @property
    def compiles(self) -> bool:
        """Whether Accelerate is to compile the model."""
        return (self.dynamo_backend or "no").lower() != "no"

    def environment(self) -> dict[str, str]:
        """The variables in which Accelerate's launcher tells the script what is given here."""
        given = {name: value for name, value in vars(self).items() if value not in (None, "")}
        found = {"ACCELERATE_USE_CPU": _text(self.on_cpu)} if self.use_cpu is not None or self.on_cpu else {}
        if self.mixed_precision is not None:
            found["ACCELERATE_MIXED_PRECISION"] = self.mixed_precision
        if self.uses_megatron:
            found["ACCELERATE_USE_MEGATRON_LM"] = "true"
        found |= {name.upper(): _text(value) for name, value in given.items() if name.startswith("megatron_lm_")}
        for name, value in given.items():
            if name.startswith("dynamo_"):
                found[f"ACCELERATE_{name.upper()}"] = value.upper() if name == "dynamo_backend" else _text(value)
        if self.debug:
            found["ACCELERATE_DEBUG_MODE"] = "true"
        if self.enable_cpu_affinity:
            found["ACCELERATE_CPU_AFFINITY"] = "1"
        if self.gpu_ids not in (None, "all"):
            found[DEVICE_VARIABLES.get(self.distributed_type, "CUDA_VISIBLE_DEVICES")] = self.gpu_ids
        return found


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@functools.cache
def keys() -> dict[str, Field]:
    """Every field of AccelerateConfig by its name."""
    return fields_of(AccelerateConfig(), "accelerate")


def typed(field: Field, raw: Any, called: str) -> tuple[Any, Problem | None]:
    """The typed value of a key, or what is wrong with it; `called` is the name the user gave it."""
    choices, minimum = field.metadata["choices"], field.metadata["minimum"]
    if raw is False and field.kind is str:  # YAML takes an unquoted no for false
        raw = "no"
    if field.name == "distributed_type" and str(raw).upper() in REFUSED_TYPES:
        rule = f"must be one of {', '.join(TYPES)}, which are started here"
        return None, Problem((field.name,), problem(called, raw, rule, REFUSED_TYPES[str(raw).upper()]))
    value, failure = convert(field, raw, called)
    if failure or value is None:
        return value, failure
    if choices:
        value = next((choice for choice in choices if choice.lower() == value.lower()), value)
        if value not in choices:
            cure = f"Write {nearest(value, choices) or nearest(value.upper(), choices) or choices[0]}"
            if (field.name, value.lower()) == ("mixed_precision", "fp8"):
                cure = f"Write bf16, or {ITSELF}"
            elif field.name == "compute_environment":
                cure = f"Write {choices[0]}, or {ITSELF}"
            return None, Problem((field.name,), problem(called, raw, f"must be one of {', '.join(choices)}", cure))
    if minimum is not None and value < minimum:
        least = value_text(minimum)
        return None, Problem(
            (field.name,), problem(called, value, f"must be at least {least}", f"Write {least} or more")
        )
    return value, None


def find_problems(config: AccelerateConfig) -> Iterator[Problem]:
    """What cannot work together; each value by itself is right."""

    def found(fields: tuple[str, ...], value: Any, rule: str, cure: str) -> Problem:
        return Problem(fields, problem(flag(fields[0]), Words("nothing") if value is None else value, rule, cure))

    size, machines, processes = config.model_parallel_size, config.num_machines, config.processes
    if processes % machines:
        fitting = around(processes, multiples(processes, machines))
        rule = f"must be a multiple of --num-machines, {machines}: it counts the processes of all machines"
        yield found(("num_processes", "num_machines"), processes, rule, f"Write {fitting}")
    elif processes % size:
        rule = f"must be a multiple of the processes that a copy of the model takes (tp x pp x cp), {size}"
        yield found(("num_processes",), processes, rule, f"Write {around(processes, multiples(processes, size))}")
    if config.machine_rank >= machines:
        rule = f"must be from 0 to --num-machines - 1, {machines - 1}"
        yield found(("machine_rank", "num_machines"), config.machine_rank, rule, "Correct one of them")
    if machines > 1 and not config.main_process_ip:
        rule = "must be the address of machine 0, where several machines meet"
        yield found(("main_process_ip",), None, rule, "Give all machines the same")
    if machines > 1 and config.main_process_port == 0:
        rule = "must be a port that all machines know"
        yield found(("main_process_port",), 0, rule, "Write for example 29500 on all machines")
    if (config.main_process_port or 0) > 65535:
        rule = "must be a port, a whole number up to 65535"
        yield found(("main_process_port",), config.main_process_port, rule, "Write for example 29500")
    devices = (config.gpu_ids or "all").split(",")
    if devices != ["all"] and len(devices) < config.processes_here and not config.on_cpu:
        rule = f"must name a device for each process of this machine, {config.processes_here}"
        yield found(
            ("gpu_ids", "num_processes"), config.gpu_ids, rule, "Name more, write all, or start fewer processes"
        )
    given = [name for name in keys() if name.startswith("megatron_lm_") and vars(config)[name] is not None]
    if given and not config.uses_megatron:
        rule = f"must be MEGATRON_LM, because {given[0]} is given, which nothing else reads"
        cure = f"Write distributed_type: MEGATRON_LM, add --use_megatron_lm, or leave {given[0]} out"
        yield Problem(("distributed_type",), problem("distributed_type", config.distributed_type or "NO", rule, cure))
    if config.uses_megatron and config.compiles:
        cure = 'Leave it out; MegatronLMPlugin(other_megatron_args={"compile": True}) compiles the transformer blocks'
        yield found(("dynamo_backend",), config.dynamo_backend, "must be no with MEGATRON_LM", cure)


def notices(config: AccelerateConfig) -> Iterator[str]:
    """Lines on what is not as it reads."""
    if config.num_processes is None:
        yield f"--num-processes is not given: {config.processes} start{'s' * (config.processes == 1)}"
    if config.distributed_type == "NO" and config.processes > 1:
        yield f"distributed_type NO is not one process here: --num-processes is {config.processes}"
    if config.num_machines == 1 and config.rdzv_backend not in ("static", "c10d"):
        yield f"rdzv_backend {config.rdzv_backend} has no effect with one machine"
