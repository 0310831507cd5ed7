"""Text from tokens as they come: no half characters, and nothing that may yet turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.data.tokenizers.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoding gives for the bytes of a character that is not complete


class TextStream:
    """One row's continuation. `push` and `finish` return pieces whose concatenation is `text`."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        """prompt: the tokens before, of which the last few are the context. stops: texts that end the row and are left out."""
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.ids = list(prompt[-8:])  # decoders treat the start of a text in a special way: decode with some context
        self.start, self.told = 0, len(self.ids)  # ids before `told` are decoded; decoding restarts at `start`
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int) -> str:
        """The text that is certain now that `token` came; sets `stopped` where a stop text is complete."""
        self.ids.append(token)
        return self._release(self._decoded(final=False), final=False)

    def finish(self) -> str:
        """What was held back, at the end of the row."""
        return "" if self.stopped else self._release(self._decoded(final=True), final=True)

    def _decoded(self, final: bool) -> str:
        known = self.tokenizer.decode(self.ids[self.start : self.told])
        longer = self.tokenizer.decode(self.ids[self.start :])
        if len(longer) <= len(known) or (longer.endswith(UNFINISHED) and not final):
            return ""
        self.start, self.told = self.told, len(self.ids)
        return longer[len(known) :]

    def _release(self, new: str, final: bool) -> str:
        self.held += new
        ends = [at for at in (self.held.find(stop) for stop in self.stops) if at >= 0]
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
