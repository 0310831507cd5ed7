"""A sentencepiece .model as a tokenizer of the library `tokenizers`, for transformers: Unigram or BPE of its pieces."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words

# Field numbers of sentencepiece_model.proto: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
PIECES, TRAINER, NORMALIZER = 1, 2, 3
MODEL_TYPE, SUFFIX, BYTE_FALLBACK = 3, 24, 35  # of the trainer
CHARSMAP, DUMMY_PREFIX, EXTRA_SPACES, ESCAPED = 2, 3, 4, 5  # of the normalizer
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4  # types of a piece
UNREACHABLE_SCORE = -10_000.0  # the score of pieces that no text gives: control pieces, single bytes
NO_CHARACTER = "\ufffe"
SPACE = "\u2581"


def from_sentencepiece_model(data: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a .model file's content.

    Raises DataError for kinds that the library does not know (words, characters).
    """
    model = dict[int, list[Any]]()
    for field, value in _fields(data):
        model.setdefault(field, []).append(value)
    trainer, rules = (dict(_fields(model.get(part, [b""])[0])) for part in (TRAINER, NORMALIZER))
    kind = trainer.get(MODEL_TYPE, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or trainer.get(SUFFIX) or not rules.get(ESCAPED, 1):
        rule = (
            "must be Unigram or BPE that mark the space before a word, because the library tokenizers knows no others"
        )
        raise DataError(problem("A sentencepiece model", Words(f"model_type {kind}"), rule, "Use it through megalith"))
    pieces = [_piece(value) for value in model[PIECES]]
    unknown = next((i for i, (_, _, kind) in enumerate(pieces) if kind == UNKNOWN), None)
    user_defined = [name for name, _, kind in pieces if kind == USER_DEFINED]
    fallback = bool(trainer.get(BYTE_FALLBACK, 0))
    if kind == UNIGRAM:
        scored = [
            (name, score if kind in (NORMAL, USER_DEFINED) else UNREACHABLE_SCORE) for name, score, kind in pieces
        ]
        backend = tokenizers.Tokenizer(models.Unigram(scored, unk_id=unknown, byte_fallback=fallback))
    else:
        vocabulary = {name: i for i, (name, _, _) in enumerate(pieces)}
        unk = None if unknown is None else pieces[unknown][0]
        merges = list(_merges([(name, score) for name, score, kind in pieces if kind == NORMAL], vocabulary))
        backend = tokenizers.Tokenizer(
            models.BPE(vocabulary, merges, unk_token=unk, fuse_unk=True, byte_fallback=fallback)
        )
    prefix = rules.get(DUMMY_PREFIX, 1)
    hidden_pieces = (
        [name for name, _, kind in pieces if kind not in (NORMAL, USER_DEFINED)]
        if kind == UNIGRAM and not fallback
        else []
    )
    backend.normalizer = normalizers.Sequence(
        [*_normalizer(rules, user_defined), *_break_hidden_pieces(hidden_pieces, {name for name, _, _ in pieces})]
    )
    # Found before all others
    backend.add_tokens([AddedToken(name, normalized=True, special=False) for name in user_defined])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return backend


def _break_hidden_pieces(hidden_pieces: list[str], known: set[str]) -> Iterator[Any]:
    """Keep a text from giving control pieces where unknown characters, which merge, spell them.

    One more unknown character is put inside.
    """
    for name in hidden_pieces:
        if cut := next((i for i, character in enumerate(name, 1) if character not in known), 0):
            yield normalizers.Replace(name, f"{name[:cut]}{NO_CHARACTER}{name[cut:]}")


def _normalizer(rules: dict[int, Any], user_defined: list[str]) -> list[Any]:
    """What sentencepiece does to a text before it looks for pieces.

    The library also applies it to the `user_defined` tokens, which get no mark for the space.
    """
    steps: list[Any] = [normalizers.Precompiled(rules[CHARSMAP])] if rules.get(CHARSMAP) else []
    if rules.get(EXTRA_SPACES, 1):
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), "")]
    if rules.get(DUMMY_PREFIX, 1):
        if user_defined:
            excluded = "|".join(re.escape(name) for name in user_defined)
            steps.append(normalizers.Replace(Regex(rf"\A(?!(?:{excluded})\z)(?=[\s\S])"), SPACE))
        else:
            steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _merges(scored: list[tuple[str, float]], vocabulary: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Each way to cut a piece in two, the pieces of the highest score first."""
    for name, _ in sorted(scored, key=lambda piece: -piece[1]):
        cuts = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        yield from sorted(
            (cut for cut in cuts if set(cut) <= vocabulary.keys()),
            key=lambda cut: (vocabulary[cut[0]], vocabulary[cut[1]]),
        )


def _piece(data: bytes) -> tuple[str, float, int]:
    """Name, score and type of a piece."""
    fields = dict(_fields(data))
    return fields.get(1, b"").decode("utf-8"), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of the fields of a protobuf message: integers, or else bytes (protobuf.dev, Encoding)."""
    offset = 0

    def number() -> int:
        nonlocal offset
        value = shift = 0
        while True:
            byte = data[offset]
            offset += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while offset < len(data):
        key = number()
        if key & 7 == 0:
            yield key >> 3, number()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or number()
        yield key >> 3, data[offset : offset + size]
        offset += size
