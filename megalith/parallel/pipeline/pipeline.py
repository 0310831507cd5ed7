"""The pipeline of one process: its stages, run by torch's schedules.

Between stages flow activations alone, [..., s, h] for ids [..., s], in the compute format; inside a decoder two of
them, as the
encoder's output rides along and gathers its gradient on the way back. Everything else that a stage needs
(positions, labels, sample numbers) it gets as keyword arguments, because every process reads its own samples.
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
from megalith.parallel.part import Part
from megalith.parallel.pipeline.cut import Cut
from megalith.parallel.pipeline.deferred import Queue
from megalith.parallel.pipeline.schedules import SCHEDULES, Span, Work, single

Flow = tuple[Tensor, ...]  # what passes between two stages
Loss = Callable[
    [Tensor, int], Tensor
]  # (the last stage's output, number of the micro-batch) -> what is added up, 0-dimensional


class _Body(nn.Module):
    """What torch sees as the stage's module.

    It hides the model, because torch takes gradient sums of a fully_shard module into its own hands, and on the last stage its
    output is the loss, so that evaluation needs no other way.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.hidden = (model,)
        self.loss: Loss | None = None  # on the last stage, during a run
        self.number = 0

    def forward(self, *inputs: Tensor, **arguments: Tensor) -> Any:
        output = self.hidden[0](*inputs, **arguments)
        return output if self.loss is None else self.loss(output, self.number)


class Stage(PipelineStage):
    """A stage: its inputs by number of micro-batch, its gradients' sums, its clock."""

    def __init__(
        self, part: Part, stages: int, device: torch.device, group, received: Flow, sent: Flow, queue: Queue | None
    ):
        """received, sent: tensors on meta as those that come in and go out. queue: of weight gradients, where they are deferred."""
        later = None if queue is None else self._later
        super().__init__(
            _Body(part.model),
            part.stage,
            stages,
            device,
            input_args=received,
            output_args=sent,
            group=group,
            dw_builder=later,
        )
        self.submod: nn.Module
        self.part, self.queue, self.received, self.sent = part, queue, received, sent
        self.inputs: Sequence[Mapping[str, Any]] = ()
        self.spans: list[Span] | None = None  # where work is being timed, from `zero` on
        self.zero = 0.0

    def forward_one_chunk(self, number, args=(), kwargs=None, save_forward_output=True):
        """The forward pass of micro-batch `number`."""
        arguments = dict(self.inputs[number])
        first = arguments.pop("inputs")
        self.submod.number = number
        output = self._timed(
            "F", number, lambda: super(Stage, self).forward_one_chunk(number, (first,), arguments, save_forward_output)
        )
        if not self.has_backward:
            _drop(self.args_recv_info[number])
        return output

    def backward_one_chunk(self, number, loss=None, full_backward=True, last_backward=False):
        """The backward pass, or its half for activations."""
        if not self.has_backward:  # a schedule asks in evaluation too
            return
        if self.queue is None:
            self.part.sync_gradients(last_backward)
        else:
            self.part.hold_gradients()
        run = super().backward_one_chunk
        self._timed("B" if full_backward else "I", number, lambda: run(number, loss, full_backward, last_backward))
        _drop(self.args_recv_info[number])
        _drop(self.grad_recv_info[number])

    def backward_weight_one_chunk(self, number, last_backward=False):
        """The half of the backward pass for weights."""
        if not self.has_backward:
            return
        run = super().backward_weight_one_chunk
        self._timed("W", number, lambda: run(number, last_backward))

    def perform_reduce_grad(self, grad_scale_factor):
        """After the last backward pass. Deferred gradients came too late for fully_shard's own hooks, so torch reduces them now."""
        if self.queue is not None and self.part.wrapped:
            body, self.submod = self.submod, self.part.model
            super().perform_reduce_grad(grad_scale_factor)
            self.submod = body

    # Two stages of one process hand gradients to each other; torch does it in evaluation too, and stumbles over there being none.

    def get_local_bwd_output(self, mb_index):
        """Gradients for the stage before, on the same process."""
        return super().get_local_bwd_output(mb_index) if self.has_backward else ()

    def set_local_bwd_input(self, next_stage_bwd_outputs, mb_index):
        """Gradients from the stage after, on the same process."""
        if self.has_backward:
            super().set_local_bwd_input(next_stage_bwd_outputs, mb_index)

    # torch would keep a buffer for every micro-batch of a step. A buffer is made when its message is due, and dropped when used.

    def get_fwd_recv_ops(self, number):
        """What to receive before a forward pass."""
        self._make(self.args_recv_info, number, () if self.is_first else self.received)
        return super().get_fwd_recv_ops(number)

    def get_bwd_recv_ops(self, number):
        """What to receive before a backward pass."""
        if self.has_backward:
            self._make(self.grad_recv_info, number, () if self.is_last else self.sent)
        return super().get_bwd_recv_ops(number)

    def clear_runtime_states(self):
        """Forget the step. (torch's own would clear the buffers, of which there are none.)"""
        self.fwd_cache.clear()
        self.output_chunks.clear()

    def _make(self, table: dict, number: int, flow: Flow) -> None:
        if number == 0 and flow:
            for infos in table.values():
                _drop(infos)
        for info, like in zip(table[number] if flow else (), flow, strict=True):
            info.buffer = torch.empty(like.shape, dtype=like.dtype, device=self.device)
            if table is self.args_recv_info:
                info.buffer.requires_grad_(self.has_backward)

    def _later(self) -> Callable[[], None]:
        """What computes the weight gradients that the last backward pass left."""
        run = self.queue.take()

        def late() -> None:
            run()
            self.part.after_late_gradients()

        return late

    def _timed(self, kind: str, number: int, run: Callable[[], Any]) -> Any:
        if self.spans is None:
            return run()
        synchronize(self.device)
        start = time.perf_counter()
        result = run()
        synchronize(self.device)
        end = time.perf_counter()
        self.spans.append(
            Span(self.group_rank, Work(kind, self.stage_index, number), start - self.zero, end - self.zero)
        )
        return result


