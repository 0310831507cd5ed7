"""Every public name of Accelerate is here: the same, megalith's own, or an error that says what to use instead."""

import importlib
import sys

import accelerate
import pytest

from megalith.accelerate import Accelerator, names, utils
from megalith.common.extras import MissingPackage

GUIDE = {  # names that a script of the guide imports, and where from
    "accelerate": ["Accelerator", "DistributedType", "init_empty_weights", "skip_first_batches"],
    "accelerate.logging": ["get_logger"],
    "accelerate.utils": [
        "AbstractTrainStep", "BertTrainStep", "DistributedType", "GPTTrainStep", "MegatronLMDummyDataLoader",
        "MegatronLMDummyScheduler", "MegatronLMPlugin", "ProjectConfiguration", "T5TrainStep",
        "add_model_config_to_megatron_parser", "avg_losses_across_data_parallel_group",
        "gather_across_data_parallel_groups", "gather_object", "set_seed",
    ],
}  # fmt: skip
# What each public name of Accelerate's Accelerator is here. Those of the first list are inherited and work as there.
SAME = [
    "accumulate", "autocast", "clear", "deepspeed_plugin", "deepspeed_ulysses_dl_adapter", "device", "dispatch_batches",
    "distributed_type", "end_training", "even_batches", "fp8_backend", "get_tracker", "gradient_accumulation_steps",
    "init_trackers", "is_composable_parallelism_enabled", "is_fsdp2", "is_last_process", "is_local_main_process",
    "is_main_process", "local_process_index", "log", "logging_dir", "mixed_precision", "multi_device", "no_sync",
    "non_blocking", "num_processes", "on_last_process", "on_local_main_process", "on_local_process", "on_main_process",
    "on_process", "optimizer_step_was_skipped", "parallelism_config", "print", "process_index", "profile",
    "project_dir", "register_for_checkpointing", "register_load_state_pre_hook", "register_save_state_pre_hook", "save",
    "save_iteration", "set_trigger", "should_save_model", "split_batches", "sync_gradients",
    "trigger_sync_in_backward", "unwrap_model", "use_distributed", "use_seedable_sampler", "use_stateful_dataloader",
    "verify_device_map", "wait_for_everyone",
]  # fmt: skip
DIFFERENT = {
    "backward": "refuses a loss without a gradient",
    "check_trigger": "any process's trigger counts, tp and pp copies' too",
    "clip_grad_norm_": "of the whole model, by its L2 norm",
    "clip_grad_value_": "of the whole model's complete gradients",
    "context_parallel_rank": "by the plugin",
    "data_parallel_rank": "by the plugin",
    "data_parallel_shard_rank": "by the plugin",
    "free_memory": "another model can be prepared afterwards",
    "gather": "over data-parallel processes",
    "gather_for_metrics": "over data-parallel processes",
    "get_state_dict": "transformers' names, on the main process",
    "join_uneven_inputs": "inputs are even: nothing to do, or an error",
    "load_state": "of any layout",
    "local_main_process_first": "a barrier; the last process of each machine goes first",
    "main_process_first": "a barrier",
    "maybe_context_parallel": "nothing to do",
    "pad_across_processes": "over data-parallel processes",
    "pipeline_parallel_rank": "by the plugin",
    "prepare": "places the model in the plugin's layout",
    "prepare_data_loader": "batches of num_micro_batches, by data-parallel process",
    "prepare_model": "as prepare",
    "prepare_optimizer": "as prepare",
    "prepare_scheduler": "as prepare",
    "reduce": "over data-parallel processes",
    "save_model": "a Hugging Face folder, written by all processes",
    "save_state": "for any layout",
    "skip_first_batches": "of prepared loaders too",
    "split_between_processes": "between data-parallel processes",
    "tensor_parallel_rank": "by the plugin",
    "torch_device_mesh": "axes pp, dp_replicate, dp_shard, cp, tp",
    "unscale_gradients": "completes the gradients",
}
REFUSED = ["lomo_backward"]


def test_every_method_of_accelerates_accelerator_is_accounted_for() -> None:
    public = {name for name in dir(accelerate.Accelerator) if not name.startswith("_")}
    listed = [*SAME, *DIFFERENT, *REFUSED]
    assert len(listed) == len(set(listed)) and public <= set(listed)
    own = {name for name in vars(Accelerator) if not name.startswith("_")}
    assert own == {*DIFFERENT, *REFUSED} | {"session", "mesh", "load_checkpoint"}
    assert len(REFUSED) + len(names.INSTEAD) <= 15


@pytest.mark.parametrize("module", names.OWN)
def test_every_public_name_is_found(module: str) -> None:
    original, ours = importlib.import_module(module), importlib.import_module(f"megalith.{module}")
    for name in names.public(module):
        found = getattr(ours, name)
        if name not in names.OWN[module] and f"{module}.{name}" not in names.OWN:
            assert found is getattr(original, name)
    assert set(GUIDE[module]) <= set(names.public(module)) and set(dir(ours)) >= set(names.public(module))


def test_modules_of_megalith_stay_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    home = sys.modules["megalith.accelerate"]
    monkeypatch.delattr(home, "utils")  # as before the first import
    assert home.utils is utils and utils.is_megatron_lm_available()


def test_unknown_names_are_answered() -> None:
    with pytest.raises(ImportError, match=r"accelerate.utils has no MegatronLMPlugn: did you mean MegatronLMPlugin\?"):
        from megalith.accelerate.utils import MegatronLMPlugn  # noqa: F401
    with pytest.raises(ImportError, match=r"has no MegatronLMPlugin: it lies in megalith.accelerate.utils"):
        from megalith.accelerate import MegatronLMPlugin  # noqa: F401
    with pytest.raises(ImportError, match=r"has no megatron_lm_initialize: Accelerator\(megatron_lm_plugin=\.\.\.\)"):
        from megalith.accelerate.utils import megatron_lm_initialize  # noqa: F401
    with pytest.raises(AttributeError, match=r"nor has accelerate\.utils of this version"):
        utils.qqqqqq  # noqa: B018
    assert not hasattr(utils, "megatron_lm_initialize") and not hasattr(utils, "__wrapped__")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megalith.accelerate", "megalith.accelerate.names"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingPackage, match=r"^megalith\.accelerate needs the package accelerate, which is not inst"):
        importlib.import_module("megalith.accelerate")
