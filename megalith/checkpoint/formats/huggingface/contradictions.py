"""Facts that config.json states in two fields: the field that transformers reads is read, a note names differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.tokenizer import TOKEN_IDS

TANH = "gelu_pytorch_tanh"


def rope_parameters(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json's object on rotary positions: the older rope_scaling where it is there, else rope_parameters."""
    return given.get("rope_scaling") or given.get("rope_parameters") or {}


def rope_parameters_name(given: Mapping[str, Any]) -> str:
    """The name of the object that `rope_parameters` returns."""
    return "rope_scaling" if given.get("rope_scaling") else "rope_parameters"


def gemma_activation(given: Mapping[str, Any]) -> str:
    """The activation of a Gemma, as config.json's hidden_act means it: releases name gelu for its tanh approximation.

    transformers 4 read hidden_activation, which transformers 5 does not.
    """
    name = given.get("hidden_act", TANH)
    return TANH if name == "gelu" else name


def find_contradictions(given: Mapping[str, Any], aliases: Mapping[str, str]) -> list[str]:
    """A note for each pair of fields that should state the same and differ.

    given: config.json as it is in the file. aliases: Family.aliases, {name that is read where both are given: other}.
    """
    pairs = [
        (name, given[name], other, given[other]) for name, other in aliases.items() if name in given and other in given
    ]
    rope, older = rope_parameters(given), given.get("rope_scaling")
    if older and given.get("rope_parameters"):
        base = given.get("rope_theta", 10000.0)
        read, unread = (_normalized(each, base) for each in (older, given["rope_parameters"]))
        pairs += [("rope_scaling", older, "rope_parameters", given["rope_parameters"])] * any(
            read.get(k) != v for k, v in unread.items()
        )
    for name, outer in (
        ("rope_theta", "rope_theta"),
        ("rope_theta", "rotary_emb_base"),
        ("partial_rotary_factor", "rotary_pct"),
    ):
        if name in rope and outer in given:
            pairs.append((f"{rope_parameters_name(given)}: {name}", rope[name], outer, given[outer]))
    if given.get("model_type") == "gemma":
        if "hidden_activation" in given:
            pairs.append(("hidden_act", gemma_activation(given), "hidden_activation", given["hidden_activation"]))
        elif given.get("hidden_act") == "gelu":
            pairs.append(("Gemma's class", TANH, "hidden_act", "gelu"))
    contradictions = [
        f"{name} {value!r} and {other} {other_value!r}"
        for name, value, other, other_value in pairs
        if other_value is not None and value not in (other_value, None)
    ]
    return [
        f"config.json differs from itself: {each}; the first is read, as transformers 5 does" for each in contradictions
    ]


def _normalized(rope: Mapping[str, Any], base: float) -> dict[str, Any]:
    """rope_scaling or rope_parameters, with `rope_type` for the older `type`, and `base` where it has no rope_theta."""
    return {"rope_theta": base, **rope, "rope_type": rope.get("rope_type", rope.get("type", "default"))}


def ids_beyond_vocabulary(given: Mapping[str, Any], file: str, vocab_size: int) -> Iterator[str]:
    """A note for each special token (bos, eos, ...) whose id is not in the vocabulary."""
    for name in TOKEN_IDS:
        ids = given[name] if isinstance(given.get(name), list) else [given.get(name)]
        if beyond := [each for each in ids if isinstance(each, int) and each >= vocab_size]:
            id_text = f"{file}: {name} {', '.join(map(str, beyond))}"
            yield f"{id_text} is beyond the vocabulary of {vocab_size}: nothing ever has that id"
