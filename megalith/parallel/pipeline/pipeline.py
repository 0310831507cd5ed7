"""The pipeline of one process: its stages, run by torch's schedules.

Stages send each other only hidden states and their gradients, in the compute format: [..., s, h] for ids [..., s], or
[..., s/t, h] under sequence parallelism. Inside a decoder these are two tensors, as the encoder's output is passed on
from stage to stage, and its gradient accumulates on the way back.
Everything else that a stage needs (positions, labels, sample numbers) it gets as keyword arguments: all processes of a
pipeline read the same samples, each for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from megalith.parallel.devices import synchronize
from megalith.parallel.mesh import Mesh
from megalith.parallel.pipeline.deferred import WeightGradientQueue
from megalith.parallel.pipeline.schedules import SCHEDULES, has_one_stage_per_process
from megalith.parallel.pipeline.split import Cut
from megalith.parallel.stage_module import StageModule
from megalith.planner.timeline import Span, Work

Activations = tuple[Tensor, ...]  # that one stage sends to the next
Loss = Callable[[Tensor, int], Tensor]  # (the last stage's output, number of the micro-batch) -> 0-dimensional loss


class _ModelWithLoss(nn.Module):
    """The module that torch gets as the stage's (PipelineStage.submod).

    It hides the model, because torch takes over the gradient sums of a fully_shard module that it sees. On the last
    stage its output is the loss, so that evaluation works like training.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hidden_model = (model,)  # in a tuple, so that it is no submodule
        self.loss: Loss | None = None  # on the last stage, during a run
        self.number = 0  # of the micro-batch

    def forward(self, *inputs: Tensor, **arguments: Tensor) -> Any:
        output = self.hidden_model[0](*inputs, **arguments)
        return output if self.loss is None else self.loss(output, self.number)


class Stage(PipelineStage):
    """A StageModule as torch's PipelineStage, for one shape of step.

    Changed: the model's arguments come from `inputs`, not through the schedule; gradients are summed over the other
    axes with the last backward pass; receive buffers live shortly; each piece of work can be timed.
    In all methods `number` is that of the micro-batch.
    """

    def __init__(
        self, stage_module: StageModule, num_stages: int, device: torch.device, group, received: Activations,
        sent: Activations, queue: WeightGradientQueue | None,
    ):  # fmt: skip
        """received, sent: tensors on meta with the shapes and dtypes of those that the stage receives and sends.

        queue: holds the deferred weight gradients; None where the schedule defers none.
        """
        super().__init__(
            _ModelWithLoss(stage_module.model),
            stage_module.stage_index,
            num_stages,
            device,
            input_args=received,
            output_args=sent,
            group=group,
            dw_builder=None if queue is None else self._take_deferred,
        )
        self.submod: nn.Module
        self.stage_module, self.queue, self.received, self.sent = stage_module, queue, received, sent
        self.inputs: Sequence[Mapping[str, Any]] = ()  # the model's arguments for each micro-batch, during a run
        self.spans: list[Span] | None = None  # a list while work is being timed; times count from `time_zero`
        self.time_zero = 0.0

    def forward_one_chunk(self, number, args=(), kwargs=None, save_forward_output=True):
        """The forward pass. Arguments are those of `inputs`; stages after the first get hidden states for the ids."""
        arguments = dict(self.inputs[number])
        first = arguments.pop("inputs")
        self.submod.number = number
        output = self._timed(
            "F", number, lambda: super(Stage, self).forward_one_chunk(number, (first,), arguments, save_forward_output)
        )
        if not self.has_backward:
            _free(self.args_recv_info[number])
        return output

    def backward_one_chunk(self, number, loss=None, full_backward=True, last_backward=False):
        """The backward pass, or (full_backward=False) its half for activations."""
        if not self.has_backward:  # schedules call this in evaluation too
            return
        if self.queue is None:
            self.stage_module.set_gradient_sync(last_backward)
        else:
            self.stage_module.defer_gradient_sync()
        run = super().backward_one_chunk
        self._timed("B" if full_backward else "I", number, lambda: run(number, loss, full_backward, last_backward))
        _free(self.args_recv_info[number])
        _free(self.grad_recv_info[number])

    def backward_weight_one_chunk(self, number, last_backward=False):
        """The half of the backward pass for weights."""
        if not self.has_backward:
            return
        run = super().backward_weight_one_chunk
        self._timed("W", number, lambda: run(number, last_backward))

    def perform_reduce_grad(self, grad_scale_factor):
        """After the last backward pass: reduce deferred gradients, which came too late for fully_shard's hooks.

        torch does so where `submod` is the fully_shard module. (Replicas: StageModule.finish_gradients.)
        """
        if self.queue is not None and self.stage_module.wrapped:
            module, self.submod = self.submod, self.stage_module.model
            super().perform_reduce_grad(grad_scale_factor)
            self.submod = module

    # Two stages of one process pass gradients directly. torch does so in evaluation too, and fails as there are none.

    def get_local_bwd_output(self, mb_index):
        """Gradients for the stage before, on the same process."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):
        """Gradients from the stage after, on the same process."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # torch would keep a receive buffer for every micro-batch of a step. Here a buffer is allocated when its message is
    # due, and freed when it has been used.

    def get_fwd_recv_ops(self, number):
        """The receive operations before a forward pass."""
        self._allocate(self.args_recv_info, number, () if self.is_first else self.received)
        return super().get_fwd_recv_ops(number)

    def get_bwd_recv_ops(self, number):
        """The receive operations before a backward pass."""
        if self.has_backward:
            self._allocate(self.grad_recv_info, number, () if self.is_last else self.sent)
        return super().get_bwd_recv_ops(number)

    def clear_runtime_states(self):
        """Forget the step. (torch's own also drops the gradients of receive buffers, which are freed already.)"""
        self.fwd_cache.clear()
        self.output_chunks.clear()

    def _allocate(self, table: dict, number: int, activations: Activations) -> None:
        if number == 0 and activations:  # before its first step torch has allocated all
            for infos in table.values():
                _free(infos)
        for info, like in zip(table[number] if activations else (), activations, strict=True):
            info.buffer = torch.empty(like.shape, dtype=like.dtype, device=self.device)
            if table is self.args_recv_info:
                info.buffer.requires_grad_(self.has_backward)

    def _take_deferred(self) -> Callable[[], None]:
        """A function that computes the weight gradients which the last backward pass has deferred."""
        compute_deferred = self.queue.take()

        def compute() -> None:
            compute_deferred()
            self.stage_module.accumulate_deferred_gradients()

        return compute

    def _timed(self, kind: str, number: int, run: Callable[[], Any]) -> Any:
        if self.spans is None:
            return run()
        synchronize(self.device)
        start = time.perf_counter()
        result = run()
        synchronize(self.device)
        end = time.perf_counter()
        work = Work(kind, self.stage_index, number)
        self.spans.append(Span(self.group_rank, work, start - self.time_zero, end - self.time_zero))
        return result


