"""The Accelerator: Accelerate's own without a plugin; with one, its state, its processes, backward passes, clipping."""

import os
import pathlib
import time
import types
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    AutocastKwargs,
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DynamoBackend,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    ParallelismConfig,
    TorchDynamoPlugin,
)
from torch import Tensor, nn

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import DistributedType, MegatronLMPlugin
from megalith.common.errors import ConfigError, TrainingError
from megalith.testing import run_ranks
from tests.integrations.accelerate.helpers import accelerating, toy_model


class Session:
    """Stands in for what `prepare` builds: two parameters, and notes of what was asked of it."""

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
        self.asked: list[Any] = []
        self.clipped = False

    def finish_gradients(self) -> None:
        self.asked.append("finish")

    def clip(self, max_norm: float) -> Tensor:
        self.asked.append(max_norm)
        return torch.tensor(5.0)


def test_without_a_plugin_it_is_accelerates_own() -> None:
    with accelerating():
        accelerator = Accelerator(gradient_accumulation_steps=3)
        assert type(accelerator) is accelerate.Accelerator and accelerator.gradient_accumulation_steps == 3
        assert accelerator.distributed_type == DistributedType.NO
        with pytest.raises(ConfigError, match="megatron_lm_plugin must be known to the first Accelerator of a process"):
            Accelerator(megatron_lm_plugin=MegatronLMPlugin())
    with accelerating(), pytest.raises(TypeError, match="plugins"):
        Accelerator(plugins=1)


def test_one_process_with_a_plugin() -> None:
    plugin = MegatronLMPlugin()
    with accelerating():
        accelerator = Accelerator(True, False, "bf16", 2, megatron_lm_plugin=plugin)
        assert isinstance(accelerator, Accelerator) and isinstance(accelerator, accelerate.Accelerator)
        assert accelerator.distributed_type == PartialState().distributed_type == DistributedType.MEGATRON_LM
        assert accelerator.state.megatron_lm_plugin is AcceleratorState().megatron_lm_plugin is plugin
        assert accelerator.mixed_precision == "bf16" and not accelerator.native_amp and accelerator.scaler is None
        with accelerator.autocast():
            assert not torch.is_autocast_enabled("cpu")
        assert (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index) == (1, 0, 0)
        assert accelerator.is_main_process and accelerator.is_local_main_process and accelerator.is_last_process
        assert dist.is_initialized()  # which Accelerate's loaders take for granted in this mode
        assert accelerator.mesh.world_size == 1 and accelerator.torch_device_mesh.mesh_dim_names[0] == "pp"
        second = Accelerator()
        assert isinstance(second, Accelerator) and second.mesh is accelerator.mesh and second.session is None
        with pytest.raises(ConfigError, match="must be that of the first Accelerator of a process"):
            Accelerator(megatron_lm_plugin=MegatronLMPlugin())


