"""What `Accelerator(...)` was asked for: its plugin, what cannot work, what has no effect; and the state it leaves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import accelerate
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, DynamoBackend

from megalith.common import environment as variables
from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.integrations.accelerate import collectives
from megalith.integrations.accelerate.config import parallel_config
from megalith.integrations.accelerate.plugin import MegatronLMPlugin
from megalith.runtime.build import init_mesh

ENABLED = "ACCELERATE_USE_MEGATRON_LM"
PLACEMENT = "You can't customize device placements with DeepSpeed or Megatron-LM."
SHARD = "MegatronLMPlugin(use_distributed_optimizer=True) shards gradients and optimizer state over processes"
SPLIT = "MegatronLMPlugin(tp_degree=..., context_parallel_size=...) splits the model and its sequences"
COMPILE = "MegatronLMPlugin(other_megatron_args={'compile': True}) compiles the transformer blocks"
OTHER_WAYS = {  # arguments of Accelerate that choose another engine -> what to use instead
    "deepspeed_plugin": SHARD,
    "deepspeed_plugins": SHARD,
    "fsdp_plugin": SHARD,
    "torch_tp_plugin": SPLIT,
    "parallelism_config": SPLIT,
}
VARIABLES = {  # variables of Accelerate's launcher that do the same
    "ACCELERATE_USE_DEEPSPEED": SHARD,
    "ACCELERATE_USE_FSDP": SHARD,
    "ACCELERATE_USE_PARALLELISM_CONFIG": SPLIT,
}


def named(args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Accelerator(...)` by name. Raises TypeError where Accelerate has no such arguments."""
    return inspect.signature(accelerate.Accelerator).bind(*args, **kwargs).arguments


def active_plugin() -> MegatronLMPlugin | None:
    """The plugin of an Accelerator that this process has made already."""
    return AcceleratorState._shared_state.get("megatron_lm_plugin")


def wants_megatron(arguments: Mapping[str, Any]) -> bool:
    """Whether there is a plugin: given, of an earlier Accelerator, or by ACCELERATE_USE_MEGATRON_LM."""
    given = arguments.get("megatron_lm_plugin") is not None
    return given or active_plugin() is not None or _is_true(ENABLED)


def plugin_of(arguments: Mapping[str, Any]) -> MegatronLMPlugin:
    """The plugin, made from environment variables where none is given."""
    return arguments.get("megatron_lm_plugin") or active_plugin() or MegatronLMPlugin()


def _is_true(name: str) -> bool:
    return (variables.variable(name) or "").lower() == "true"


def problems(arguments: Mapping[str, Any]) -> Iterator[str]:
    """All that cannot work beside the plugin."""
    yield from _plugin_problems(arguments.get("megatron_lm_plugin"))
    for name, cure in OTHER_WAYS.items():
        if arguments.get(name) is not None:
            yield _other_way(name, type(arguments[name]).__name__, f"Leave it out: {cure}")
    for name, cure in VARIABLES.items():
        if _is_true(name):
            yield _other_way(f"The environment variable {name}", "true", f"Unset it: {cure}")
    backend = _dynamo_backend(arguments)
    if backend.upper() != DynamoBackend.NO.value:
        yield _other_way("The dynamo backend", backend, f"Leave it out: {COMPILE}")
    if arguments.get("device_placement", True) is not True:
        yield _placement_problem(arguments["device_placement"])
    precision = str(arguments.get("mixed_precision") or variables.variable("ACCELERATE_MIXED_PRECISION"))
    if precision.lower() == "fp8":
        yield problem("mixed_precision", "fp8", "must be no, bf16 or fp16", "Write 'bf16'")


def _plugin_problems(given: Any) -> Iterator[str]:
    what, active = "megatron_lm_plugin", active_plugin()
    if given is not None and not isinstance(given, MegatronLMPlugin):
        kind = type(given)
        found = Words(f"a {kind.__module__}.{kind.__qualname__}")
        cure = "Write `from megalith.accelerate.utils import MegatronLMPlugin`"
        yield problem(what, found, "must be megalith's MegatronLMPlugin", cure)
    if given is not None and active is not None and given is not active:
        rule = "must be that of the first Accelerator of a process, whose layout stays"
        yield problem(what, Words("another one"), rule, "Leave it out, or start another process")
    if active is None and AcceleratorState._shared_state:
        rule = "must be known to the first Accelerator of a process"
        cure = "Make the Accelerator with the plugin before any other"
        yield problem(what, Words("an earlier Accelerator without it"), rule, cure)


def _other_way(what: str, found: str, cure: str) -> str:
    return problem(what, Words(found), "cannot be used together with a MegatronLMPlugin", cure)


def _dynamo_backend(arguments: Mapping[str, Any]) -> str:
    plugin = arguments.get("dynamo_plugin")
    given = arguments.get("dynamo_backend") if plugin is None else plugin.backend
    given = variables.variable("ACCELERATE_DYNAMO_BACKEND") if given is None else getattr(given, "value", given)
    return given or DynamoBackend.NO.value


def check_device_placement(given: Any) -> None:
    """Raise ConfigError where a script chooses devices itself."""
    if given is not None:
        raise ConfigError(_placement_problem(given))


def _placement_problem(found: Any) -> str:
    return problem(f"{PLACEMENT} device_placement", found, "must not be given, as the layout decides", "Leave it out")


def activate(plugin: MegatronLMPlugin, state: AcceleratorState) -> None:
    """Make the state that Accelerate's objects have in common that of Megatron-LM, with the mesh of `plugin`.

    Every process calls it. Raises ConfigError, and leaves no state, where the processes do not fit the layout.
    """
    started = variables.world_size() or 1
    try:
        if state.num_processes != started:
            rule = "must be all processes of the run"
            cure = "Make the Accelerator before Accelerate's PartialState() and its like, or start with megalith launch"
            raise ConfigError(problem("Accelerate's processes", state.num_processes, f"{rule}, {started}", cure))
        collectives.set_mesh(init_mesh(parallel_config(plugin, state.device)))
    except Exception:
        AcceleratorState._reset_state()
        raise
    PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.MEGATRON_LM
    # Accelerate's method of this name waits for nobody in this mode; main_process_first and loggers call it.
    PartialState._shared_state["wait_for_everyone"] = state.wait_for_everyone = collectives.barrier
    state.megatron_lm_plugin = plugin


def notices(accelerator: accelerate.Accelerator) -> Iterator[str]:
    """A line for each argument of an Accelerator that has no effect on megalith's engine."""
    if accelerator.ddp_handler is not None:
        yield "DistributedDataParallelKwargs has no effect: megalith sums gradients itself, not DistributedDataParallel"
    if accelerator.autocast_handler is not None:
        yield "AutocastKwargs has no effect: the whole model computes in the format of mixed_precision"
    if accelerator.scaler_handler is not None:
        instead = "other_megatron_args={'initial_loss_scale': ..., 'loss_scale_window': ..., 'hysteresis': ...}"
        yield f"GradScalerKwargs has no effect: for fp16 give MegatronLMPlugin({instead})"