def _free(infos) -> None:
    for info in infos:
        if not getattr(info, "is_root_arg", False):
            info.buffer = None


class Pipeline:
    """The stages of one process and the schedule that runs them.

    Micro-batches have numbers within a step, stages within the whole pipeline.
    """

    def __init__(
        self, schedule: str, cut: Cut, stage_modules: Sequence[StageModule], mesh: Mesh, hidden_size: int,
        dtype: torch.dtype, sequence_shards: int, queues: Sequence[WeightGradientQueue | None], ranks: Sequence[int],
    ):  # fmt: skip
        """hidden_size, dtype: of activations. sequence_shards: ranks among which these are split along the sequence.

        ranks: the pipeline rank of each stage.
        """
        self.schedule, self.cut, self.num_stages, self.mesh = schedule, cut, len(cut.layers), mesh
        self.stage_modules, self.queues, self.ranks = stage_modules, queues, ranks
        self.hidden_size, self.dtype, self.sequence_shards = hidden_size, dtype, sequence_shards
        self.group = mesh.device_mesh["pp"].get_group()
        self.spans: list[Span] | None = None  # of the steps that run while this is a list
        self.time_zero = 0.0
        self.built: dict[tuple, tuple[Any, list[Stage]]] = {}  # by micro-batches, shapes, train

    def run(self, inputs: Sequence[Mapping[str, Any]], loss: Loss, train: bool) -> None:
        """Run the micro-batches of a step through all stages. Every process of the pipeline must call.

        inputs: the model's keyword arguments for each micro-batch; "inputs" are ids [..., s], all of one shape.
        loss: called on the last stage with its output; in training the sum of the losses is differentiated.
        train: with backward passes; else forward passes and losses alone.
        """
        names = dict.fromkeys(["inputs", *self.cut.all_received()])
        shapes = tuple((name, tuple(inputs[0][name].shape)) for name in names)
        key = (len(inputs), shapes, train)
        if key not in self.built:
            self.built[key] = self._build(*key)
        schedule, stages = self.built[key]
        if self.spans is not None:
            dist.barrier(self.group)  # so that all processes have the same time zero
            self.time_zero = time.perf_counter()
        # Positions of the tokens; a later stage could not count them, as its input may be a shard of the sequence.
        coordinates = torch.arange(inputs[0]["inputs"].shape[-1], device=self.mesh.device)
        for stage in stages:
            stage.inputs = [{"coordinates": coordinates, **arguments} for arguments in inputs]
            stage.submod.loss = loss if stage.is_last else None
            stage.spans, stage.time_zero = self.spans, self.time_zero
        schedule.step(target=torch.arange(len(inputs)), return_outputs=False)
        for stage in stages:
            stage.clear_runtime_states()
            stage.inputs, stage.submod.loss = (), None

    def forward(
        self, inputs: Tensor | None, arguments: Mapping[str, Any], models: Sequence[Callable[..., Any]]
    ) -> Tensor | None:  # fmt: skip
        """One forward pass without a schedule, for generation: the last stage's output, None on other processes.

        Every process of the pipeline must call. inputs: ids [b, s], or None where the model takes None (a T5 whose
        cache has the encoder's output); then no stage receives hidden states for them. arguments: the model's others;
        no stage receives hidden states for what they lack (a Retro's neighbours).
        models: what is called for each stage of this process, the stage's model or a compiled form of it.
        """
        here, ids = self.mesh.rank("pp"), {"inputs": inputs, **arguments}
        received, output = [inputs], None
        for stage_module, model in zip(self.stage_modules, models, strict=True):
            stage = stage_module.stage_index
            if stage > 0:
                source, local = self.ranks[stage - 1], iter(_as_tuple(output))
                likes = [ids.get(name) for name in self.cut.received(stage)]
                received = [
                    None if like is None else next(local) if source == here else self._receive(like.shape, source)
                    for like in likes
                ]
            output = model(*received, **arguments)
            if stage + 1 < self.num_stages and (target := self.ranks[stage + 1]) != here:
                for hidden in _as_tuple(output):
                    dist.send(hidden.contiguous(), group=self.group, group_dst=target)
        return output if stage + 1 == self.num_stages else None

    def _receive(self, shape: torch.Size, source: int) -> Tensor:
        """Hidden states for ids of this shape, from a rank of the pipeline."""
        hidden = torch.empty((*shape, self.hidden_size), dtype=self.dtype, device=self.mesh.device)
        dist.recv(hidden, group=self.group, group_src=source)
        return hidden

    def _build(self, count: int, shapes: tuple, train: bool) -> tuple[Any, list[Stage]]:
        """Schedule and stages for one shape of step. A Stage holds no weights, so having several costs no memory."""
        stages = [
            Stage(
                stage_module,
                self.num_stages,
                self.mesh.device,
                self.group,
                self._received(stage_module.stage_index, shapes),
                self._received(stage_module.stage_index + 1, shapes),
                queue,
            )
            for stage_module, queue in zip(self.stage_modules, self.queues, strict=True)
        ]
        # With so few micro-batches all of them are under way at once, which is GPipe; torch's 1F1B refuses them.
        name = "gpipe" if self.schedule == "1f1b" and count < self.num_stages else self.schedule
        loss = _output_is_loss if train else None
        scheduled = stages[0] if has_one_stage_per_process(name) else stages
        return SCHEDULES[name](scheduled, count, loss_fn=loss, scale_grads=False), stages

    def _received(self, stage: int, shapes: tuple) -> Activations:
        """Tensors on meta like those that a stage receives: ids for the first one, the loss for one after the last."""
        if stage == 0:
            return (torch.empty(shapes[0][1], dtype=torch.int64, device="meta"),)
        if stage == self.num_stages:
            dtype = torch.promote_types(self.dtype, torch.float32)
            return (torch.empty((), dtype=dtype, device="meta", requires_grad=True),)
        ids = [dict(shapes)[name] for name in self.cut.received(stage)]
        sizes = [(*samples, length // self.sequence_shards, self.hidden_size) for *samples, length in ids]
        return tuple(torch.empty(size, dtype=self.dtype, device="meta", requires_grad=True) for size in sizes)


def _as_tuple(output: Any) -> tuple[Tensor, ...]:
    """The hidden states of a stage's output."""
    return () if output is None else output if isinstance(output, tuple) else (output,)


def _output_is_loss(output: Tensor, target: Tensor) -> Tensor:
    return output