def test_the_environment_asks_for_it() -> None:
    asked = {"ACCELERATE_USE_MEGATRON_LM": "true"}
    with accelerating(**asked, MEGATRON_LM_NUM_MICRO_BATCHES="3", ACCELERATE_MIXED_PRECISION="bf16"):
        accelerator = Accelerator()
        assert accelerator.state.megatron_lm_plugin.num_micro_batches == 3 and accelerator.mixed_precision == "bf16"
        assert os.environ["ACCELERATE_USE_MEGATRON_LM"] == "true"
    with accelerating(**asked, ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4"):
        assert Accelerator().gradient_accumulation_steps == 4


class Megatron:
    """A plugin of another kind."""


REFUSED: list[tuple[dict[str, Any], dict[str, str], str]] = [
    ({"megatron_lm_plugin": Megatron()}, {}, "must be megalith's MegatronLMPlugin; found a .*Megatron. Write `from"),
    ({"deepspeed_plugin": object()}, {}, "deepspeed_plugin cannot be used together with a MegatronLMPlugin"),
    ({"fsdp_plugin": object()}, {}, "fsdp_plugin cannot be used .*use_distributed_optimizer=True"),
    ({"parallelism_config": ParallelismConfig()}, {}, "parallelism_config cannot be used .*tp_degree"),
    ({"dynamo_backend": "inductor"}, {}, "The dynamo backend cannot be used .*; found inductor"),
    ({"dynamo_plugin": TorchDynamoPlugin(backend="eager")}, {}, "The dynamo backend cannot .*; found EAGER"),
    ({}, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "The dynamo backend cannot .*; found INDUCTOR"),
    ({}, {"ACCELERATE_USE_FSDP": "true"}, "The environment variable ACCELERATE_USE_FSDP cannot .*Unset it"),
    ({"device_placement": False}, {}, "You can't customize device placements with DeepSpeed or Megatron-LM"),
    ({"mixed_precision": "fp8"}, {}, "mixed_precision must be no, bf16 or fp16"),
    ({}, {"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision must be no, bf16 or fp16"),
    ({"gradient_accumulation_steps": 0}, {}, "gradient_accumulation_steps must be at least 1"),
    ({"megatron_lm_plugin": MegatronLMPlugin(tp_degree=2)}, {}, "1 processes do not divide into tensor 2"),
]


@pytest.mark.parametrize(("arguments", "variables", "message"), REFUSED)
def test_what_cannot_work_is_refused(arguments: dict, variables: dict[str, str], message: str) -> None:
    with accelerating(**variables):
        with pytest.raises(ConfigError, match=message):
            Accelerator(**{"megatron_lm_plugin": MegatronLMPlugin()} | arguments)


def test_all_mistakes_are_named_at_once_and_leave_nothing() -> None:
    with accelerating():
        with pytest.raises(ConfigError, match=r"(?s)2 problems.*1\. torch_tp_plugin.*2\. mixed_precision"):
            Accelerator(megatron_lm_plugin=MegatronLMPlugin(), torch_tp_plugin=object(), mixed_precision="fp8")
        with pytest.raises(ConfigError, match="do not divide"):
            Accelerator(megatron_lm_plugin=MegatronLMPlugin(tp_degree=2))
        assert Accelerator(megatron_lm_plugin=MegatronLMPlugin(), dynamo_backend=DynamoBackend.NO).mesh.world_size == 1


def test_arguments_without_effect_say_so(capsys: pytest.CaptureFixture) -> None:
    handlers = [DistributedDataParallelKwargs(), AutocastKwargs(), GradScalerKwargs()]
    with accelerating():
        Accelerator(megatron_lm_plugin=MegatronLMPlugin(), kwargs_handlers=handlers)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" has no effect")[0] for line in lines] == [type(each).__name__ for each in (
        handlers[0], handlers[1], handlers[2])]  # fmt: skip


def started(**layout: Any) -> Accelerator:
    return Accelerator(megatron_lm_plugin=MegatronLMPlugin(**layout))


def described() -> dict[str, Any]:
    with accelerating():
        del os.environ["ACCELERATE_USE_CPU"]  # torchrun does not set it
        accelerator = started(tp_degree=2, pp_degree=2)
        ran: list[str] = []
        accelerator.on_main_process(lambda: ran.append("main"))()
        accelerator.on_process(lambda: ran.append("second"), process_index=1)()
        get_logger("x").warning("in order", in_order=True)  # waits for the others
        return {
            "ranks": (accelerator.tensor_parallel_rank, accelerator.pipeline_parallel_rank,
                      accelerator.context_parallel_rank, accelerator.data_parallel_rank,
                      accelerator.data_parallel_shard_rank),
            "numbers": (accelerator.num_processes, accelerator.process_index, accelerator.local_process_index),
            "main": (accelerator.is_main_process, accelerator.is_local_main_process), "ran": ran,
            "use_distributed": accelerator.use_distributed, "device": accelerator.device.type,
        }  # fmt: skip


