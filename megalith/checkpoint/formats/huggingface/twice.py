"""What a config.json says twice: transformers' choice is ours, and where the two differ a line names both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TANH = "gelu_pytorch_tanh"


def rope_of(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object that says how positions are rotated: transformers takes the older rope_scaling, whole, where it is there."""
    return given.get("rope_scaling") or given.get("rope_parameters") or {}


def rope_name(given: Mapping[str, Any]) -> str:
    """What that object is called."""
    return "rope_scaling" if given.get("rope_scaling") else "rope_parameters"


def gemma_activation(given: Mapping[str, Any]) -> str:
    """Gemma's releases say gelu and mean its approximation; transformers 5 leaves hidden_activation, which 4 had read, unread."""
    name = given.get("hidden_act", TANH)
    return TANH if name == "gelu" else name


def differing(given: Mapping[str, Any], aliases: Mapping[str, str]) -> list[str]:
    """A line for each pair of fields that differ. aliases: {name that counts where both are given: the other one}."""
    pairs = [
        (name, given[name], other, given[other]) for name, other in aliases.items() if name in given and other in given
    ]
    rope, older = rope_of(given), given.get("rope_scaling")
    if older and given.get("rope_parameters"):
        base = given.get("rope_theta", 10000.0)
        read, unread = (_spelled(each, base) for each in (older, given["rope_parameters"]))
        pairs += [("rope_scaling", older, "rope_parameters", given["rope_parameters"])] * any(
            read.get(k) != v for k, v in unread.items()
        )
    for name, outer in (
        ("rope_theta", "rope_theta"),
        ("rope_theta", "rotary_emb_base"),
        ("partial_rotary_factor", "rotary_pct"),
    ):
        if name in rope and outer in given:
            pairs.append((f"{rope_name(given)}: {name}", rope[name], outer, given[outer]))
    if given.get("model_type") == "gemma":
        if "hidden_activation" in given:
            pairs.append(("hidden_act", gemma_activation(given), "hidden_activation", given["hidden_activation"]))
        elif given.get("hidden_act") == "gelu":
            pairs.append(("Gemma's class", TANH, "hidden_act", "gelu"))
    lines = [
        f"{name} {one!r} and {other} {two!r}"
        for name, one, other, two in pairs
        if two is not None and one not in (two, None)
    ]
    return [f"config.json differs from itself: {each}; the first is read, as transformers 5 does" for each in lines]


def _spelled(rope: Mapping[str, Any], base: float) -> dict[str, Any]:
    """Such an object with its kind under one name, and what it leaves to others."""
    return {"rope_theta": base, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}
