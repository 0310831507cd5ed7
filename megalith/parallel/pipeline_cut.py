"""Cutting a model into stages: the same model with the modules it lacks set to None, layers kept under their global numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

from torch import nn

from megalith.common.registry import Registry


@dataclasses.dataclass(frozen=True)
class Ends:
    """Names of a model's modules that its first stage alone has, and its last; all that is no layer and not named is everywhere.

    beside: modules that every stage has which has one of certain layers; a function gives their numbers, of the number of the
    decoder's first layer and the number of layers.
    """

    first: tuple[str, ...]
    last: tuple[str, ...]
    beside: Mapping[str, Callable[[int, int], Collection[int]]] = dataclasses.field(default_factory=dict)


GPT = Ends(("embedding", "position_embedding", "embedding_norm"), ("final_norm", "head"))
BERT = Ends(
    ("embedding", "position_embedding", "token_type_embedding", "embedding_norm"),
    ("final_norm", "head_dense", "head_norm", "head", "pooler", "order_head"),
)
T5 = Ends((), ("final_norm", "head"), {
    "embedding": lambda decoder, end: (0, decoder),
    "position_embedding": lambda decoder, end: (0, decoder),
    "encoder_bias": lambda decoder, end: range(decoder),
    "encoder_norm": lambda decoder, end: (decoder - 1,),
    "decoder_bias": lambda decoder, end: range(decoder, end),
})  # fmt: skip
ENDS = Registry("pipeline ends", {name.lower(): f"megalith.parallel.pipeline_cut:{name}" for name in ("GPT", "BERT", "T5")})


@dataclasses.dataclass(frozen=True)
class Cut:
    """Which stage has what. layers: global numbers of the layers of each stage. decoder: that of a decoder's first, behind an encoder's."""

    ends: Ends
    layers: list[range]
    decoder: int | None = None

    def received(self, stage: int) -> tuple[str, ...]:
        """What flows into a stage, in order: the inputs whose hidden states they are. Inside a decoder the encoder's output rides along."""
        inside = self.decoder is not None and self.layers[stage].start > self.decoder
        return ("inputs", "decoder_input_ids") if inside else ("inputs",)

    def has(self, stage: int, name: str) -> bool:
        """Whether a stage has the module or parameter of this name."""
        top, _, rest = name.partition(".")
        if top == "layers" and rest:
            return int(rest.partition(".")[0]) in self.layers[stage]
        if top in self.ends.beside:
            needed = self.ends.beside[top](self.decoder or 0, self.layers[-1].stop)
            return any(number in self.layers[stage] for number in needed)
        return (top not in self.ends.first or stage == 0) and (top not in self.ends.last or stage == len(self.layers) - 1)

    def apply(self, model: nn.Module, stage: int) -> None:
        """Take from a whole model what the stage lacks."""
        for name in (*self.ends.first, *self.ends.last, *self.ends.beside):
            if not self.has(stage, name):
                setattr(model, name, None)
        for number in list(model.layers):
            if not self.has(stage, f"layers.{number}"):
                del model.layers[number]

    def holders(self, names: dict[str, str]) -> dict[str, list[tuple[int, str]]]:
        """For each parameter of the whole model, the (stage, name there) of its copies. names: see `canonical_names`."""
        found: dict[str, list[tuple[int, str]]] = {}
        for stage in range(len(self.layers)):
            seen = set()  # tied within a stage: one parameter under its first name
            for name, first in names.items():
                if self.has(stage, name) and first not in seen:
                    seen.add(first)
                    found.setdefault(first, []).append((stage, name))
        return found


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Each name of a parameter to the first it has, under which a tied one is known: {"head.weight": "embedding.weight", ...}."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False)}
