"""Parameters that several stages hold, such as a tied embedding and head: one gradient, counted once in the norm.

Each of these stages has a copy, which gets the sum of all copies' gradients, so that optimizers keep the copies equal
to the bit. The first stage that holds a parameter owns it: its copy is the one that the norm counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megalith.parallel.mesh import Mesh
from megalith.parallel.sharding import to_local
from megalith.parallel.stage_module import StageModule

Copies = list[tuple[int, str]]  # (stage, name of the parameter there)


class SharedParameters:
    """The copies of shared parameters that the stages of one process hold."""

    def __init__(
        self, copies: dict[str, Copies], stages: Sequence[StageModule], stage_ranks: Mapping[int, int], mesh: Mesh
    ):  # fmt: skip
        """Every process of the run must call, as this makes process groups.

        copies: see Cut.copies. stage_ranks: from the index of a stage to the pipeline rank that runs it.
        """
        groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        by_index = {stage.stage_index: stage for stage in stages}
        # for each shared parameter: its copies on this process, and the group of all processes with copies
        self.sets: list[tuple[list[nn.Parameter], dist.ProcessGroup | None]] = []
        self.not_owned: set[int] = set()  # id() of the copies here that another stage owns
        for places in copies.values():
            if len(places) == 1:
                continue
            ranks = tuple(sorted({stage_ranks[index] for index, _ in places}))
            if ranks not in groups:
                groups[ranks] = _group(ranks, mesh)
            local = [(index, by_index[index].model.get_parameter(name)) for index, name in places if index in by_index]
            owner = places[0][0]
            self.not_owned.update(id(parameter) for index, parameter in local if index != owner)
            if local:
                self.sets.append(([parameter for _, parameter in local], groups[ranks]))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every copy the sum of the gradients of all. Call it after StageModule.finish_gradients."""
        for parameters, group in self.sets:
            if not parameters[0].requires_grad:  # frozen, and so on every stage
                continue
            for parameter in parameters:
                if parameter.grad is None:  # not used in this step; another copy may have been
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [to_local(parameter.grad) for parameter in parameters]
            for other in gradients[1:]:
                gradients[0].add_(other)
            if group is not None:
                dist.all_reduce(gradients[0], group=group)
            for other in gradients[1:]:
                other.copy_(gradients[0])


def _group(ranks: tuple[int, ...], mesh: Mesh) -> dist.ProcessGroup | None:
    """The processes with these pipeline ranks and this one's ranks on all other axes; None for a single rank."""
    if len(ranks) == 1:
        return None
    columns = mesh.device_mesh.mesh.flatten(1)[list(ranks)].t().tolist()
    group, _ = dist.new_subgroups_by_enumeration(columns)
    return group
