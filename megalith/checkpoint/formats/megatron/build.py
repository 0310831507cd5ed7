"""The last step of every reader of the family: Weights from the tensors and the content of the files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megalith.checkpoint.formats import MegatronReadOptions
from megalith.checkpoint.formats.megatron import optimizer
from megalith.checkpoint.formats.megatron.assemble import ConversionPlan, RankTensors
from megalith.checkpoint.formats.megatron.replicas import Replicas
from megalith.checkpoint.formats.megatron.vocabulary import NO_ACTION_NEEDED
from megalith.checkpoint.tensors.unpickle import fields
from megalith.checkpoint.weights import Weights
from megalith.config.source_fields import FieldType, checked

OptimizerStates = Mapping[str, Sequence[RankTensors]]  # {"exp_avg", "exp_avg_sq", "master": tensors of each rank}


def build_weights(
    content: Mapping[str, Any],
    version: float,
    shards: Sequence[RankTensors],
    states: Callable[[list[str]], OptimizerStates],
    classes: set[str],
    options: MegatronReadOptions,
    replicas: Replicas,
    notes: Sequence[str] = (),
) -> Weights:
    """Weights from the `shards` of all ranks, on request with the optimizer's `states` (which may add notes).

    content: the file without tensors: args, iteration, optimizer, opt_param_scheduler, rng_state. replicas: the copies
    found so far; they are compared with those found here before anything is converted. notes: from reading the shards.
    """
    notes = list(notes)
    plan = ConversionPlan(content.get("args"), version, shards, options, notes)
    tensors = plan.apply(shards, "model/", replicas)
    state = progress_counters(content)
    if options.with_optimizer:
        found = dict(states(notes))
        names = [name.removeprefix("model/") for name in tensors]
        if "master" in found:
            tensors |= plan.apply(found.pop("master"), "model/", replicas)
        for key, moments in found.items():
            tensors |= plan.apply(moments, f"optimizer/{key}/", replicas)
        tensors |= optimizer.step_counts(content, names)
        state |= optimizer.train_state(content)
    notes += replicas.check()
    if "rng_state" in content or "random_rng_state" in content:
        text = "random states were left out: everything random here is a function of seed and step"
        notes.append(text + NO_ACTION_NEEDED)
    if classes:
        notes.append(f"classes that were not loaded, nor needed: {', '.join(sorted(classes))}{NO_ACTION_NEEDED}")
    return Weights(
        config=plan.config, tensors=tensors, iteration=iteration_of(content), train_state=state, notes=tuple(notes)
    )


def checkpoint_version(content: Mapping[str, Any], default: float) -> float:
    """The file's checkpoint_version. Raises CheckpointError where it is no number."""
    fields_read = checked(content, {"checkpoint_version": FieldType(float)}, "the file")
    return float(fields_read.get("checkpoint_version", default))


def iteration_of(content: Mapping[str, Any]) -> int:
    """Steps done; 0 for a release."""
    found = content.get("iteration", content.get("total_iters", 0))
    return found if isinstance(found, int) and found >= 0 else 0


def progress_counters(content: Mapping[str, Any]) -> dict[str, Any]:
    """Steps and samples, for a run that resumes from here."""
    args = fields(content.get("args"))
    names = ("consumed_train_samples", "consumed_valid_samples")
    return {"iteration": iteration_of(content)} | {
        name: args[name] for name in names if isinstance(args.get(name), int)
    }