def _drop(infos) -> None:
    for info in infos:
        if not getattr(info, "is_root_arg", False):
            info.buffer = None


class Pipeline:
    """The stages of one process and the schedule that runs them."""

    def __init__(
        self, schedule: str, cut: Cut, parts: Sequence[Part], mesh: Mesh, hidden: int, dtype: torch.dtype, sequence: int,
        queues: Sequence[Queue | None],
    ):  # fmt: skip
        """hidden, dtype: of activations. sequence: processes among which they are split along the sequence."""
        self.schedule, self.cut, self.stages, self.parts, self.mesh = schedule, cut, len(cut.layers), parts, mesh
        self.hidden, self.dtype, self.sequence, self.queues = hidden, dtype, sequence, queues
        self.spans: list[Span] | None = None  # of the steps run while this is a list
        self.zero = 0.0
        self.made: dict[tuple, tuple[Any, list[Stage]]] = {}

    def run(self, inputs: Sequence[Mapping[str, Any]], loss: Loss, train: bool) -> None:
        """Run micro-batches through all stages. Every process of the pipeline must call.

        inputs: the model's keyword arguments for each micro-batch; "inputs" are ids [..., s], all of one shape.
        loss: called where the last stage is, with what it returned; in training the sum of what it returns is differentiated.
        """
        shapes = tuple((name, tuple(inputs[0][name].shape)) for name in dict.fromkeys(["inputs", *self.cut.streams()]))
        key = (len(inputs), shapes, train)
        if key not in self.made:
            self.made[key] = self._make(*key)
        schedule, stages = self.made[key]
        if self.spans is not None:
            dist.barrier(self.mesh.devices["pp"].get_group())  # one zero for the clocks of all
            self.zero = time.perf_counter()
        # A later stage could not tell them from its part of the sequence.
        coordinates = torch.arange(inputs[0]["inputs"].shape[-1], device=self.mesh.device)
        for stage in stages:
            stage.inputs = [{"coordinates": coordinates, **arguments} for arguments in inputs]
            stage.submod.loss = loss if stage.is_last else None
            stage.spans, stage.zero = self.spans, self.zero
        schedule.step(target=torch.arange(len(inputs)), return_outputs=False)
        for stage in stages:
            stage.clear_runtime_states()
            stage.inputs, stage.submod.loss = (), None

    def _make(self, count: int, shapes: tuple, train: bool) -> tuple[Any, list[Stage]]:
        """Schedule and stages for one shape of step; stages hold no weights, so several of one part cost nothing."""
        group = self.mesh.devices["pp"].get_group()
        stages = [
            Stage(
                part,
                self.stages,
                self.mesh.device,
                group,
                self._flow(part.stage, shapes),
                self._flow(part.stage + 1, shapes),
                queue,
            )
            for part, queue in zip(self.parts, self.queues, strict=True)
        ]
        # With so few micro-batches all of them are under way at once, which is GPipe; torch's 1F1B refuses them.
        name = "gpipe" if self.schedule == "1f1b" and count < self.stages else self.schedule
        loss = _output_is_loss if train else None
        return SCHEDULES[name](stages[0] if single(name) else stages, count, loss_fn=loss, scale_grads=False), stages

    def _flow(self, stage: int, shapes: tuple) -> Flow:
        """Tensors on meta as those that flow into a stage: ids into the first one, and a loss out of the last."""
        if stage == 0:
            return (torch.empty(shapes[0][1], dtype=torch.int64, device="meta"),)
        if stage == self.stages:
            return (
                torch.empty(
                    (), dtype=torch.promote_types(self.dtype, torch.float32), device="meta", requires_grad=True
                ),
            )
        ids = [dict(shapes)[name] for name in self.cut.received(stage)]
        sizes = [(*samples, length // self.sequence, self.hidden) for *samples, length in ids]
        return tuple(torch.empty(size, dtype=self.dtype, device="meta", requires_grad=True) for size in sizes)


def _output_is_loss(output: Tensor, target: Tensor) -> Tensor:
    return output
