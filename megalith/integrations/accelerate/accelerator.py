"""`megalith.accelerate.Accelerator`: Accelerate's, with megalith's engine where there is a plugin for it.

What is inherited works as it does in Accelerate; what depends on the layout is here.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import os
import types
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import operations
from torch import Tensor, nn

from megalith.common import environment as variables
from megalith.common.errors import ConfigError, TrainingError, problem
from megalith.config.flags.text import Words, fail
from megalith.integrations.accelerate import collectives, construction
from megalith.parallel.mesh import Mesh
from megalith.parallel.sharding import to_local

if TYPE_CHECKING:
    from megalith.integrations.accelerate.session import Session


class Accelerator(accelerate.Accelerator):
    """Accelerate's Accelerator, with megalith's engine in the place of Megatron-LM; its arguments are the same.

    Without a plugin (`megatron_lm_plugin` not given, and ACCELERATE_USE_MEGATRON_LM not true) `Accelerator(...)` is
    Accelerate's own. With one, every process makes it and calls `prepare`, `backward`, `gather` and their like.
    session: what `prepare` built of the model; None before.
    Raises ConfigError with all that cannot work, such as another plugin beside this one.
    """

    session: Session | None = None
    flag_tensor: Tensor | None

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """An instance of this class, or of Accelerate's where there is no plugin."""
        if cls is Accelerator and not construction.wants_megatron(construction.named(args, kwargs)):
            return accelerate.Accelerator(*args, **kwargs)
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        arguments = construction.named(args, kwargs)
        fail(construction.problems(arguments))
        plugin = construction.plugin_of(arguments)
        arguments |= {"megatron_lm_plugin": None}
        # Where there is no accelerator, Accelerate takes processes of torchrun for single ones without cpu=True.
        arguments["cpu"] = arguments.get("cpu", False) or not torch.accelerator.is_available()
        with variables.hidden("ACCELERATE_USE_MEGATRON_LM"):  # Accelerate would look for Megatron-LM
            super().__init__(**arguments)
        self.native_amp, self.scaler = False, None  # the engine computes in the format of mixed_precision
        if construction.active_plugin() is None:
            construction.activate(plugin, self.state)
            for line in construction.notices(self):
                self.print(line)
        if (steps := self.gradient_accumulation_steps) < 1:
            raise ConfigError(problem("gradient_accumulation_steps", steps, "must be at least 1", "Write 1"))

    @property
    def mesh(self) -> Mesh:
        """The processes as megalith arranges them: axes pp, dp_replicate, dp_shard, cp, tp."""
        return collectives.needed_mesh("Accelerator.mesh")

    @property
    def torch_device_mesh(self) -> Any:
        """torch's DeviceMesh under `mesh`."""
        return self.mesh.device_mesh

    @property
    def tensor_parallel_rank(self) -> int:
        """Rank of this process among those that split a layer."""
        return self.mesh.rank("tp")

    @property
    def pipeline_parallel_rank(self) -> int:
        """Rank of this process among the pipeline's."""
        return self.mesh.rank("pp")

    @property
    def context_parallel_rank(self) -> int:
        """Rank of this process among those that split a sequence."""
        return self.mesh.rank("cp")

    @property
    def data_parallel_rank(self) -> int:
        """Rank of this process among those that read different samples."""
        return self.mesh.data_rank

    @property
    def data_parallel_shard_rank(self) -> int:
        """Rank of this process among the data-parallel ones that shard one copy of the model."""
        return self.mesh.rank("dp_shard")

    def prepare(self, *args: Any, device_placement: Any = None) -> Any:
        """The model, optimizer, scheduler and loaders, ready for training in the plugin's layout, in the same order.

        Every process calls it with the same objects. Raises ConfigError for what cannot work.
        """
        construction.check_device_placement(device_placement)
        for each in args:
            if isinstance(each, nn.Module) and self.verify_device_map(each):
                rule = "must have been loaded without device_map, as it is placed in the plugin's layout"
                found = Words("one spread over devices")
                raise ConfigError(problem("The model", found, rule, "Load it without device_map='auto'"))
        from megalith.integrations.accelerate import prepare  # all that training needs: imported when it begins

        results = list(prepare.prepare(self, args))
        for each in results:
            self._remember(each)
        return results[0] if len(results) == 1 else tuple(results)

    def _remember(self, prepared: Any) -> None:
        """List a prepared object where Accelerate's methods look for it, once."""
        from megalith.integrations.accelerate import data

        kinds: tuple[tuple[Any, list], ...] = (
            (nn.Module, self._models),
            (accelerate.optimizer.AcceleratedOptimizer, self._optimizers),
            (accelerate.scheduler.AcceleratedScheduler, self._schedulers),
            ((torch.utils.data.DataLoader, data.IndexedLoader), self._dataloaders),
        )
        for kind, known in kinds:
            if isinstance(prepared, kind):
                prepared._is_accelerate_prepared = True
                if not any(each is prepared for each in known):
                    known.append(prepared)

    def prepare_model(self, model: nn.Module, device_placement: Any = None, evaluation_mode: bool = False) -> Any:
        """As `prepare` of a model. evaluation_mode: no difference here, `model.eval()` decides."""
        return self.prepare(model, device_placement=device_placement)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: Any = None) -> Any:
        """As `prepare` of an optimizer. Raises ConfigError unless its model comes along (call `prepare`)."""
        return self.prepare(optimizer, device_placement=device_placement)

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As `prepare` of a scheduler, whose optimizer has been prepared."""
        return self.prepare(scheduler)

    def prepare_data_loader(
        self, data_loader: Any, device_placement: Any = None, slice_fn_for_dispatch: Any = None
    ) -> Any:  # fmt: skip
        """A loader of num_micro_batches times as large batches, of this data-parallel process's samples."""
        construction.check_device_placement(device_placement)
        if slice_fn_for_dispatch is not None:
            rule, cure = "must be None, as loaders here are on every process", "Leave it out"
            raise ConfigError(problem("slice_fn_for_dispatch", Words("a function"), rule, cure))
        if not getattr(data_loader, "_is_accelerate_prepared", False):
            from megalith.integrations.accelerate import data

            plugin = self.state.megatron_lm_plugin
            if plugin.micro_batch_size is None:
                size, _ = data.micro_batch_size_of([data_loader], plugin.is_train_batch_min)
                plugin.set_training_args(size, self.mesh.data_size)
            data_loader = data.prepare_loader(
                data_loader, num_micro_batches=plugin.num_micro_batches, rank=self.mesh.data_rank,
                size=self.mesh.data_size, device=self.device, dataloader_config=self.dataloader_config,
                rng_types=self.rng_types, mesh=self.mesh,
            )  # fmt: skip
        self._remember(data_loader)
        return data_loader

    def skip_first_batches(self, dataloader: Any, num_batches: int = 0) -> Any:
        """A loader like a prepared one, without the first num_batches batches of its next epoch."""
        from megalith.integrations.accelerate import data

        return data.skip_first_batches(dataloader, num_batches)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        """loss.backward(**kwargs), with the loss divided by gradient_accumulation_steps. Every process calls it.

        Raises TrainingError for a loss without a gradient.
        """
        if "learning_rate" in kwargs:
            self.lomo_backward(loss, kwargs["learning_rate"])
        if not isinstance(loss, Tensor) or not loss.requires_grad:
            found = Words("a tensor without a graph" if isinstance(loss, Tensor) else type(loss).__name__)
            cure = "Give it outputs.loss of a call of the prepared model outside torch.no_grad()"
            raise TrainingError(problem("accelerator.backward", found, "needs a loss that has a gradient", cure))
        (loss / self.gradient_accumulation_steps).backward(**kwargs)

    def lomo_backward(self, loss: Tensor, learning_rate: float) -> None:
        """Raises ConfigError: LOMO changes parameters within the backward pass, where theirs are not complete."""
        cure = "Use an optimizer of torch.optim, and backward(loss) without learning_rate"
        raise ConfigError(problem("The optimizer", Words("LOMO"), "must work on complete gradients", cure))

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Scale the gradients of the whole model so that their L2 norm is at most max_norm; return the norm before.

        parameters: all of the prepared model. Every process calls it, after the last backward pass of the step.
        Raises ConfigError for a part of the parameters, another norm, or within gradient accumulation.
        """
        if self.session is None:
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        if norm_type != 2:
            raise ConfigError(problem("norm_type", norm_type, "must be 2", "Leave it out"))
        if max_norm <= 0:
            cure = "Call optimizer.zero_grad() for no update, or leave clipping out"
            raise ConfigError(problem("max_norm", max_norm, "must be above 0", cure))
        self._check_clipping("clip_grad_norm_", parameters)
        return self.session.clip(float(max_norm))

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Bring every element of the complete gradients within -clip_value to clip_value; as `clip_grad_norm_`."""
        if self.session is None:
            super().clip_grad_value_(parameters, clip_value)
            return
        self._check_clipping("clip_grad_value_", parameters)
        self.session.finish_gradients()
        self.session.clipped = True
        for parameter in self.session.parameters:
            if parameter.grad is not None:
                to_local(parameter.grad).clamp_(-clip_value, clip_value)

    def _check_clipping(self, name: str, parameters: Tensor | Iterable[Tensor]) -> None:
        """Raise ConfigError unless `parameters` are the model's, and the gradients of a step are there."""
        if not self.sync_gradients:
            cure = f"Write `if accelerator.sync_gradients: accelerator.{name}(...)`"
            rule = "needs the gradients of all calls that a step accumulates"
            raise ConfigError(problem(name, Words("a call before the last of them"), rule, cure))
        given = {id(each) for each in ([parameters] if isinstance(parameters, Tensor) else parameters)}
        parameters = self.session.parameters  # type: ignore[union-attr]
        own, trained = {id(each) for each in parameters}, {id(each) for each in parameters if each.requires_grad}
        if not trained <= given or not given <= own:
            found = Words(f"{len(given & trained)} of {len(trained)}, and {len(given - own)} other tensors")
            cure = "Give model.parameters() of the prepared model"
            rule = "takes all parameters of the prepared model, whose norm is one over all processes"
            raise ConfigError(problem(name, found, rule, cure))

    def unscale_gradients(self, optimizer: Any = None) -> None:
        """Complete the gradients of this step and take fp16's loss scale out of them. Every process calls it."""
        if self.session is not None and self.mixed_precision == "fp16":
            self.session.finish_gradients()

    @contextlib.contextmanager
    def maybe_context_parallel(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Nothing is to be done: calls of the model split their sequences themselves (context_parallel_size)."""
        yield

    @contextlib.contextmanager
    def join_uneven_inputs(self, joinables: Any, even_batches: bool | None = None) -> Iterator[None]:
        """Nothing is to be done: prepared loaders have as many batches on every process.

        Raises ConfigError for even_batches False on several data-parallel processes.
        """
        if self.mesh.data_size > 1 and (self.even_batches if even_batches is None else even_batches) is False:
            rule = "must be True, as all processes of a layout call the model equally often"
            raise ConfigError(problem("even_batches", False, rule, "Leave it out; gather_for_metrics drops repeats"))
        yield

    def gather(self, tensor: Any) -> Any:
        """See collectives.gather: over the data-parallel processes."""
        return collectives.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As `gather`, without the samples that the last batch of a prepared loader repeats.

        Other objects than nested tensors are gathered as lists (use_gather_object).
        """
        objects = use_gather_object or not _only_tensors(input_data)
        data = collectives.gather_objects(input_data) if objects else self.gather(input_data)
        state = self.gradient_state
        number = state.remainder if state.end_of_dataloader else -1
        if number <= 0:
            return data  # in the midst of a loader, or at the end of one that repeats nothing or has no length
        return data[:number] if objects else operations.recursively_apply(lambda each: each[:number], data)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """See collectives.reduce: over the data-parallel processes."""
        return collectives.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """See collectives.pad_across_processes: over the data-parallel processes."""
        return collectives.pad_across_processes(tensor, dim, pad_index, pad_first)

    @contextlib.contextmanager
    def split_between_processes(self, inputs: Any, apply_padding: bool = False) -> Iterator[Any]:
        """This data-parallel process's part of `inputs`, by Accelerate's rule; tp, pp and cp copies get the same."""
        numbers = {"num_processes": self.mesh.data_size, "process_index": self.mesh.data_rank, "device": self.device}
        state: Any = types.SimpleNamespace(**numbers)
        # A copy, because Accelerate writes the parts into a dict that it is given.
        with PartialState.split_between_processes(state, copy.copy(inputs), apply_padding) as part:
            yield part

    def check_trigger(self) -> bool:
        """Whether any process has called `set_trigger` since this was True; every process calls it."""
        flag = torch.tensor(self.flag_tensor is not None and bool(self.flag_tensor), device=self.device).long()
        found = bool(self.mesh.all_reduce(flag))
        if found:
            self.flag_tensor = None
        return found

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The main process runs the block before the others."""
        with collectives.goes_first(self.is_main_process):
            yield

    @contextlib.contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        """One process of each machine, its last, runs the block before the others of all machines."""
        number = variables.local_world_size()
        last = self.is_local_main_process if number is None else self.local_process_index == number - 1
        with collectives.goes_first(last):
            yield

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> Any:
        """The weights under transformers' names on the main process, {} on the others; every process calls it."""
        if self._is_prepared(model):
            from megalith.integrations.accelerate.saving import export

            return export.state_dict(self.session)
        return super().get_state_dict(model, unwrap)

    def save_model(
        self, model: nn.Module, save_directory: str | os.PathLike, max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:  # fmt: skip
        """Write a Hugging Face folder of the prepared model; every process calls it."""
        if not self._is_prepared(model):
            super().save_model(model, save_directory, max_shard_size, safe_serialization)
            return
        from megalith.integrations.accelerate.saving import export

        export.save_pretrained(
            self.session, save_directory, max_shard_size=max_shard_size, safe_serialization=safe_serialization
        )

    def _is_prepared(self, model: nn.Module) -> bool:
        return self.session is not None and getattr(model, "session", None) is self.session

    def save_state(self, output_dir: Any = None, safe_serialization: bool = True, **kwargs: Any) -> Any:
        """Save model, optimizer, scheduler, loaders and registered objects; any layout loads them.

        Every process calls it. Returns the folder.
        """
        from megalith.integrations.accelerate.saving import checkpoints

        return checkpoints.save_state(self, output_dir, safe_serialization=safe_serialization, **kwargs)

    def load_state(self, input_dir: Any = None, load_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Load what `save_state` wrote in any layout, or another checkpoint's weights. Every process calls it."""
        from megalith.integrations.accelerate.saving import checkpoints

        checkpoints.load_state(self, input_dir, load_kwargs=load_kwargs, **kwargs)

    def load_checkpoint(self, input_dir: Any = None, **kwargs: Any) -> None:
        """As `load_state`; the name that Accelerate's guide to Megatron-LM uses."""
        self.load_state(input_dir, **kwargs)

    def end_training(self) -> None:
        """End the trackers, and wait for all processes; every process calls it.

        The process group stays until the process ends, so that a model can be saved, or evaluated, afterwards.
        (Accelerate destroys it, also while another process is saving.)
        """
        for tracker in self.trackers:
            tracker.finish()
        self.wait_for_everyone()
        atexit.register(collectives.destroy_group)  # NCCL warns of a group that is left

    def free_memory(self, *objects: Any) -> Any:
        """Forget the prepared objects, also those given, in whose places None is returned; a model may follow."""
        self.session = None
        return super().free_memory(*objects)


def _only_tensors(data: Any) -> bool:
    try:
        operations.recursively_apply(lambda each: each, data, error_on_other_type=True)
    except TypeError:
        return False
    return True