@pytest.mark.slow
def test_processes() -> None:
    for rank, found in enumerate(run_ranks(described, 4)):
        assert found["ranks"] == (rank % 2, rank // 2, 0, 0, 0) and found["numbers"] == (4, rank, rank)
        assert found["main"] == (rank == 3, rank == 3) and found["use_distributed"] and found["device"] == "cpu"
        assert found["ran"] == {1: ["second"], 3: ["main"]}.get(rank, [])


def misplaced() -> str:
    with accelerating():
        del os.environ["ACCELERATE_USE_CPU"]
        if not torch.accelerator.is_available():
            PartialState()  # takes this process for a single one
            try:
                started()
            except ConfigError as error:
                return str(error)
        return "Accelerate's processes must be all processes of the run, 2; found 1"


@pytest.mark.slow
def test_a_state_that_was_made_wrong_before() -> None:
    for text in run_ranks(misplaced, 2):
        assert text.startswith("Accelerate's processes must be all processes of the run, 2; found 1")


def test_backward() -> None:
    with accelerating():
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(), gradient_accumulation_steps=4)
        weight = torch.ones(2, requires_grad=True)
        accelerator.backward((weight * 8).sum(), retain_graph=False)
        assert weight.grad.tolist() == [2.0, 2.0]
        with (
            torch.no_grad(),
            pytest.raises(TrainingError, match="needs a loss that has a gradient; found a tensor"),
        ):
            accelerator.backward(weight.sum())
        with pytest.raises(TrainingError, match="found float"):
            accelerator.backward(1.0)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"must work on complete gradients; found LOMO"):
            accelerator.backward(weight.sum(), learning_rate=0.1)


def test_accumulation() -> None:
    with accelerating():
        plugin = GradientAccumulationPlugin(num_steps=2)
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(), gradient_accumulation_plugin=plugin)
        synchronized = []
        for _ in range(4):
            with accelerator.accumulate(nn.Linear(1, 1)):
                synchronized.append(accelerator.sync_gradients)
        assert synchronized == [False, True, False, True]


def test_clipping() -> None:
    with accelerating():
        accelerator = started()
        alone = nn.Parameter(torch.ones(2))
        alone.grad = torch.full((2,), 3.0)
        assert accelerator.clip_grad_norm_([alone], 1.0) > 4 and alone.grad.norm() < 1.01  # nothing prepared: torch's
        session = accelerator.session = Session()  # type: ignore[assignment]
        parameters = session.parameters
        assert accelerator.clip_grad_norm_(iter(parameters), 2) == 5.0
        parameters[1].requires_grad = False
        accelerator.clip_grad_norm_(parameters[0], 1.0, norm_type=2.0)
        assert session.asked == [2.0, 1.0]
        parameters[0].grad = torch.tensor([-3.0, 0.5])
        accelerator.clip_grad_value_(parameters, 1.0)
        assert parameters[0].grad.tolist() == [-1.0, 0.5] and session.clipped and session.asked[-1] == "finish"
        for arguments, message in (
            ((parameters[1:], 1.0), r"takes all parameters .*; found 0 of 1, and 0 other tensors\. Give model\.param"),
            (([*parameters, alone], 1.0), r"takes all parameters .*; found 1 of 1, and 1 other tensors"),
            ((parameters, 1.0, 1), "norm_type must be 2"),
            ((parameters, 0.0), "max_norm must be above 0"),
        ):
            with pytest.raises(ConfigError, match=message):
                accelerator.clip_grad_norm_(*arguments)
        accelerator.gradient_accumulation_steps = 2
        with accelerator.accumulate(), pytest.raises(ConfigError, match=r"Write `if accelerator\.sync_gradients: "):
            accelerator.clip_grad_value_(parameters, 1.0)
        asked = len(session.asked)
        accelerator.unscale_gradients()
        assert len(session.asked) == asked  # no loss scale
        accelerator.free_memory()
        assert accelerator.session is None


def test_unscaling() -> None:
    with accelerating():
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(), mixed_precision="fp16")
        accelerator.session = Session()  # type: ignore[assignment]
        accelerator.unscale_gradients()
        assert accelerator.session.asked == ["finish"]  # type: ignore[attr-defined]


def test_unsuitable_objects() -> None:
    with accelerating():
        accelerator = started()
        with pytest.raises(ConfigError, match="You can't customize device placements with DeepSpeed or Megatron-LM"):
            accelerator.prepare(nn.Linear(1, 1), device_placement=[True])
        spread = nn.Linear(1, 1)
        spread.hf_device_map = {"a": 0, "b": 1}  # type: ignore[assignment]
        with pytest.raises(ConfigError, match="must have been loaded without device_map"):
            accelerator.prepare(spread)
        with pytest.raises(ConfigError, match="slice_fn_for_dispatch must be None"):
            accelerator.prepare_data_loader([], slice_fn_for_dispatch=len)


