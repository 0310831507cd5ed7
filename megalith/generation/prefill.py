"""Reading prompts into the cache, chunk by chunk beside the decoding of others, and what is shared only once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from megalith.common.errors import CheckpointError, MegalithError
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.logprobs import measure, top_of
from megalith.generation.prefix import Prompt
from megalith.generation.request import PromptLogprobs, Request
from megalith.generation.runner import ModelRunner


class Reading(Protocol):
    """A request whose prompt is read."""

    id: int
    request: Request
    prompt: Prompt
    row: int
    prompt_logprobs: PromptLogprobs
    error: MegalithError | None


Active = TypeVar("Active", bound=Reading)


class Prefill(Generic[Active]):
    """The requests whose prompts are being read, and what each row of the cache holds of a prompt.

    A row keeps its prompt when its request has ended, until another request gets the row.
    """

    def __init__(self, runner: ModelRunner, tokens: int, prefix_caching: bool, decoder_start: Callable[[], int]):
        """tokens: most tokens read in a step, at least one chunk. prefix_caching: whether what rows hold is used again.

        decoder_start: gives the token with which an encoder-decoder's decoder starts.
        """
        self.prefix_caching = prefix_caching
        self.runner, self.cache, self.tokens, self.decoder_start = runner, runner.cache, tokens, decoder_start
        self.encoder_decoder = runner.cache.encoder_decoder
        self.reading: list[Active] = []  # in order of arrival
        self.prompts: list[Prompt | None] = [None] * runner.cache.rows
        self.weights = runner.weights_version()

    def forget_if_trained(self) -> None:
        """Forget all prompts where the weights have changed since they were read; before requests are admitted."""
        if self.prefix_caching and (version := self.runner.weights_version()) != self.weights:
            self.prompts, self.weights = [None] * self.cache.rows, version

    def admit(self, active: Active, length: int, source_length: int) -> None:
        """Give a request a row of the cache: of the free ones the one that holds the most of its prompt."""
        shared, place = max((self._shared(active, row), -place) for place, row in enumerate(self.cache.free))
        row = self.cache.free[-place]
        kept = (shared, 0) if not self.encoder_decoder else (1, len(active.prompt.ids)) if shared else (0, 0)
        if self.runner.decoding.whole_rows:  # read by every step
            length, source_length = self.cache.length, self.cache.source_length
        active.row = self.cache.add(active.id, length, source_length, row, kept)
        if (held := self.prompts[row]) is not None:
            self._take(active, held, shared)
        self.prompts[row] = active.prompt
        self._copy(active)
        self.reading.append(active)

    def read(self) -> None:
        """Read the next chunks of prompts, in order of arrival. Those that cannot be scored get an `error`.

        An error raised leaves the prompts that were being read unusable: `drop` their requests.
        """
        chunks, readers = self._next_chunks()
        if chunks:
            logits = self.runner.prefill(chunks)
            first = 0
            for chunk, active in zip(chunks, readers):
                kept = None if logits is None else logits[first : first + chunk.keep]
                first += chunk.keep
                active.prompt.filled = len(active.prompt.ids) if chunk.source else chunk.start + len(chunk.ids)
                if active.prompt.complete and kept is not None:
                    active.prompt.logits = kept[-1].clone()  # not a view, which would keep the others alive
                if active.request.params.prompt_logprobs:
                    try:
                        self._score(active, chunk, kept)
                    except CheckpointError as error:  # on all processes of the model
                        active.error = error
            for active in self.reading:
                self._copy(active)

    def complete(self) -> list[Active]:
        """The requests whose prompts have been read."""
        return [active for active in self.reading if active.prompt.complete]

    def drop(self, active: Active) -> None:
        """Forget what was read of a request's prompt."""
        self.prompts[active.row] = None

    def _next_chunks(self) -> tuple[list[PrefillChunk], list[Active]]:
        chunks, readers, budget = list[PrefillChunk](), list[Active](), self.tokens
        for number, active in enumerate(self.reading):
            prompt, filled = active.prompt, active.prompt.filled
            others = self.reading[:number] if self._shares(active) else ()
            if any(prompt.shared(other.prompt, len(other.prompt.ids)) > filled for other in others):
                continue  # wait until that one has been read
            while filled < len(prompt.ids):
                end = prompt.chunk_end(filled)
                if chunks and end - filled > budget:
                    break
                chunks.append(self._chunk(active, filled, end))
                readers.append(active)
                budget, filled = budget - (end - filled), end
        return chunks, readers

    def _chunk(self, active: Active, start: int, end: int) -> PrefillChunk:
        ids = active.prompt.ids
        if self.encoder_decoder:
            return PrefillChunk(active.row, [self.decoder_start()], source=ids)
        keep = end - start if active.request.params.prompt_logprobs else int(end == len(ids))
        return PrefillChunk(active.row, ids[start:end], start, keep=keep)

    def _shared(self, active: Active, row: int) -> int:
        """How many tokens of a request's prompt a row holds."""
        held = self.prompts[row]
        return active.prompt.shared(held, held.filled) if held is not None and self._shares(active) else 0

    def _shares(self, active: Active) -> bool:
        # Log-probabilities of the prompt need the logits of all of it.
        return self.prefix_caching and not active.request.params.prompt_logprobs

    def _copy(self, active: Active) -> None:
        """Copy from another row what that holds of a request's prompt beyond what has been read."""
        shared, row = max((self._shared(active, row), row) for row in range(self.cache.rows))
        held = self.prompts[row]
        if shared > active.prompt.filled and held is not None:
            # Of an encoder-decoder the row also holds the decoder's start token.
            self.cache.copy(row, active.row, 1 if self.encoder_decoder else shared)
            self._take(active, held, shared)

    def _take(self, active: Active, held: Prompt, shared: int) -> None:
        active.prompt.filled = shared
        if active.prompt.complete:
            active.prompt.logits = held.logits

    def _score(self, active: Active, chunk: PrefillChunk, logits: Tensor | None) -> None:
        """Append the log-probabilities of the tokens after those of a chunk; logits [its tokens, V]."""
        labels: Sequence[int] = active.prompt.ids[chunk.start + 1 : chunk.start + len(chunk.ids) + 1]
        top, found = active.request.params.top_logprobs, active.prompt_logprobs
        if not labels:  # the prompt's last token alone
            return

        def compute() -> Tensor:
            assert logits is not None
            return measure(logits[: len(labels)], torch.tensor(labels, device=logits.device), top)

        for row in self.runner.broadcast(compute, (len(labels), 1 + 2 * top)).tolist():
            found.logprobs.append(row[0])
            if top:
                found.top.append(top_of(row, top))
