"""Incremental detokenization: no half characters, and no text that may yet turn out to be a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from megalith.data.tokenizers.tokenizer import Tokenizer

REPLACEMENT_CHARACTER = "\ufffd"  # decoding gives it for the bytes of an incomplete character


class TextStream:
    """The continuation of one row. `push` and `finish` return pieces of text, whose concatenation is `text`.

    The text is what decoding all tokens together adds to that of the prompt, up to the stop text that is complete at
    the earliest character (of several the longest). It depends on the tokens alone, and not on who reads it when.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        """prompt: the tokens before, which decoders need as context: they strip the space at the start of a text.

        stops: texts that end the row, each of at least one character; they are not part of the continuation.
        """
        self.tokenizer, self.stops, self.ids = tokenizer, list(stops), list(prompt)
        # Decoding starts at `start`; the text of the tokens before `end` is `known`, and is released; of that of the
        # tokens from `end` on, which stop within a character, so is `partial`.
        self.start, self.end, self.known, self.partial = 0, len(self.ids), self.tokenizer.decode(self.ids), ""
        self.text, self.held, self.stopped = "", "", False

    def push(self, token: int, may_stop: bool = True) -> str:
        """Add `token` and return the text that is now certain; sets `stopped` where a stop text is complete.

        may_stop: whether a stop text may begin in the text of this token.
        """
        self.ids.append(token)
        return self._release(self._decode_new(final=False), final=not may_stop, stops=self.stops if may_stop else ())

    def finish(self) -> str:
        """The text that was held back, at the end of the row; a stop text in it sets `stopped`."""
        return "" if self.stopped else self._release(self._decode_new(final=True), final=True, stops=self.stops)

    def _decode_new(self, final: bool) -> str:
        new, known = self.tokenizer.decode(self.ids[self.start :]), self.known
        if not new.startswith(known):  # the prompt ended within a character
            known = known.rstrip(REPLACEMENT_CHARACTER)
        if new.startswith(known):
            new = new[len(known) :]
        else:  # some decoders give up all characters of a run of bytes while the last one is incomplete
            new = self.tokenizer.decode(self.ids[self.end :])
        certain = new if final else new.rstrip(REPLACEMENT_CHARACTER)
        piece = certain[len(self.partial) :]
        self.partial = certain if piece else self.partial
        if new and certain == new:
            if new.strip(" "):  # spaces alone are no context, because decoders strip them
                self.start = self.end
            self.end, self.known, self.partial = len(self.ids), self.tokenizer.decode(self.ids[self.start :]), ""
        return piece

    def _release(self, new: str, final: bool, stops: Sequence[str]) -> str:
        """Take new text and return what of the held text no stop text can begin in; final: all of it."""
        self.held += new
        found = [(self.held.find(stop) + len(stop), -len(stop)) for stop in stops if stop in self.held]
        if found:
            end, length = min(found)
            self.stopped, keep = True, end + length
        elif final:
            keep = len(self.held)
        else:
            keep = len(self.held) - max((self._overlap(stop) for stop in stops), default=0)
        piece, self.held = self.held[:keep], self.held[keep:]
        self.text += piece
        return piece

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of the held text may be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