def ended(folder: pathlib.Path) -> tuple[list[str], bool, float]:
    """What the tracker was asked for, whether the main process was waited for, and a sum over processes."""
    with accelerating():
        accelerator, asked = started(), list[str]()
        accelerator.trackers = [types.SimpleNamespace(finish=lambda: asked.append("finish"))]
        if accelerator.is_main_process:
            time.sleep(0.5)
            (folder / "saved").touch()
        accelerator.end_training()
        return asked, (folder / "saved").exists(), float(accelerator.reduce(torch.ones(())))


def test_processes_work_together_after_the_end_of_training(tmp_path: pathlib.Path) -> None:
    assert run_ranks(ended, 2, tmp_path) == [(["finish"], True, 2.0)] * 2


def uneven() -> str:
    with accelerating():
        configuration = DataLoaderConfiguration(even_batches=False)
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(), dataloader_config=configuration)
        with accelerator.join_uneven_inputs([], even_batches=True):
            pass
        try:
            with accelerator.join_uneven_inputs([]):
                return "nothing"
        except ConfigError as error:
            return str(error)


def test_uneven_inputs() -> None:
    assert all("even_batches must be True" in text for text in run_ranks(uneven, 2))


def measured(layout: dict[str, Any]) -> tuple[list[int], list[str]]:
    """What is gathered over a loader of ten samples, in batches of three for each data-parallel process."""
    with accelerating():
        accelerator = started(**layout)
        mesh = accelerator.mesh
        loader = torch.utils.data.DataLoader(list(range(10)), batch_size=3)  # type: ignore[arg-type]
        loader = prepare_data_loader(loader, num_processes=mesh.data_size, process_index=mesh.data_rank)
        numbers: list[int] = []
        texts: list[str] = []
        for batch in loader:
            numbers += accelerator.gather_for_metrics({"numbers": batch})["numbers"].tolist()
            texts += accelerator.gather_for_metrics([f"sample {int(number)}" for number in batch])
        return numbers, texts


@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, {"pp_degree": 2}), (4, {"tp_degree": 2})])
def test_metrics_have_every_sample_once(world: int, layout: dict[str, Any]) -> None:
    for numbers, texts in run_ranks(measured, world, layout):
        assert numbers == list(range(10)) and texts == [f"sample {number}" for number in range(10)]


def trained(layout: dict[str, Any]) -> dict[str, Any]:
    """A step of a real model, by the methods that depend on it, and what they leave."""
    with accelerating():
        accelerator = started(**layout)
        model = toy_model("gpt2")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = [{"input_ids": torch.full((8,), number), "labels": torch.full((8,), number)} for number in range(4)]
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(data, batch_size=2)
        )
        assert accelerator.prepare(loader) is loader and accelerator._dataloaders == [loader]
        with accelerator.accumulate(model):
            loss = model(**next(iter(loader))).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(ConfigError, match="multiple models"):
            accelerator.prepare(toy_model("gpt2"))
        state = accelerator.get_state_dict(model)
        found = {
            "loss": float(loss), "norm": float(norm), "skipped": accelerator.optimizer_step_was_skipped,
            "weight": state.get("transformer.h.3.mlp.c_fc.weight"), "main": accelerator.is_main_process,
            "unwrapped": accelerator.unwrap_model(model) is model,
            "first": next(iter(accelerator.skip_first_batches(loader, 1)))["input_ids"][0, 0].item(),
        }  # fmt: skip
        accelerator.free_memory()
        assert accelerator.session is None and not accelerator._models
        accelerator.prepare(toy_model("gpt2"), torch.utils.data.DataLoader(data, batch_size=2))
        return found


def test_a_model_and_its_methods() -> None:
    one = run_ranks(trained, 1, {})[0]
    assert one["weight"] is not None and one["norm"] > 0.1 and not one["skipped"] and one["first"] == 2
    for found in run_ranks(trained, 2, {"tp_degree": 2}):
        assert found["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert found["norm"] == pytest.approx(one["norm"], rel=1e-5) and found["unwrapped"]
        assert (found["weight"] is not None) == found["main"]
        if found["main"]:
            torch.testing.assert_close(found["weight"], one["weight"], rtol=1e-5, atol=1e-6)
