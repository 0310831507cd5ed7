"""The last step of every reader of the family: what was found, as Weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats import Options
from megalith.checkpoint.formats.megatron import optimizer
from megalith.checkpoint.formats.megatron.assemble import Parts, Plan
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.vocabulary import NOTHING
from megalith.checkpoint.tensors.unpickle import fields
from megalith.checkpoint.weights import Weights
from megalith.config.source_fields import Kind, checked

States = Mapping[str, Sequence[Parts]]  # "exp_avg", "exp_avg_sq", "master" -> the parts of each tensor-parallel rank


def weights_of(
    content: Mapping[str, Any],
    version: float,
    parts: Sequence[Parts],
    states: Callable[[list[str]], States],
    classes: set[str],
    options: Options,
    replicas: Replicas,
    notes: Sequence[str] = (),
) -> Weights:
    """Weights of the model's `parts`, and if asked for with the optimizer's `states` (which may add notes).

    replicas: the copies met so far; with those met here they are compared before anything is converted.
    notes: those that reading the parts gave.
    content: what the file holds beside tensors: args, iteration, optimizer, opt_param_scheduler, rng_state.
    """
    notes = list(notes)
    plan = Plan(content.get("args"), version, parts, options, notes)
    tensors = plan.apply(parts, "model/", replicas)
    state = counts(content)
    if options.with_optimizer:
        found = dict(states(notes))
        names = [name.removeprefix("model/") for name in tensors]
        if "master" in found:
            tensors |= plan.apply(found.pop("master"), "model/", replicas)
        for key, moments in found.items():
            tensors |= plan.apply(moments, f"optimizer/{key}/", replicas)
        tensors |= optimizer.steps(content, names)
        state |= optimizer.train_state(content)
    notes += replicas.check()
    if "rng_state" in content or "random_rng_state" in content:
        notes.append("random states were left out: everything random here is a function of seed and step" + NOTHING)
    if classes:
        notes.append(f"classes that were not loaded, nor needed: {', '.join(sorted(classes))}{NOTHING}")
    return Weights(
        config=plan.config, tensors=tensors, iteration=iteration_of(content), train_state=state, notes=tuple(notes)
    )


def version_of(content: Mapping[str, Any], default: float) -> float:
    """The file's checkpoint_version. Raises CheckpointError where it is no number."""
    return float(checked(content, {"checkpoint_version": Kind(float)}, "the file").get("checkpoint_version", default))


def iteration_of(content: Mapping[str, Any]) -> int:
    """Steps done; 0 for a release."""
    found = content.get("iteration", content.get("total_iters", 0))
    return found if isinstance(found, int) and found >= 0 else 0


def counts(content: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and samples, for a run that goes on from here."""
    args = fields(content.get("args"))
    names = ("consumed_train_samples", "consumed_valid_samples")
    return {"iteration": iteration_of(content)} | {
        name: args[name] for name in names if isinstance(args.get(name), int)
    }
