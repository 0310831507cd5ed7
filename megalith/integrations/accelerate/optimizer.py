"""The script's optimizer on the placed model: the same object with its groups, over other parameters."""

from __future__ import annotations

import collections
import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from megalith.checkpoint.formats.huggingface.conversion import parameter_rules
from megalith.checkpoint.formats.huggingface.family import FAMILIES, IDENTITY, Conversion
from megalith.checkpoint.store.dcp import fill
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.common.errors import TrainingError, problem
from megalith.config.flags.text import Words, fail
from megalith.config.parameter_kinds import pattern_of
from megalith.config.parameters import parameter_shapes
from megalith.config.sections.model import ModelConfig
from megalith.optim.build import FUSED_DEVICES
from megalith.runtime.build import Runtime

if TYPE_CHECKING:
    from megalith.integrations.accelerate.plugin import MegatronLMPlugin
    from megalith.integrations.accelerate.session import Session

# Their steps treat every element by itself, so that a shard of a tensor is trained as it would be in the whole tensor.
ELEMENTWISE = (
    optim.Adam, optim.SGD, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta, optim.RMSprop,
    optim.ASGD, optim.Rprop,
)  # fmt: skip
LOW_BIT_PACKAGES = ("bitsandbytes", "torchao")  # whose state is quantized, or made by kernels for whole tensors
Names = dict[str, bool]  # of parameters, as megalith calls them -> whether they are trained


@dataclasses.dataclass
class Counterpart:
    """What a parameter of the transformers model is here. name: its first one there.

    pieces: {megalith's names: conversion} of each tensor that it is there; several where a model here does not tie what
        transformers does. The conversion is None where the tensor is tied or added to another.
    added: whether it is added to another parameter here.
    """

    name: str
    parameter: nn.Parameter
    pieces: dict[tuple[str, ...], Conversion | None] = dataclasses.field(default_factory=dict)
    added: bool = False

    @property
    def names(self) -> list[str]:
        """All of megalith's names: three where it is a fused q, k and v; none where the model here lacks it."""
        return [name for names in self.pieces for name in names]


def counterparts(hf_model: nn.Module, model: ModelConfig) -> dict[int, Counterpart]:
    """{id of a parameter of the transformers model: what it is in megalith's model}; parameters may be on meta."""
    family = FAMILIES.find(hf_model.config.model_type)
    known = {hf_name: (names, rule.conversion) for rule, hf_name, names in parameter_rules(family, model)}
    found: dict[int, Counterpart] = {}
    for name, parameter in hf_model.named_parameters(remove_duplicate=False):
        each, stored = found.setdefault(id(parameter), Counterpart(name, parameter)), family.file_names.get(name, name)
        if stored in known:
            names, conversion = known[stored]
            each.pieces[names] = conversion
            continue
        each.added = stored in family.merged
        other = family.tied[stored].original if stored in family.tied else family.merged.get(stored)
        if other in known:
            each.pieces.setdefault(known[other][0], None)
    return found


def adopt(
    optimizer: Optimizer, hf_model: nn.Module, runtime: Runtime, plugin: MegatronLMPlugin | None = None
) -> list[str]:  # fmt: skip
    """Give the groups of an optimizer of `hf_model` this process's parameters instead; returns lines for the user.

    Groups, their order and hyper-parameters stay, so that schedulers that are bound to the optimizer work on. A group
    may become empty on a pipeline stage. State that there is already is translated. Parameters that no group has are
    frozen, and so are those that are frozen in hf_model.
    plugin: its no_wd_decay_cond, scale_lr_cond (which get transformers' name and parameter) and lr_mult act.
    Raises ConfigError for optimizers that cannot work in this layout, and for groups that do not fit the model.
    """
    model = runtime.config.model
    known = counterparts(hf_model, model)
    fail([*_class_problems(optimizer, runtime), *_foreign_parameters(optimizer, known)])
    groups = [_names_of(group["params"], known) for group in optimizer.param_groups]
    lines, shapes = [], parameter_shapes(model)
    fail(_shared_by_groups(groups))
    if new := _add_new(groups, known, shapes):
        lines.append(f"Parameters that the transformers model lacks join the group of those like them: {_listed(new)}")
    lines += _notes(optimizer, known.values(), groups)
    here = collections.defaultdict[str, list[nn.Parameter]](list)  # copies too, which stages of this process share
    for name, parameter in runtime.named_parameters():
        here[name].append(parameter)
    trained = {name for names in groups for name, trains in names.items() if trains}
    for name, parameters in here.items():
        for parameter in parameters:
            parameter.requires_grad_(name in trained)
    owners = {id(parameter): known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]}
    factors = _factors(plugin, known.values(), here) if plugin is not None else {}
    for group, names in zip(optimizer.param_groups, groups):
        group["params"] = [parameter for name in names for parameter in here.get(name, ())]
        if "param_names" in group:
            group["param_names"] = [name for name in names for _ in here.get(name, ())]
        _choose_kernels(optimizer, group)
    _translate_state(optimizer, owners, here, model)
    if factors:
        _apply_factors(optimizer, factors)
    return lines


