"""Text out of an encoder-decoder: the encoder reads the prompt once, the decoder writes from its start token on.

Shapes: b rows, s tokens of the prompt, t of the text so far, h hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megalith.generation.cache import Decoder


class Writer(nn.Module):
    """The decoder of a T5 as a model of one stack: ids [b, t] and their places -> logits, beside the prompts it was given."""

    def __init__(self, model: nn.Module, capacity: int):
        """capacity: the most tokens of a text."""
        super().__init__()
        self.config, self.tokenizer = model.config, getattr(model, "tokenizer", None)
        stacks = [[name for name in model.layers if (int(name) < model.config.num_layers) is first] for first in (True, False)]
        self.encoder, self.decoder = (_part(model, names) for names in stacks)
        self.layers, self.head = self.decoder.layers, model.head
        if model.decoder_bias is not None:  # the same table at every step, not one for the token that a step has
            table = model.decoder_bias(capacity).detach()
            del self.decoder._modules["decoder_bias"]
            self.decoder.decoder_bias = lambda length: table

    def remember(self, prompts: list[list[int]]) -> None:
        """Read prompts; the keys and values that all later calls look at are made here."""
        longest = max(map(len, prompts))
        ids = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=self.head.weight.device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=ids.device)
        padding = torch.arange(longest, device=ids.device) < lengths[:, None]
        self.padding = None if len(set(map(len, prompts))) == 1 else padding
        self.memory = self.encoder(ids, decoder_input_ids=ids, padding_mask=self.padding)
        self.forget()
        for layer in self.layers.values():
            kept = layer.cross_attention.look(self.memory)
            layer.cross_attention.look = lambda memory, kept=kept: kept

    def select(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.memory, self.padding = self.memory[rows], None if self.padding is None else self.padding[rows]
        for layer in self.layers.values():
            kept = tuple(each[rows] for each in layer.cross_attention.look(self.memory))
            layer.cross_attention.look = lambda memory, kept=kept: kept

    def forget(self) -> None:
        """Make the layers look for themselves again."""
        for layer in self.layers.values():
            vars(layer.cross_attention).pop("look", None)

    def forward(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Logits after ids [b, t]; places [b, t] are the same in all rows, as all texts start with one token."""
        places = None if places is None else places[0]
        return self.decoder(self.memory, decoder_input_ids=ids, padding_mask=self.padding, decoder_coordinates=places)


def _part(model: nn.Module, layers: Iterable[str]) -> Any:
    """The same model with some of its layers alone, sharing their parameters."""
    made = copy.copy(model)
    made._modules = {**model._modules, "layers": nn.ModuleDict({name: model.layers[name] for name in layers})}
    return made


class PairDecoder(Decoder):
    """A Decoder whose prompts are read by the encoder; `places` are those of the text."""

    model: Writer

    def __init__(self, model: nn.Module, capacity: int, start: int):
        """start: the token before a text."""
        super().__init__(Writer(model, capacity), capacity)
        self.start = start

    @torch.no_grad()
    def read(self, prompts: list[list[int]]) -> Tensor:
        """Read prompts (token ids, at least one each); returns the logits [b, V] of each text's first token."""
        self.model.remember(prompts)
        return super().read([[self.start]] * len(prompts))

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [any]."""
        super().select(rows)
        self.model.select(rows)

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.model.forget()
