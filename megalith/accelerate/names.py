"""Which of Accelerate's names are megalith's own here, and how any of them is found."""

from __future__ import annotations

import dis
import importlib
import sys
import types
from typing import Any

from megalith.common import environment
from megalith.common.extras import require
from megalith.common.registry import load
from megalith.config.flags.text import nearest

with environment.hidden("ACCELERATE_USE_MEGATRON_LM"):  # with it Accelerate would import Megatron-LM
    require("accelerate", "megalith.accelerate")

HOME = "megalith.integrations.accelerate"
OWN: dict[str, dict[str, str]] = {  # module of Accelerate -> name -> address of megalith's
    "accelerate": {
        "Accelerator": f"{HOME}.accelerator:Accelerator",
        "skip_first_batches": f"{HOME}.data:skip_first_batches",
    },
    "accelerate.logging": {},
    "accelerate.utils": {
        "AbstractTrainStep": f"{HOME}.steps.train_steps:AbstractTrainStep",
        "BertTrainStep": f"{HOME}.steps.train_steps:BertTrainStep",
        "GPTTrainStep": f"{HOME}.steps.train_steps:GPTTrainStep",
        "MegatronEngine": f"{HOME}.model:MegatronModel",
        "MegatronLMDummyDataLoader": f"{HOME}.data:MegatronLMDummyDataLoader",
        "MegatronLMDummyScheduler": f"{HOME}.schedules:MegatronLMDummyScheduler",
        "MegatronLMOptimizerWrapper": f"{HOME}.optimizer:MegatronOptimizer",
        "MegatronLMPlugin": f"{HOME}.plugin:MegatronLMPlugin",
        "MegatronLMSchedulerWrapper": f"{HOME}.schedules:MegatronScheduler",
        "T5TrainStep": f"{HOME}.steps.train_steps:T5TrainStep",
        "add_model_config_to_megatron_parser": f"{HOME}.parsers:add_model_config_to_megatron_parser",
        "avg_losses_across_data_parallel_group": f"{HOME}.collectives:avg_losses_across_data_parallel_group",
        "gather": f"{HOME}.collectives:gather",
        "gather_across_data_parallel_groups": f"{HOME}.collectives:gather_across_data_parallel_groups",
        "gather_object": f"{HOME}.collectives:gather_objects",
        "is_megatron_lm_available": "megalith.accelerate.names:is_megatron_lm_available",
        "pad_across_processes": f"{HOME}.collectives:pad_across_processes",
        "reduce": f"{HOME}.collectives:reduce",
    },
}
PREPARE = "Accelerator.prepare does it"
INSTEAD = {  # names of accelerate.utils that cannot be had -> what to use instead
    "megatron_lm_initialize": "Accelerator(megatron_lm_plugin=...) does it",
    "megatron_lm_prepare_data_loader": PREPARE,
    "megatron_lm_prepare_model_optimizer_scheduler": PREPARE,
    "megatron_lm_prepare_optimizer": PREPARE,
    "megatron_lm_prepare_scheduler": PREPARE,
}


def is_megatron_lm_available() -> bool:
    """True: the engine of the Megatron-LM plugin is megalith's."""
    return True


def public(module: str) -> list[str]:
    """The names that a module of Accelerate has here, without those of modules in it."""
    found = vars(importlib.import_module(module)).items()
    originals = {name for name, value in found if not (name.startswith("_") or isinstance(value, types.ModuleType))}
    return sorted(originals | set(OWN[module]))


def find(module: str, name: str) -> Any:
    """What `name` is in a module of Accelerate: megalith's own, else Accelerate's. Called by a module's __getattr__.

    Raises AttributeError with the nearest name, or what to use instead. In `from module import name`, where Python
    would replace the text of an AttributeError, an ImportError.
    """
    if f"{module}.{name}" in OWN:
        return importlib.import_module(f"megalith.{module}.{name}")
    if name in OWN[module]:
        return load(f"{module}.{name}", OWN[module][name])
    try:
        if name not in INSTEAD:
            return getattr(importlib.import_module(module), name)
    except AttributeError:
        pass
    raise _error(sys._getframe(2))(f"megalith.{module} has no {name}: {_advice(module, name)}") from None


def _error(frame: Any) -> type[Exception]:
    """What to raise in a frame that asks a module for a name that is not there."""
    imports = frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_FROM"]
    return ImportError if imports else AttributeError


def _advice(module: str, name: str) -> str:
    if name in INSTEAD:
        return INSTEAD[name]
    for other in OWN:
        if other != module and name in public(other):
            return f"it lies in megalith.{other}"
    near = nearest(name, public(module))
    return f"did you mean {near}?" if near else f"nor has {module} of this version of Accelerate"