def _names_of(parameters: list[nn.Parameter], known: Mapping[int, Counterpart]) -> Names:
    names: Names = {}
    for parameter in parameters:
        for name in known[id(parameter)].names:
            names[name] = names.get(name, False) or parameter.requires_grad
    return names


def _add_new(groups: list[Names], known: Mapping[int, Counterpart], shapes: Mapping[str, tuple]) -> list[str]:
    """Add the parameters without a counterpart, which a changed architecture has, to groups; returns their names."""
    named = {name for each in known.values() for name in each.names}
    new = [name for name in shapes if name not in named]
    old = [(number, other) for number, names in enumerate(groups) for other in names]
    for name in new:
        same_kind = (number for number, other in old if pattern_of(other) == pattern_of(name))
        same_dims = (number for number, other in old if len(shapes[other]) == len(shapes[name]))
        groups[next(same_kind, next(same_dims, 0))][name] = True
    return new


def _class_problems(optimizer: Optimizer, runtime: Runtime) -> Iterator[str]:
    kind = type(optimizer)
    what, found = "The optimizer", Words(f"{kind.__module__}.{kind.__qualname__}")
    adamw = "Use torch.optim.AdamW"
    if kind.__module__.partition(".")[0] in LOW_BIT_PACKAGES:
        cure = f"{adamw}; use_distributed_optimizer=True divides its state among data-parallel processes"
        yield problem(what, found, "must keep its state as unquantized tensors like the parameters", cure)
    elif isinstance(optimizer, (optim.LBFGS, optim.SparseAdam)):
        yield problem(what, found, "must take a step from dense gradients, without a closure", adamw)
    elif _is_sharded(runtime) and not _is_elementwise(optimizer):
        rule = (
            "must treat each element by itself (torch's Adam, AdamW, SGD, NAdam, RAdam, Adamax, Adagrad, Adadelta, "
            "RMSprop, ASGD, Rprop) where tensors or layers are divided among processes, because it sees parts of them"
        )
        cure = f"{adamw}, or tp_degree=1, pp_degree=1 and use_distributed_optimizer=False, or, where it does so, set "
        yield problem(what, found, rule, f"{cure}`elementwise = True` on its class")


def _is_elementwise(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, ELEMENTWISE) or getattr(optimizer, "elementwise", False)


def _is_sharded(runtime: Runtime) -> bool:
    if runtime.mesh.size("tp") * runtime.mesh.size("pp") > 1:
        return True
    parameters = [each for _, each in runtime.named_parameters() if isinstance(each, DTensor)]
    return any(
        placement.is_shard() and each.device_mesh.size(axis) > 1
        for each in parameters
        for axis, placement in enumerate(each.placements)
    )


def _foreign_parameters(optimizer: Optimizer, known: Mapping[int, Counterpart]) -> Iterator[str]:
    for number, group in enumerate(optimizer.param_groups):
        if foreign := [tuple(each.shape) for each in group["params"] if id(each) not in known]:
            found = Words(f"{len(foreign)} others, of shapes {_listed([str(shape) for shape in foreign])}")
            rule = "must hold parameters of the model that is prepared with it"
            cure = "Make the optimizer from model.named_parameters() once the model is complete (new tokens, heads)"
            yield problem(f"Group {number} of the optimizer", found, rule, cure)


