"""A model and its cache: chunks of prompts in, or one token for each row, and logits out.

This is the only module of generation that calls a model. Its inputs are whole numbers, which every process of a
parallel model knows, because each runs the same Engine (parallel/runner.py).
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.generation.cache import KVCache
from megalith.generation.cached_attention import DecodeCache, PrefillCache, PrefillChunk

ROW_MULTIPLE = 4  # on CPUs the result for a row is the same in every matrix product whose rows are a multiple of this


class ModelRunner:
    """Calls of one model on one cache.

    batch_invariant: results of a row do not depend on the other rows, to the last bit in float32; see `pad`.
    compile: decoding steps run as one compiled graph of fixed shapes (a CUDA graph on accelerators).
    """

    def __init__(self, model: nn.Module, cache: KVCache, *, batch_invariant: bool = True, compile: bool = False):
        if not {"cache", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
            rule = "must take cache and logits_to_keep in its forward to generate text"
            cure = "Add them as megalith/models/gpt.py does"
            raise ConfigError(problem("The model", Words(f"a {type(model).__name__}"), rule, cure))
        self.model, self.cache, self.compile = model, cache, compile
        self.batch_invariant = batch_invariant and cache.rows > 1
        self.parameters = list(model.parameters())
        self.decoding = DecodeCache(cache, batch_invariant=self.batch_invariant, compiled=compile)
        self.run = self.compiled(self._decode) if compile else self._decode

    def compiled(self, function: Callable, *, collectives: bool = False) -> Callable:
        """A compiled form of a function that decodes. collectives: it has some, which torch's C++ wrapper cannot call
        (2.13).
        """
        options = {"triton.cudagraphs": True} if self.decoding.whole_rows else {"cpp_wrapper": not collectives}
        filter = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        return torch.compile(function, dynamic=False, options={**options, "guard_filter_fn": filter})

    def forward(self, inputs: Tensor | None, **arguments) -> Tensor | None:
        """Call the model and return logits [b, n, V]; None on a process that does not have them."""
        return self.model(inputs, **arguments)

    def broadcast(self, compute: Callable[[], Tensor], shape: tuple[int, ...]) -> Tensor:
        """What `compute` gives, float64 of this shape, on every process; only those that have logits call it."""
        return compute()

    def draw_seed(self) -> int:
        """A seed for a request that has none, at random."""
        return secrets.randbits(63)

    def weights_version(self) -> tuple:
        """What changes when the weights do: PyTorch's versions of them, and, as fused optimizers leave these as they
        are, the first element of each.
        """
        first = torch.stack([each.detach()[(0,) * each.dim()].double() for each in self.parameters])
        return sum(each._version for each in self.parameters), first.tolist()

    def pad(self, count: int) -> int:
        """How many padding tokens are added to `count` tokens, so that the result of each does not depend on `count`.

        MKL (2024.2, AVX512) uses other kernels for matrices of one, two and three rows, and with several threads for
        remainders of four; in multiples of four a row's result does not depend on their number. Two and three rows are
        even faster as four. One alone is a third slower, so a cache of one row, where there are no others, has no
        padding.
        """
        return -count % ROW_MULTIPLE if self.batch_invariant and self.cache.device.type == "cpu" else 0

    @torch.no_grad()
    def prefill(self, chunks: Sequence[PrefillChunk]) -> Tensor | None:
        """Read chunks, those of one row in their order. Returns the logits [n, V] after the last `keep` tokens of each.

        n: the sum of all `keep`.
        """
        ids, source = [i for chunk in chunks for i in chunk.ids], [i for chunk in chunks for i in chunk.source]
        pad, source_pad = self.pad(len(ids)), self.pad(len(source))
        device, kept, end = self.cache.device, list[int](), 0
        for chunk in chunks:
            end += len(chunk.ids)
            kept += range(end - chunk.keep, end)
            self.cache.filled[chunk.row] = chunk.start + len(chunk.ids)
        tokens = torch.tensor([ids + [0] * pad], device=device)
        arguments = {
            "cache": PrefillCache(self.cache, chunks, pad, source_pad),
            "logits_to_keep": torch.tensor(kept + [0] * self.pad(len(kept)), dtype=torch.int64, device=device),
        }
        if source:
            source_ids = torch.tensor([source + [0] * source_pad], device=device)
            logits = self.forward(source_ids, decoder_input_ids=tokens, **arguments)
        else:
            logits = self.forward(tokens, **arguments)
        return None if logits is None else logits[0, : len(kept)]

    @torch.no_grad()
    def decode(
        self, rows: Sequence[int], tokens: Sequence[int], positions: Sequence[int], source_lengths: Sequence[int] = ()
    ) -> Tensor | None:  # fmt: skip
        """Append tokens to rows, ascending, at these positions, and return the logits [b, V] after them.

        source_lengths: how many tokens the encoder of each row has read.
        """
        for row, position in zip(rows, positions):
            self.cache.filled[row] = position + 1
        chosen: slice | Sequence[int] = slice(len(rows))
        if self.decoding.whole_rows:  # all take part; what those without a token write is overwritten later
            chosen, every = rows, range(self.cache.rows)
            index = {row: number for number, row in enumerate(rows)}
            tokens = [tokens[index[row]] if row in index else 0 for row in every]
            positions = [positions[index[row]] if row in index else self.cache.filled[row] for row in every]
            if source_lengths:
                source_lengths = [source_lengths[index[row]] if row in index else 1 for row in every]
            rows = every
        pad = self.padded_rows(len(tokens)) - len(tokens)
        self.decoding.begin(rows, positions, source_lengths, pad)
        ids = torch.tensor([[token] for token in (*tokens, *[0] * pad)], device=self.cache.device)
        logits = self.run(ids)
        return None if logits is None else logits[chosen]

    def warm_up(self) -> None:
        """Compile the steps of all numbers of rows, so that no request waits for it. The cache must be unused."""
        count = 1
        while self.compile and count <= self.cache.rows:
            for _ in range(3):  # CUDA graphs are recorded in the second call and replayed from the third
                self.decode(range(count), [0] * count, [0] * count, [1] * count if self.cache.encoder_decoder else ())
            count = self.cache.rows if count < self.cache.rows < 2 * count else 2 * count
        self.cache.filled = [0] * self.cache.rows

    def padded_rows(self, count: int) -> int:
        """How many rows a step of `count` rows computes. A compiled step: a power of two, to compile few shapes."""
        if not self.compile or self.decoding.whole_rows:
            return count + self.pad(count)
        rows = 1 << (count - 1).bit_length()
        return max(rows, ROW_MULTIPLE) if self.batch_invariant else rows

    def _decode(self, tokens: Tensor) -> Tensor | None:
        if self.cache.encoder_decoder:
            logits = self.forward(None, decoder_input_ids=tokens, cache=self.decoding)
        else:
            logits = self.forward(tokens, cache=self.decoding)
        return None if logits is None else logits[:, -1]
