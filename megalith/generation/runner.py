"""A model and its cache: prompt chunks in, or one token for each row, and logits out.

This is the only module of generation that calls a model, and so the one that decoding over several processes would
replace. Its inputs are lists of whole numbers (`PrefillChunk`s, tokens, positions), a few bytes that one process can
send to all. For a parallel model each process has a KVCache of its stage's layers and of its rank's key/value heads
(`kv_heads`). It runs its stages with the same `cache` argument and sends hidden states to the next stage; the process
with the head returns the logits. The sharding plan and the stages are those of training, whose `Head` returns all
logits when called. Context- and data-parallel processes would each have their own requests.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.config.flags.text import Words
from megalith.generation.cache import DecodeCache, KVCache, PrefillCache, PrefillChunk

PREFILL_TOKENS = 512  # read in one call; a longer chunk has a call of its own
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
        self.model, self.cache, self.fixed_shapes = model, cache, compile
        self.batch_invariant = batch_invariant and cache.rows > 1
        self.decoding = DecodeCache(cache)
        self.run = torch.compile(self._decode, dynamic=False, mode="reduce-overhead") if compile else self._decode

    def pad(self, count: int) -> int:
        """How many padding tokens are added to `count` tokens, so that the result of each does not depend on `count`.

        MKL (2024.2, AVX512) uses other kernels for matrices of one, two and three rows, and with several threads for
        remainders of four; in multiples of four a row's result does not depend on their number. Two and three rows are
        even faster as four. One alone is a third slower, so a cache of one row, where there are no others, has no
        padding.
        """
        return -count % ROW_MULTIPLE if self.batch_invariant and self.cache.device.type == "cpu" else 0

    @torch.no_grad()
    def prefill(self, chunks: Sequence[PrefillChunk], all_logits: bool = False) -> Tensor:
        """Read chunks of different rows and return the logits [n, V] after the last token of each, or after every token
        of all.
        """
        return check_logits(torch.cat([self._prefill(batch, all_logits) for batch in batch_chunks(chunks)]))

    def _prefill(self, chunks: Sequence[PrefillChunk], all_logits: bool) -> Tensor:
        ids, source = [i for chunk in chunks for i in chunk.ids], [i for chunk in chunks for i in chunk.source]
        pad, source_pad = self.pad(len(ids)), self.pad(len(source))
        view = PrefillCache(self.cache, chunks, pad, source_pad)
        device, keep, count = self.cache.device, None, len(ids)
        tokens = torch.tensor([ids + [0] * pad], device=device)
        if not all_logits:
            ends = torch.tensor([len(chunk.ids) for chunk in chunks]).cumsum(0) - 1
            count = len(chunks)
            keep = torch.cat((ends, ends.new_zeros(self.pad(count)))).to(device)
        if not source:
            return self.model(tokens, cache=view, logits_to_keep=keep)[0, :count]
        source_ids = torch.tensor([source + [0] * source_pad], device=device)
        return self.model(source_ids, decoder_input_ids=tokens, cache=view, logits_to_keep=keep)[0, :count]

    @torch.no_grad()
    def decode(self, tokens: Sequence[int], positions: Sequence[int], source_lengths: Sequence[int] = ()) -> Tensor:
        """Append tokens to the first rows, at these positions, and return the logits [b, V] after them.

        source_lengths: how many tokens the encoder of each row has read.
        """
        count = len(tokens)
        if self.fixed_shapes:  # all rows take part, so that shapes stay; what unused rows write is overwritten later
            fill = self.cache.rows - count
            tokens, positions = [*tokens, *[0] * fill], [*positions, *[0] * fill]
            source_lengths = [*source_lengths, *[1] * fill] if source_lengths else ()
        pad = self.pad(len(tokens))
        self.decoding.begin(positions, source_lengths, pad, self.fixed_shapes, self.batch_invariant)
        ids = torch.tensor([[token] for token in (*tokens, *[0] * pad)], device=self.cache.device)
        return check_logits(self.run(ids)[:count])

    def _decode(self, tokens: Tensor) -> Tensor:
        if self.cache.cross:
            return self.model(None, decoder_input_ids=tokens, cache=self.decoding)[:, -1]
        return self.model(tokens, cache=self.decoding)[:, -1]


def check_logits(logits: Tensor) -> Tensor:
    """Return the logits. Raises CheckpointError where one is NaN: no token and no score could be computed from it."""
    if logits.isnan().any():
        cause = "its weights are damaged, or its training had diverged"
        raise CheckpointError(f"the model's logits are not numbers (NaN): {cause}.")
    return logits


def batch_chunks(chunks: Sequence[PrefillChunk]) -> Iterator[list[PrefillChunk]]:
    """The chunks of each call: at most PREFILL_TOKENS tokens together, or one longer chunk alone."""
    batch: list[PrefillChunk] = []
    count = 0
    for chunk in chunks:
        size = max(len(chunk.ids), len(chunk.source))
        if batch and count + size > PREFILL_TOKENS:
            yield batch
            batch, count = [], 0
        batch.append(chunk)
        count += size
    yield batch
