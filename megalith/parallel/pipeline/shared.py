"""Parameters that several stages hold, such as a tied embedding and head: one gradient, counted once in the norm.

Each copy gets the sum of all copies' gradients, so that optimizers keep the copies equal to the bit. The first stage that holds
a parameter owns it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from megalith.parallel.mesh import Mesh
from megalith.parallel.part import Part
from megalith.parallel.sharding import to_local

Copies = list[tuple[int, str]]  # (stage, name of the parameter there)


class Shared:
    """The shared parameters of the parts of one process."""

    def __init__(self, holders: dict[str, Copies], parts: Sequence[Part], processes: Mapping[int, int], mesh: Mesh):
        """holders: see Cut.holders. processes: of the pipeline, by the stages they run. All processes must call."""
        groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        here = {part.stage: part for part in parts}
        self.sets: list[tuple[list[nn.Parameter], dist.ProcessGroup | None]] = []
        self.copies: set[int] = set()  # ids of the parameters that another copy is counted for
        for copies in holders.values():
            if len(copies) == 1:
                continue
            places = tuple(sorted({processes[stage] for stage, _ in copies}))
            if places not in groups:
                groups[places] = _group(places, mesh)
            mine = [(stage, here[stage].model.get_parameter(name)) for stage, name in copies if stage in here]
            self.copies.update(id(parameter) for stage, parameter in mine if stage != copies[0][0])
            if mine:
                self.sets.append(([parameter for _, parameter in mine], groups[places]))

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every copy the sum of the gradients of all; after the sums over data- and tensor-parallel processes."""
        for parameters, group in self.sets:
            for parameter in parameters:
                if parameter.grad is None:  # not used in this step; elsewhere it may have been
                    parameter.grad = torch.zeros_like(parameter)
            gradients = [to_local(parameter.grad) for parameter in parameters]
            for other in gradients[1:]:
                gradients[0].add_(other)
            if group is not None:
                dist.all_reduce(gradients[0], group=group)
            for other in gradients[1:]:
                other.copy_(gradients[0])


def _group(places: tuple[int, ...], mesh: Mesh) -> dist.ProcessGroup | None:
    """The processes at these places of the pipeline that differ from this one in nothing else; None where there is one place."""
    if len(places) == 1:
        return None
    columns = mesh.devices.mesh.flatten(1)[list(places)].t().tolist()
    mine, _ = dist.new_subgroups_by_enumeration(columns)
    return mine
