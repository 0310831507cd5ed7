"""Incremental detokenization: no half characters, and no text that may yet turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.data.tokenizers.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # decoding gives it for the bytes of an incomplete character


class TextStream:
    """The continuation of one row. `push` and `finish` return pieces of text, whose concatenation is `text`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        """prompt: the tokens before, of which the last few are the context. stops: texts that end the row.

        A stop text is not part of the continuation.
        """
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ids = list(prompt[-8:])  # decoders treat the start of a text in a special way: decode with some context
        # The text of the ids before `read_offset` has been decoded; decoding starts again from `prefix_offset`.
        self.prefix_offset, self.read_offset = 0, len(self.ids)
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """Add `token` and return the text that is now certain; sets `stopped` where a stop text is complete."""
        self.ids.append(token)
        return self._release(self._decode_new(final=False), final=False)

    def finish(self) -> str:
        """The text that was held back, at the end of the row."""
        return "" if self.stopped else self._release(self._decode_new(final=True), final=True)

    def _decode_new(self, final: bool) -> str:
        known = self.tokenizer.decode(self.ids[self.prefix_offset : self.read_offset])
        longer = self.tokenizer.decode(self.ids[self.prefix_offset :])
        if len(longer) <= len(known) or (longer.endswith(REPLACEMENT_CHARACTER) and not final):
            return ""
        self.prefix_offset, self.read_offset = self.read_offset, len(self.ids)
        return longer[len(known) :]

    def _release(self, new: str, final: bool) -> str:
        self.held += new
        ends = [index for index in (self.held.find(stop) for stop in self.stops) if index >= 0]
        if ends:
            self.stopped, keep = True, min(ends)
        elif final:
            keep = len(self.held)
        else:
            keep = len(self.held) - max((self._overlap(stop) for stop in self.stops), default=0)
        piece, self.held = self.held[:keep], self.held[keep:]
        self.text += piece
        return piece

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
