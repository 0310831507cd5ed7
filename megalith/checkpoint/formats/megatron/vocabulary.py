"""How many rows of a Megatron embedding are words: the rest is padding."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import CheckpointError, problem
from megalith.config.megatron.counts import padded_vocabulary, rows_asked
from megalith.config.sections.data import too_many_words

IF_RIGHT = "; nothing is to be done if that is right, else give "  # how notes end
NOTHING = "; nothing is to be done"
ADDED = ("[BOS]", "[EOS]")  # what Megatron's WordPiece tokenizers put behind a vocabulary that lacks them
SIZES = {  # tokenizers of one size only, with what they add
    "GPT2BPETokenizer": 50257, "BertWordPieceLowerCase": 30522 + len(ADDED), "BertWordPieceCase": 28996 + len(ADDED),
}  # fmt: skip


def true_size(
    args: Mapping[str, Any],
    padded: int,
    ranks: int,
    overrides: Mapping[str, Any],
    notes: list[str],
    given: int | None = None,
) -> int:
    """The true size of the vocabulary: what is said, or what the tokenizer has, or the padded size with a note.

    args: Megatron's. padded: rows of the embedding, of all `ranks` together. given: tokens of the tokenizer that goes along.
    Raises CheckpointError where more is said than there is.
    """
    kind, divisor = args.get("tokenizer_type"), args.get("make_vocab_size_divisible_by") or 128
    if size := overrides.get("vocab_size"):
        return _within(int(size), padded, "--vocab-size", size)
    if size := args.get("orig_vocab_size"):
        if padded != (expected := padded_vocabulary(int(size), divisor, ranks)) and args.get(
            "make_vocab_size_divisible_by"
        ):
            text = f"as the arguments say (orig_vocab_size), though Megatron pads that to {expected}"
            notes.append(f"vocabulary: {size} of {padded} rows, {text}{IF_RIGHT}--vocab-size")
        return _within(int(size), padded, "orig_vocab_size of the arguments", size)
    if size := args.get("vocab_size"):
        rows = _within(
            rows_asked(int(size), kind), padded, f"vocab_size of the arguments, with the tokenizer {kind}", size
        )
        if padded != (expected := padded_vocabulary(rows, divisor, ranks)):
            notes.append(
                f"vocabulary: {rows} of {padded} rows, as the arguments say (vocab_size {size}, {kind}), though Megatron pads that to "
                f"{expected}{IF_RIGHT}--vocab-size"
            )
        return rows
    if words := _words(overrides.get("vocab_file"), args, padded, notes):
        if words > padded:
            raise CheckpointError(f"--vocab-file {overrides['vocab_file']}: {too_many_words(words, padded)}.")
        return words
    if given is not None and given <= padded:
        notes.append(
            f"vocabulary: {given} of {padded} rows, the size of the tokenizer that goes along{IF_RIGHT}--vocab-size"
        )
        return given
    if words := _words(args.get("vocab_file"), args, padded, notes):
        return _within(words, padded, "vocab_file of the arguments", words)
    candidates = {kind: SIZES[kind]} if kind in SIZES else SIZES if not args else {}
    for name, size in candidates.items():
        size += args.get("vocab_extra_ids") or 0
        if padded == padded_vocabulary(size, divisor, ranks):
            notes.append(f"vocabulary: {size} of {padded} rows, the size of a {name}{IF_RIGHT}--vocab-size")
            return size
    notes.append(
        f"vocabulary: the true size is not in the file; all {padded} rows are kept (padding among them){NOTHING}, but --vocab-size cuts it"
    )
    return padded


def _within(rows: int, padded: int, said: str, found: Any) -> int:
    if rows > padded:
        rule = f"the embedding has {padded} rows" + (f", and {rows} are needed" if rows != found else "")
        raise CheckpointError(
            problem(said, found, rule, "Give the true size, --vocab-size, which is at most that of the padded one")
        )
    return rows


def _words(file: Any, args: Mapping[str, Any], padded: int, notes: list[str]) -> int | None:
    """The words of a vocabulary file (a JSON object, or one word a line), if it is on this machine, with what the tokenizer adds."""
    path = pathlib.Path(str(file)) if file else None
    if path is None or not path.is_file() or path.suffix not in (".json", ".txt"):
        return None
    try:
        text = path.read_text(encoding="utf-8")
        words = (
            json.loads(text)
            if path.suffix == ".json"
            else {line.strip(): i for i, line in enumerate(text.splitlines())}
        )
        count, extra = 1 + max(words.values()), args.get("vocab_extra_ids") or 0
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            problem("--vocab-file", str(path), f"it cannot be read ({error})", "Name vocab.json or vocab.txt")
        ) from None
    added = [word for word in ADDED if path.suffix == ".txt" and word not in words]
    if count + len(added) + extra > padded:  # Megatron's first releases did not add them
        added = []
    size = count + len(added) + extra
    notes.append(
        f"vocabulary: {size} words, as {path} has"
        + f" with {' and '.join(added)}, which the tokenizer adds" * bool(added)
        + NOTHING
    )
    return size