def _shared_by_groups(groups: list[Names]) -> Iterator[str]:
    owner: dict[str, int] = {}
    for number, names in enumerate(groups):
        for name in names:
            if owner.setdefault(name, number) != number:
                rule = "must not both hold a part of what is one parameter here"
                what, cure = f"Groups {owner[name]} and {number} of the optimizer", "Put all parts into one group"
                yield problem(what, Words(name), rule, cure)


def _notes(optimizer: Optimizer, known: Collection[Counterpart], groups: list[Names]) -> Iterator[str]:
    """Lines on what is not as in the transformers model."""
    grouped = {name for names in groups for name in names}
    if frozen := [
        each.name for each in known if each.parameter.requires_grad and each.names and not grouped & {*each.names}
    ]:
        yield f"Frozen, as no group of the optimizer has them: {_listed(frozen)}"
    if lacking := [each.name for each in known if not each.names]:
        yield f"Not trained, as the model here has no such parameters: {_listed(lacking)}"
    if added := [f"{each.name} (to {', '.join(each.names)})" for each in known if each.added and each.names]:
        yield f"Trained as one parameter with the one that it is added to here: {_listed(added)}"
    changed = [each.name for each in known if any(one not in (IDENTITY, None) for one in each.pieces.values())]
    if changed and not _is_elementwise(optimizer):
        kind = type(optimizer).__name__
        yield f"{kind} sees other matrices here (transposed; q, k and v apart) instead of: {_listed(changed)}"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + f" ... ({len(names)} in all)" * (len(names) > 6)


