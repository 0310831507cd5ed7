"""What single tokens say: the text of each by itself, and its bytes where it stops within a character."""

from __future__ import annotations

import functools
import re

from megalith.data.tokenizers.other import TikTokenizer, characters_of_bytes
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.generation.stream import REPLACEMENT_CHARACTER


class TokenTexts:
    """The text and the bytes of a tokenizer's tokens. Each is worked out once."""

    def __init__(self, tokenizer: Tokenizer):
        """tokenizer: whose tokens they are."""
        self.tokenizer, self.known = tokenizer, dict[int, tuple[str, bytes]]()
        self.before = tokenizer.encode("0")[-1:]  # decoders strip the space before the first token of a text
        self.text_before = tokenizer.decode(self.before)

    def __call__(self, token: int) -> tuple[str, bytes]:
        """The text and the bytes of a token.

        Bytes that are no whole characters are written bytes:\\xe6\\x9d, a token without a text (one beyond the
        tokenizer's vocabulary) token_id:7.
        """
        if token not in self.known:
            self.known[token] = self._read(token)
        return self.known[token]

    @functools.cached_property
    def names(self) -> list[str]:
        """The vocabulary in id order."""
        return self.tokenizer.tokens()

    def _read(self, token: int) -> tuple[str, bytes]:
        if token >= self.tokenizer.vocab_size:
            return f"token_id:{token}", b""
        text = self.tokenizer.decode([*self.before, token])
        if text.startswith(self.text_before):
            text = text[len(self.text_before) :]
        else:
            text = self.tokenizer.decode([token])
        if REPLACEMENT_CHARACTER in text and (raw := self._bytes(token)) != text.encode():
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw
        text = text or self.names[token]  # of a special token that this tokenizer's texts do not show
        return (text, text.encode()) if text else (f"token_id:{token}", b"")

    def _bytes(self, token: int) -> bytes:
        """The bytes of a token whose text is not all characters."""
        if isinstance(self.tokenizer, TikTokenizer):
            return self.tokenizer.model.decode_single_token_bytes(token)
        name = self.names[token]
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):  # as sentencepiece names single bytes
            return bytes([int(byte[1], 16)])
        try:
            return bytes(map(_bytes_of_characters().__getitem__, name))
        except KeyError:  # not byte-level: the token is the replacement character itself
            return name.encode()


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(characters_of_bytes())}
