"""What the rows of a cache hold of prompts, so that the prompt, or the beginning, that two requests share is read once.

Prompts are read in chunks whose ends are multiples of CHUNK from the prompt's start, whoever else is being read: a
chunk's keys and values are then the same to the last bit in all requests that begin with the same tokens.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor

CHUNK = 128  # tokens


@dataclasses.dataclass(eq=False)
class Prompt:
    """A prompt in a row of the cache. filled: how many of its tokens have been read.

    whole: an encoder reads it, and every token sees all others, so that it is shared as a whole or not at all.
    logits: [V] after its last token, once that has been read, on a process that has logits.
    """

    ids: tuple[int, ...]
    whole: bool = False
    filled: int = 0
    logits: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether all of it has been read."""
        return self.filled == len(self.ids)

    def chunk_end(self, start: int) -> int:
        """Where the chunk that begins at `start` ends."""
        return len(self.ids) if self.whole else min(start // CHUNK * CHUNK + CHUNK, len(self.ids))

    def shared(self, other: Prompt, filled: int) -> int:
        """How many tokens, from the start, need not be read again where `filled` tokens of `other` have been read."""
        if filled == len(other.ids) and self.ids == other.ids:
            return filled
        count, limit = 0, 0 if self.whole else min(filled, len(self.ids) - 1)
        while count + CHUNK <= limit and self.ids[count : count + CHUNK] == other.ids[count : count + CHUNK]:
            count += CHUNK
        return count