def _choose_kernels(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """The fastest step that torch has for these parameters, where the script has chosen none."""
    parameters = group["params"]
    sharded = any(isinstance(each, DTensor) for each in parameters)
    if sharded and group.get("foreach"):
        group["foreach"] = False  # it mixes DTensors with ordinary tensors
    fits = isinstance(optimizer, optim.Adam) or (isinstance(optimizer, optim.SGD) and not sharded)
    chosen = group.get("fused") is not None or group.get("foreach") or group.get("differentiable")
    if fits and not chosen and all(each.device.type in FUSED_DEVICES for each in parameters):
        group["fused"], group["foreach"] = True, False


def _translate_state(
    optimizer: Optimizer, owners: Mapping[int, Counterpart], here: Mapping[str, list[nn.Parameter]], model: ModelConfig
) -> None:  # fmt: skip
    """State of the transformers model's parameters as state of this process's. (Adagrad starts with some.)"""
    old = dict(optimizer.state)
    optimizer.state.clear()
    fused = {id(each) for group in optimizer.param_groups if group.get("fused") for each in group["params"]}
    for hf_parameter, values in old.items():
        owner = owners[id(hf_parameter)]
        fail(_untranslatable(owner.name, hf_parameter, values))
        for names, conversion in owner.pieces.items():
            if conversion is None:
                continue
            whole = {key: value for key, value in values.items() if isinstance(value, Tensor) and value.dim()}
            parts = {key: conversion.from_hf(Lazy.of(value), model) for key, value in whole.items()}
            for number, name in enumerate(names):
                for parameter in here.get(name, ()):
                    device = parameter.device if id(parameter) in fused else None
                    state = {key: _moved(value, device) for key, value in values.items() if key not in whole}
                    tensors = {key: torch.zeros_like(parameter) for key in whole}
                    fill({key: part[number] for key, part in parts.items()}, tensors)
                    optimizer.state[parameter] = state | tensors


def _untranslatable(name: str, parameter: Tensor, values: Mapping[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Tensor) and value.dim() and (value.shape != parameter.shape or value.is_meta):
            found = Words(f"shape {tuple(value.shape)} on {value.device}")
            rule = f"must have the shape of its parameter, {tuple(parameter.shape)}, and data"
            cure = "Prepare a new optimizer, and a model with weights where the optimizer starts with state (Adagrad)"
            yield problem(f"The optimizer's state {key} of {name}", found, rule, cure)


def _moved(value: Any, device: torch.device | None) -> Any:
    """A copy of a number in the state; a fused step needs its count of steps on the parameter's device."""
    return value.to(device, copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)


def _factors(
    plugin: MegatronLMPlugin, known: Iterable[Counterpart], here: Mapping[str, list[nn.Parameter]]
) -> dict[int, tuple[float, float]]:  # fmt: skip
    """{id of a parameter here: factors of learning rate and weight decay}, where the plugin's conditions give any."""

    def holds(condition: Callable[[str, Tensor], bool] | None, each: Counterpart) -> bool:
        return condition is not None and bool(condition(each.name, each.parameter))

    factors: dict[int, tuple[float, float]] = {}
    for each in known:
        rate = plugin.lr_mult if holds(plugin.scale_lr_cond, each) else 1.0
        decay = 0.0 if holds(plugin.no_wd_decay_cond, each) else 1.0
        if (rate, decay) != (1.0, 1.0):
            factors |= {id(parameter): (rate, decay) for name in each.names for parameter in here.get(name, ())}
    return factors


def _apply_factors(optimizer: Optimizer, factors: Mapping[int, tuple[float, float]]) -> None:
    """Let each step see groups divided by the factors of their parameters, as Megatron's are.

    Between steps the groups are the script's: schedulers are bound to their number.
    """
    whole: list[list[dict[str, Any]]] = []

    def divide(optimizer: Optimizer, *_: Any) -> None:
        whole.append(optimizer.param_groups)
        optimizer.param_groups = [part for group in whole[-1] for part in _divided(group, factors)]

    def restore(optimizer: Optimizer, *_: Any) -> None:
        optimizer.param_groups = whole.pop()

    optimizer.register_step_pre_hook(divide)
    optimizer.register_step_post_hook(restore)


def _divided(group: dict[str, Any], factors: Mapping[int, tuple[float, float]]) -> Iterator[dict[str, Any]]:
    parts = collections.defaultdict[tuple[float, float], list[nn.Parameter]](list)
    for parameter in group["params"]:
        parts[factors.get(id(parameter), (1.0, 1.0))].append(parameter)
    for (rate, decay), parameters in parts.items():
        decayed = {"weight_decay": group["weight_decay"] * decay} if "weight_decay" in group else {}
        yield group | decayed | {"params": parameters, "lr": group["lr"] * rate}


class MegatronOptimizer(AcceleratedOptimizer):
    """The optimizer that `Accelerator.prepare` returns: the script's own as `optimizer`, stepped when calls end a step.

    `step` and `zero_grad` do nothing while gradients are accumulated. Every process calls them.
    """

    def __init__(self, optimizer: Optimizer, session: Session):
        super().__init__(optimizer, device_placement=False)
        self.session = session

    def step(self, closure: Callable | None = None) -> None:
        """Complete the gradients, clip them by the plugin's gradient_clipping unless the script has, change weights.

        Where gradients are not finite nothing changes, on any process, and `step_was_skipped` is True. Without a
        backward pass nothing happens. Raises TrainingError for a closure.
        """
        if closure is not None:
            rule = "must be called without a closure: a step's passes are run by all processes before it"
            cure = "Call accelerator.backward(loss) and then optimizer.step()"
            raise TrainingError(problem("optimizer.step", Words("a closure"), rule, cure))
        if not self.gradient_state.sync_gradients:
            return
        session, self._is_overflow = self.session, False
        if not session.has_gradients:
            return
        if session.plugin.gradient_clipping and not session.clipped:
            session.clip(session.plugin.gradient_clipping)
        self._is_overflow = not session.gradients_finite()
        no_smaller_scale = session.loss_scale.at_minimum
        session.loss_scale.update(self._is_overflow)
        if not self._is_overflow:
            self.optimizer.step()
            session.steps += 1
        elif no_smaller_scale and self.accelerator_state.is_main_process:
            warnings.warn(
                f"Gradients of optimizer step {session.steps} are infinite or not a number: no weights changed, and no "
                "smaller loss scale can help. Lower the learning rate, or look for such numbers in the data.",
                stacklevel=2,
            )

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Forget the gradients of all parameters, which are None afterwards, whatever `set_to_none` says."""
        if self.gradient_state.sync_gradients:
            self.session.discard_gradients()
