"""A model that remembers the keys and values of what it has read, so that each new token costs one token's work.

Shapes: b rows, s tokens of this call, n query heads, m key/value heads, d channels of a head, L places kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megalith.layers.attention import CoreAttention
from megalith.layers.mask import AttentionMask

STEP = 64  # lengths of masks grow by this many places: accelerators' kernels want aligned masks


class Reading:
    """What the layers of one decoder share: where the tokens of the present call stand.

    places [b, s]: place of each token in its row, None while prompts are read. length: keys to look at; no row has more.
    even: all rows are equally long, so that the last query sees all `length` keys and needs no mask.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.set(None, capacity, False)

    def set(self, places: Tensor | None, length: int, even: bool) -> None:
        """Begin a call."""
        self.places, self.length, self.even = places, length, even
        self.biases: dict[int | None, Tensor] = {}

    def bias(self, mask: AttentionMask, dtype: torch.dtype) -> Tensor:
        """What is added to scores: [b, 1 or n, s, length], made once for all layers of one kind."""
        if mask.window not in self.biases:
            key = torch.arange(self.length, device=self.places.device)
            distance = key - self.places[:, None, :, None]  # [b, 1, s, length], 0 for the token itself
            hidden = distance > 0
            if mask.window is not None:
                hidden = hidden | (distance <= -mask.window)
            values = torch.zeros((), device=key.device) if mask.slopes is None else mask.slopes.view(1, -1, 1, 1).float() * distance
            if mask.relative is not None:
                values = mask.relative[:, distance[:, 0] + mask.relative.shape[1] // 2].transpose(0, 1)
            wide = torch.promote_types(dtype, torch.float32) if key.device.type == "cpu" else dtype
            self.biases[mask.window] = values.masked_fill(hidden, float("-inf")).to(wide)
        return self.biases[mask.window]


class CachedAttention(CoreAttention):
    """Takes the place of a layer's core attention and keeps its keys and values, in one block of memory for all steps."""

    def __init__(self, reading: Reading, scale: float | None):
        super().__init__(0.0, "cache", "sdpa", scale)
        self.reading = reading
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
        """q [b, n, s, d]; k, v [b, m, s, d] -> [b, n, s, d]."""
        if self.reading.places is None:
            self.reserve(k)
            self.keys[:, :, : k.shape[2]], self.values[:, :, : k.shape[2]] = k, v
            return super().forward(q, k, v, mask)
        reading, (rows, kv_heads, tokens, width) = self.reading, k.shape
        at = reading.places[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, at, k)
        self.values.scatter_(2, at, v)
        bias = None if reading.even and mask.plain else reading.bias(mask, q.dtype)
        # The query heads of a group become queries of its one key head: keys are read once and never repeated.
        group = q.shape[1] // kv_heads
        if bias is not None and (tokens > 1 or bias.shape[1] > 1):
            bias = bias.expand(-1, q.shape[1], -1, -1).reshape(rows, kv_heads, group * tokens, -1)
        grouped = q.reshape(rows, kv_heads, group * tokens, width)
        keys, values = self.keys[:, :, : reading.length], self.values[:, :, : reading.length]
        return scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=self.scale).view(q.shape)

    def reserve(self, k: Tensor) -> None:
        """Memory for the rows of k [b, m, s, d], the same as before where it fits. Zeros: 0 x NaN is NaN, also where masked."""
        shape = (k.shape[0], k.shape[1], self.reading.capacity, k.shape[3])
        if self.keys is None or self.keys.shape != shape or self.keys.dtype != k.dtype or self.keys.device != k.device:
            self.keys, self.values = k.new_zeros(shape), k.new_zeros(shape)
            for kept in (self.keys, self.values):
                torch._dynamo.mark_static_address(kept)  # or CUDA graphs would copy it at each step


class Decoder:
    """`with Decoder(model, capacity) as decoder:` read prompts, then step by step.

    Within the block the layers of `model` have cached attention and its head answers for one place of a row alone; at its
    end they are as before. capacity: the most tokens a row may have, prompt and new ones.
    compile: steps run as one compiled graph of fixed shapes (a CUDA graph on accelerators). Compiling takes a minute, once for
    each number of rows: keep the decoder, and it is not repeated.
    """

    def __init__(self, model: nn.Module, capacity: int, *, compile: bool = False):
        self.model, self.fixed = model, compile
        self.reading = Reading(-(-capacity // STEP) * STEP)
        self.cores = {name: CachedAttention(self.reading, layer.attention.core.scale) for name, layer in model.layers.items()}
        self.call = torch.compile(model, dynamic=False, mode="reduce-overhead") if compile else model
        self.device = next(model.parameters()).device
        self.last: Tensor | None = None

    def __enter__(self) -> Decoder:
        layers = self.model.layers
        self.originals = {name: layer.attention.core for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.attention.core = self.cores[name]
        self.hook = self.model.head.register_forward_pre_hook(self._one_place)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()
        for name, layer in self.model.layers.items():
            layer.attention.core = self.originals[name]

    def _one_place(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        """Of hidden states [b, s, h] those that the next token follows from, [b, h]: logits of a whole prompt would be large."""
        x = inputs[0]
        return (x[:, -1] if self.last is None else x[torch.arange(len(x), device=x.device), self.last],)

    @torch.no_grad()
    def read(self, prompts: list[list[int]]) -> Tensor:
        """Read prompts (token ids, at least one each) from the start; returns the logits [b, V] after each one's last token."""
        lengths = [len(prompt) for prompt in prompts]
        self.longest, self.even = max(lengths), len(set(lengths)) == 1
        # Padding stands on the right, where no real token sees it, and is overwritten as the row grows.
        ids = torch.tensor([prompt + [0] * (self.longest - len(prompt)) for prompt in prompts], device=self.device)
        self.places = torch.tensor(lengths, device=self.device)
        self.reading.set(None, self.longest, False)
        self.last = self.places - 1
        try:
            return self.model(ids)
        finally:
            self.last = None

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row, int64 [b]; returns the logits [b, V] after it."""
        self.longest += 1
        plain = self.even and not self.fixed
        whole = self.longest if plain else min(self.reading.capacity, -(-self.longest // STEP) * STEP)
        places = self.places[:, None]
        self.reading.set(places, self.reading.capacity if self.fixed else whole, plain)
        logits = self.call(tokens[:, None], places)
        self.places = self.places + 1
        return logits

    def select(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [any]; a row may come more than once (beams) or not at all (finished)."""
        self.places = self.places[rows]
        for core in self.cores.values():
            core.keys, core.values = core.keys[rows], core.values[rows]
