"""Low-rank adapters (LoRA: Hu et al., 2021, arXiv 2106.09685) on the linear layers of a model that is frozen.

y = W x + bias + scale B A dropout(x), where A [rank, in] and B [out, rank] alone are trained. With DoRA (Liu et al.,
2024, arXiv 2402.09353) y = m / |W + scale B A| (W x + scale B A dropout(x)) + bias, where |...| is the length of each
row, without gradient (section 4.3), and the magnitudes m [out] are trained too.

An adapter is split like its layer, m like the rows of B. It adds no collective to a pass (matmul.py, layer_outputs),
but with DoRA on row-parallel layers a sum of [out] numbers. Of t tensor-parallel ranks each holds

    column-parallel    A whole      B [out/t, rank]    x is the layer's own, gathered once, and so is its gradient's sum
    key/value heads    A whole      B whole            (fewer heads than ranks) each uses the rows of its head
    row-parallel       A [rank, in/t]    B whole       its partial output is summed with the layer's
    replicated         A whole      B whole

What is whole gets a part of its gradient on each rank: `partial_gradients`, summed once a step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError
from megalith.config.sections.lora import LoraConfig
from megalith.parallel.collectives import Axis, start_all_reduce, wait
from megalith.parallel.linear import (
    ColumnParallelLinear,
    KeyValueParallelLinear,
    ParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from megalith.parallel.matmul import Linear
from megalith.parallel.sharding import distribute, shard_range

MakeDropout = Callable[[float, str], nn.Module]  # (probability, site): layers/dropout.py, Dropout


class Adapter(nn.Module):
    """The adapter of a linear layer; the layer computes with it (matmul.py, layer_outputs)."""

    partial_gradients: tuple[str, ...] = ()

    def __init__(self, layer: Linear, lora: LoraConfig, dropout: nn.Module, dtype: torch.dtype):
        """On meta. dropout: of the layer's input. dtype: of A and B."""
        super().__init__()
        self.a = nn.Parameter(torch.empty(lora.lora_rank, layer.in_features, dtype=dtype, device="meta"))
        self.b = nn.Parameter(torch.empty(layer.out_features, lora.lora_rank, dtype=dtype, device="meta"))
        self.m = nn.Parameter(torch.empty(layer.out_features, dtype=dtype, device="meta")) if lora.use_dora else None
        self.scale, self.dropout = lora.scale, dropout
        self.axis: Axis | None = None
        self.splits_inputs = False  # over the axis, so that a row is in parts
        self.dropout_keys: Tensor | None = None  # of the layer's tokens, int32 [b, s]; the block's hook sets them
        if isinstance(layer, ParallelLinear):
            self.split(layer)

    def split(self, layer: ParallelLinear) -> None:
        """Split A and B as the layer is split."""
        self.axis = layer.axis
        a_dim, b_dim, self.partial_gradients = _split_of(layer)
        self.a, self.b = distribute(self.a, layer.axis, a_dim), distribute(self.b, layer.axis, b_dim)
        if self.m is not None:
            self.m = distribute(self.m, layer.axis, b_dim)
            self.partial_gradients += ("m",) if "b" in self.partial_gradients else ()
        self.splits_inputs = a_dim is not None
        if self.splits_inputs:
            self.dropout.first_column = shard_range(layer.in_features, layer.axis)[0]

    @property
    def drops(self) -> bool:
        """Whether the input is not the layer's, but some of it."""
        return self.training and self.dropout.p > 0.0

    def dropped(self, x: Tensor) -> Tensor:
        """The layer's input [b, s, in], with dropout."""
        return self.dropout(x, self.dropout_keys)

    @torch.no_grad()
    def lengths(self, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The lengths [n] of the rows of W + scale B A, of local tensors with n rows; in float32 at least.

        It costs the memory of W once more, and 1 / tokens of the time of the layer's product for each of A's rows.
        """
        wide = torch.promote_types(a.dtype, torch.float32)
        squares = torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=self.scale).square().sum(dim=1)
        if self.splits_inputs:
            squares = wait(start_all_reduce(squares, self.axis.group))
        return squares.sqrt().clamp_min(torch.finfo(wide).tiny)  # a row of zeros stays one

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"rank={self.a.shape[0]}, scale={self.scale:g}"


def _split_of(layer: ParallelLinear) -> tuple[int | None, int | None, tuple[str, ...]]:
    """(dimension in which A is split, that of B, partial gradients)."""
    if isinstance(layer, KeyValueParallelLinear):
        return None, None, ("a", "b")
    if isinstance(layer, ColumnParallelLinear):
        return None, 0, ("a",)
    if isinstance(layer, RowParallelLinear):
        return 1, None, ("b",)
    if isinstance(layer, ReplicatedLinear):
        return None, None, ("a", "b") if layer.partial_gradients else ()
    raise ConfigError(
        f"A linear layer with an adapter must be split as a style of megalith/parallel/styles.py does; found a "
        f"{type(layer).__name__}. Leave it out of --lora-target-modules."
    )


def apply(
    model: nn.Module, modules: Collection[str], lora: LoraConfig, make_dropout: MakeDropout, dtype: torch.dtype,
    head: Collection[str] = (),
) -> None:  # fmt: skip
    """Freeze a model on meta, or a stage of one, and give adapters to those of its linear layers that `modules` names.

    It may have been split by a plan. dtype: of what is trained. head: modules of the model that are trained whole.
    """
    model.requires_grad_(False)
    for whole in (getattr(model, name) for name in head):
        for module in [] if whole is None else whole.modules():  # None on other stages
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
    for number, block in model.layers.items():
        prefix = f"layers.{number}."
        adapters: dict[nn.Module, list[Adapter]] = {}  # by the module that is called with their dropout keys
        for name in (each.removeprefix(prefix) for each in modules if each.startswith(prefix)):
            parent_name, _, attribute = name.rpartition(".")
            parent = block.get_submodule(parent_name)
            layer = getattr(parent, attribute)
            if not isinstance(layer, Linear):
                layer = Linear(layer)
                setattr(parent, attribute, layer)
            layer.lora = Adapter(layer, lora, make_dropout(lora.lora_dropout, f"{prefix}{name}.lora"), dtype)
            adapters.setdefault(_called_with_keys(block, parent_name), []).append(layer.lora)
        for module, its_adapters in adapters.items() if lora.lora_dropout else ():
            _pass_dropout_keys(module, its_adapters)
    model.lora = lora  # for models/components.py, build_dropout_keys, and runtime/load.py, weights_of


def _called_with_keys(block: nn.Module, name: str) -> nn.Module:
    """The innermost module around a submodule that is called with dropout keys: the block, or one of two towers."""
    found = module = block
    for step in filter(None, name.split(".")):
        module = getattr(module, step)
        found = module if "dropout_keys" in inspect.signature(module.forward).parameters else found
    return found


def _pass_dropout_keys(block: nn.Module, adapters: Sequence[Adapter]) -> None:
    """Give adapters the dropout keys that their block is called with, at each call: recomputation calls it again."""
    names = list(inspect.signature(block.forward).parameters)
    if "dropout_keys" not in names:
        raise ConfigError(
            f"--lora-dropout must be 0 where blocks have no argument dropout_keys (layers/block.py); "
            f"{type(block).__name__} has {', '.join(names)}. Write --lora-dropout 0, or add it."
        )
    position = names.index("dropout_keys")

    def hook(module: nn.Module, arguments: tuple, named: dict) -> None:
        keys = named["dropout_keys"] if "dropout_keys" in named else arguments[position]
        for adapter in adapters:
            adapter.dropout_keys = keys

    block.register_forward_pre_hook(hook, with_kwargs=True)
