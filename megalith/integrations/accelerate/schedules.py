"""Learning-rate schedulers: the script's own, or Megatron's schedule where it gives a MegatronLMDummyScheduler.

They move once per optimizer step, in every layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import MegatronLMDummyScheduler
from accelerate.utils.deepspeed import DummyScheduler
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words, fail
from megalith.config.run import RunConfig
from megalith.optim.schedule import Schedule

if TYPE_CHECKING:
    from megalith.integrations.accelerate.plugin import MegatronLMPlugin
    from megalith.integrations.accelerate.session import Session

__all__ = ["MegatronLMDummyScheduler", "MegatronLR", "MegatronScheduler", "build_schedule", "is_scheduler", "prepare"]
WARM_UPS = ("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction")  # of which a plugin may give one


def is_scheduler(given: Any) -> bool:
    """Whether `prepare` is for this object."""
    return isinstance(given, (LRScheduler, AcceleratedScheduler, MegatronLMDummyScheduler, DummyScheduler))


def prepare(given: Any, session: Session, step_with_optimizer: bool = True) -> tuple[AcceleratedScheduler, list[str]]:
    """The scheduler that the script steps, and lines for the user. The session's optimizer must be there.

    given: a scheduler of torch or transformers, or a MegatronLMDummyScheduler. step_with_optimizer: False lets it move
    in every call of `step`, whatever the optimizer did.
    Raises ConfigError for schedulers of other optimizers, and for values of a dummy that cannot work.
    """
    if isinstance(given, AcceleratedScheduler):
        return given, []
    plugin, mesh, optimizer = session.plugin, session.runtime.mesh, session.optimizer
    fail(_binding_problems(given, optimizer))
    if isinstance(given, MegatronLMDummyScheduler):
        scheduler = build_schedule(given, plugin, optimizer.optimizer, session.gradient_state.num_steps)
        plugin.megatron_lm_default_args |= _fields(given, plugin, session.gradient_state.num_steps)[0]
        lines = [f"> learning rate decay style: {scheduler.schedules[0].parameters.lr_decay_style}"]
        if mesh.data_size > 1:
            lines.append(
                "total_num_steps and warmup_num_steps of MegatronLMDummyScheduler are optimizer steps; Accelerate "
                f"divided them by the {mesh.data_size} data-parallel processes"
            )
        return MegatronScheduler(scheduler, optimizer, step_with_optimizer), lines
    lines, defaults = [], RunConfig().flat()
    fields = {name: value for name, value in plugin.schedule_fields().items() if not name.startswith("train_")}
    if unused := [name for name, value in fields.items() if value != defaults[name]]:
        lines.append(f"{', '.join(unused)} of MegatronLMPlugin has no effect: the scheduler is the script's own")
    if mesh.world_size > 1:
        lines.append(
            "The scheduler moves once per optimizer step; Accelerate moves one num_processes times, and a script must "
            "not multiply the steps of its scheduler by accelerator.num_processes here"
        )
    if (fewer := plugin.num_micro_batches * mesh.data_size) > 1:
        lines.append(
            f"A prepared loader has {fewer} times fewer batches than the script's (num_micro_batches x data-parallel "
            "processes): a scheduler whose steps were counted before accelerator.prepare(loader) ends too late"
        )
    return MegatronScheduler(given, optimizer, step_with_optimizer), lines


def _binding_problems(given: Any, optimizer: Any) -> Iterator[str]:
    what, name = "The scheduler", Words(type(given).__name__)
    if isinstance(given, DummyScheduler):
        yield problem(what, name, "must not be DeepSpeed's", "Use MegatronLMDummyScheduler, or torch's")
    elif optimizer is None:
        cure = "Give the optimizer in the same call of accelerator.prepare, or in one before it"
        yield problem(what, name, "must be prepared with its optimizer, or after it", cure)
    elif all(getattr(given, "optimizer", each) is not each for each in (optimizer, optimizer.optimizer)):
        rule = "must be bound to the optimizer that is prepared; it is bound to another one"
        yield problem(what, name, rule, "Make it with the optimizer that accelerator.prepare is given")


def build_schedule(
    dummy: MegatronLMDummyScheduler, plugin: MegatronLMPlugin, optimizer: Optimizer, accumulation: int = 1
) -> MegatronLR:  # fmt: skip
    """Megatron's schedule for the groups of `optimizer`, each from its own peak rate to the plugin's min_lr.

    total_num_steps and warmup_num_steps of the dummy are optimizer steps. What the plugin says of lengths goes first;
    lr_decay_style is its alone. accumulation: calls of the model in an optimizer step, for lengths in samples.
    Raises ConfigError with all that cannot work.
    """
    values, batch = _fields(dummy, plugin, accumulation)
    schedules, problems = [], list[str]()
    for group in optimizer.param_groups:
        lr, decay = float(group.get("initial_lr", group["lr"])), group.get("weight_decay", 0.0)
        config = RunConfig().replace(**{**values, "lr": lr, "weight_decay": decay})
        try:
            schedules.append(Schedule(config.optimizer, config.schedule, batch))
        except ConfigError as error:
            problems += _as_arguments(str(error)).splitlines()
    fail(problems)
    return MegatronLR(optimizer, schedules, batch)


def _fields(dummy: MegatronLMDummyScheduler, plugin: MegatronLMPlugin, accumulation: int) -> tuple[dict[str, Any], int]:
    """({field of RunConfig: value}, samples of an optimizer step, 1 where all lengths are in steps)."""
    values, name = plugin.schedule_fields(), "MegatronLMDummyScheduler"
    problems = [
        problem(f"{name}: {argument}", value, "is no argument that does anything", "Give it to MegatronLMPlugin")
        for argument, value in dummy.kwargs.items()
    ]
    total, warmup = dummy.total_num_steps, dummy.warmup_num_steps or 0
    for what, steps in (("total_num_steps", total), ("warmup_num_steps", warmup)):
        if steps is not None and (steps < 0 or steps != int(steps)):
            problems.append(problem(f"{name}: {what}", steps, "must be a number of optimizer steps", "Round it up"))
    in_samples = any(value for field, value in values.items() if field.endswith("_samples"))
    batch = plugin.global_batch_size * accumulation if in_samples else 1
    samples = values.get("train_samples")
    planned = values.get("train_iters") if samples is None else -(-samples // batch)
    if total is None and planned is None:
        cure = "Give the optimizer steps of the run"
        problems.append(problem(f"{name}: total_num_steps", total, "must be given", cure))
    elif None not in (total, planned) and total != planned:
        rule = f"must be the length of the run that MegatronLMPlugin has, {planned} steps"
        problems.append(problem(f"{name}: total_num_steps", total, rule, "Leave out one of the two"))
    chosen = {field: values[field] for field in WARM_UPS if values.get(field)}
    if chosen and warmup and chosen != {"lr_warmup_iters": warmup}:
        rule = f"must be left out where MegatronLMPlugin has {', '.join(f'{f}={v}' for f, v in chosen.items())}"
        problems.append(problem(f"{name}: warmup_num_steps", warmup, rule, "Leave out one of the two"))
    fail(problems)
    if planned is None:
        values["train_iters"] = int(total)
    if not chosen:
        values |= {"lr_warmup_iters": int(warmup)} if samples is None else {"lr_warmup_samples": int(warmup) * batch}
    return values, batch


def _as_arguments(text: str) -> str:
    """A message on flags as one on arguments of the plugin: --min-lr becomes min_lr."""
    return re.sub(r"--(\w[\w-]*)", lambda flag: flag[1].replace("-", "_"), text)


class MegatronLR(LambdaLR):
    """Megatron's learning rate, and weight decay where that grows, of each group.

    Optimizer step k, counted from 0, has the rate that Megatron's has: `Schedule.lr` after the samples of k steps. A
    warm-up therefore begins with a step of rate 0, as that of transformers does. Groups without weight decay stay so.
    """

    def __init__(self, optimizer: Optimizer, schedules: Sequence[Schedule], batch: int = 1):
        """schedules: one for each group. batch: samples of an optimizer step, in the unit of their lengths."""
        self.schedules, self.batch = schedules, batch
        self.decaying = [bool(group.get("weight_decay")) for group in optimizer.param_groups]
        super().__init__(optimizer, [self._factor(schedule) for schedule in schedules])

    def _factor(self, schedule: Schedule) -> Callable[[int], float]:
        peak = schedule.parameters.lr
        return lambda step: schedule.lr(step * self.batch) / peak if peak else 0.0

    def step(self, epoch: int | None = None) -> None:
        """Move to the next optimizer step."""
        super().step(epoch)
        self._set_weight_decay()

    def _set_weight_decay(self) -> None:
        for group, schedule, decays in zip(self.optimizer.param_groups, self.schedules, self.decaying):
            if decays and schedule.parameters.weight_decay_incr_style != "constant":
                group["weight_decay"] = schedule.weight_decay(self.last_epoch * self.batch)

    def state_dict(self) -> dict[str, Any]:
        """The progress; the schedule itself is that of the arguments, in a resumed run too."""
        own = ("schedules", "batch", "decaying")
        return {name: value for name, value in super().state_dict().items() if name not in own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the progress of `state_dict`."""
        super().load_state_dict(state_dict)
        self._set_weight_decay()


class MegatronScheduler(AcceleratedScheduler):
    """The scheduler that `Accelerator.prepare` returns: it moves when the optimizer has taken a step, once.

    (Accelerate moves a scheduler num_processes times.) It does not move while gradients are accumulated, nor after a
    step that was skipped because gradients were not finite.
    """

    def __init__(self, scheduler: LRScheduler, optimizer: Any, step_with_optimizer: bool = True):
        super().__init__(scheduler, optimizer, step_with_optimizer, split_batches=True)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Move, if the optimizer has. Arguments are the scheduler's, such as the metric of ReduceLROnPlateau."""
        if self.step_with_optimizer:
            waits = not self.gradient_state.sync_gradients or any(each.step_was_skipped for each in self.optimizers)
            total = getattr(self.scheduler, "total_steps", None)  # OneCycleLR raises beyond it
            if waits or (total is not None and self.scheduler.last_epoch >= total):
                return
        self.scheduler.step(*args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the progress of `state_dict`, whose learning rates the optimizer then has."""
        super().load_state_dict(state_dict)
        groups, rates = self.scheduler.optimizer.param_groups, self.scheduler.get_last_lr()
        for group, rate in zip(groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(float(rate))
            else:
                group["lr"] = rate
