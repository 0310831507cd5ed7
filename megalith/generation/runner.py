"""A model and its cache: pieces of sequences in, or a token for each row, and logits out.

This is the one place from which generation calls a model, and so the one that decoding over several processes would
replace: its inputs are lists of whole numbers (`Piece`s, tokens, positions), a few bytes that one process can send to
all. Of a placed model each process has a KVCache of its stage's layers and of its rank's key/value heads (`kv_heads`),
runs its stages with the same `cache` argument, hands hidden states to the next, and the process with the head gives
the logits back; the plan and the stages are those of training, whose `Head` returns all logits when called. Context-
and data-parallel processes would each have requests of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import CheckpointError, ConfigError, problem
from megalith.generation.cache import Decode, KVCache, Piece, Prefill

PREFILL_TOKENS = 512  # that are read in one call; a longer piece goes alone
ALIKE = 4  # rows of a CPU's matrix product: in multiples of it a row's result is the same whatever their number


class Runner:
    """Calls of one model on one cache.

    exact: results of a row do not depend on what other rows there are, to the last bit in float32, see `pad`.
    compile: steps run as one compiled graph of fixed shapes (a CUDA graph on accelerators).
    """

    def __init__(self, model: nn.Module, cache: KVCache, *, exact: bool = True, compile: bool = False):
        if not {"cache", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
            rule = "text is written by models whose forward takes cache and logits_to_keep"
            cure = "Add them as megalith/models/gpt.py does"
            raise ConfigError(problem("model", type(model).__name__, rule, cure))
        self.model, self.cache, self.exact, self.whole = model, cache, exact and cache.rows > 1, compile
        self.decoding = Decode(cache)
        self.run = torch.compile(self._decode, dynamic=False, mode="reduce-overhead") if compile else self._decode

    def pad(self, count: int) -> int:
        """How many tokens of nobody's are added to `count`, so that each of these is computed as it always is.

        MKL (2024.2, AVX512) takes other kernels for matrices of one, two and three rows, and with several threads for
        remainders of four; in multiples of four a row's result does not depend on their number. Two and three rows are
        even faster as four; one alone is a third slower, so a cache of one row, where there are no others, does
        without.
        """
        return -count % ALIKE if self.exact and self.cache.device.type == "cpu" else 0

    @torch.no_grad()
    def read(self, pieces: Sequence[Piece], all_logits: bool = False) -> Tensor:
        """Read pieces of sequences of different rows; the logits [n, V] after each one's last token, or after every
        token.
        """
        return checked(torch.cat([self._read(batch, all_logits) for batch in batched(pieces)]))

    def _read(self, pieces: Sequence[Piece], all_logits: bool) -> Tensor:
        ids, source = [i for piece in pieces for i in piece.ids], [i for piece in pieces for i in piece.source]
        pad, source_pad = self.pad(len(ids)), self.pad(len(source))
        view = Prefill(self.cache, pieces, pad, source_pad)
        device, keep, wanted = self.cache.device, None, len(ids)
        tokens = torch.tensor([ids + [0] * pad], device=device)
        if not all_logits:
            ends = torch.tensor([len(piece.ids) for piece in pieces]).cumsum(0) - 1
            wanted = len(pieces)
            keep = torch.cat((ends, ends.new_zeros(self.pad(wanted)))).to(device)
        if not source:
            return self.model(tokens, cache=view, logits_to_keep=keep)[0, :wanted]
        sources = torch.tensor([source + [0] * source_pad], device=device)
        return self.model(sources, decoder_input_ids=tokens, cache=view, logits_to_keep=keep)[0, :wanted]

    @torch.no_grad()
    def step(self, tokens: Sequence[int], positions: Sequence[int], sources: Sequence[int] = ()) -> Tensor:
        """Append tokens to the first rows at these places; the logits [b, V] after them. sources: tokens read by each
        one's encoder.
        """
        count = len(tokens)
        if self.whole:  # every row takes part, so that shapes stay; what rows of nobody write will be written over
            fill = self.cache.rows - count
            tokens, positions = [*tokens, *[0] * fill], [*positions, *[0] * fill]
            sources = [*sources, *[1] * fill] if sources else ()
        pad = self.pad(len(tokens))
        self.decoding.begin(positions, sources, pad, self.whole, self.exact)
        ids = torch.tensor([[token] for token in (*tokens, *[0] * pad)], device=self.cache.device)
        return checked(self.run(ids)[:count])

    def _decode(self, tokens: Tensor) -> Tensor:
        if self.cache.cross:
            return self.model(None, decoder_input_ids=tokens, cache=self.decoding)[:, -1]
        return self.model(tokens, cache=self.decoding)[:, -1]


def checked(logits: Tensor) -> Tensor:
    """The logits; CheckpointError where one is NaN, of which no token and no score could be told."""
    if logits.isnan().any():
        told = "its weights are damaged, or its training had diverged"
        raise CheckpointError(f"the model's logits are not numbers (NaN): {told}.")
    return logits


def batched(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """Pieces for one call each: of at most PREFILL_TOKENS tokens together, or one longer piece alone."""
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        size = max(len(piece.ids), len(piece.source))
        if batch and held + size > PREFILL_TOKENS:
            yield batch
            batch, held = [], 0
        batch.append(piece)
        held += size
    yield batch
