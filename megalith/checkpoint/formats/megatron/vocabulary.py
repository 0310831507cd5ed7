"""How many rows of a Megatron embedding belong to tokens: the rest is padding."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import CheckpointError, problem
from megalith.config.megatron.counts import embedding_rows, padded_vocabulary
from megalith.config.sections.data import too_many_tokens

IF_WRONG_GIVE = "; nothing is to be done if that is right, else give "  # the end of notes, before the name of a flag
NO_ACTION_NEEDED = "; nothing is to be done"
WORDPIECE_EXTRAS = ("[BOS]", "[EOS]")  # Megatron's WordPiece tokenizers append them to a vocabulary that lacks them
TOKENIZER_SIZES = {  # tokenizers that have only one size, with the tokens that they add
    "GPT2BPETokenizer": 50257,
    "BertWordPieceLowerCase": 30522 + len(WORDPIECE_EXTRAS),
    "BertWordPieceCase": 28996 + len(WORDPIECE_EXTRAS),
}


def true_vocab_size(
    args: Mapping[str, Any],
    padded: int,
    ranks: int,
    overrides: Mapping[str, Any],
    notes: list[str],
    tokenizer_size: int | None = None,
) -> int:
    """The true size of the vocabulary: the stated one, or the tokenizer's, or the padded size with a note.

    args: Megatron's arguments. padded: rows of the embedding, of all `ranks` together. tokenizer_size: tokens of the
    tokenizer that is converted too. Raises CheckpointError where the stated size is larger than the embedding.
    """
    kind, divisor = args.get("tokenizer_type"), args.get("make_vocab_size_divisible_by") or 128
    if size := overrides.get("vocab_size"):
        return _check_fits(int(size), padded, "--vocab-size", size)
    if size := args.get("orig_vocab_size"):
        if padded != (expected := padded_vocabulary(int(size), divisor, ranks)) and args.get(
            "make_vocab_size_divisible_by"
        ):
            text = f"as the arguments say (orig_vocab_size), though Megatron pads that to {expected}"
            notes.append(f"vocabulary: {size} of {padded} rows, {text}{IF_WRONG_GIVE}--vocab-size")
        return _check_fits(int(size), padded, "orig_vocab_size of the arguments", size)
    if size := args.get("vocab_size"):
        rows = _check_fits(
            embedding_rows(int(size), kind), padded, f"vocab_size of the arguments, with the tokenizer {kind}", size
        )
        if padded != (expected := padded_vocabulary(rows, divisor, ranks)):
            notes.append(
                f"vocabulary: {rows} of {padded} rows, as the arguments say (vocab_size {size}, {kind}), though "
                f"Megatron pads that to {expected}{IF_WRONG_GIVE}--vocab-size"
            )
        return rows
    if size := _vocab_file_size(overrides.get("vocab_file"), args, padded, notes):
        if size > padded:
            raise CheckpointError(f"--vocab-file {overrides['vocab_file']}: {too_many_tokens(size, padded)}.")
        return size
    if tokenizer_size is not None and tokenizer_size <= padded:
        notes.append(
            f"vocabulary: {tokenizer_size} of {padded} rows, the size of the tokenizer that is converted too"
            f"{IF_WRONG_GIVE}--vocab-size"
        )
        return tokenizer_size
    if size := _vocab_file_size(args.get("vocab_file"), args, padded, notes):
        return _check_fits(size, padded, "vocab_file of the arguments", size)
    candidates = {kind: TOKENIZER_SIZES[kind]} if kind in TOKENIZER_SIZES else TOKENIZER_SIZES if not args else {}
    for name, size in candidates.items():
        size += args.get("vocab_extra_ids") or 0
        if padded == padded_vocabulary(size, divisor, ranks):
            notes.append(f"vocabulary: {size} of {padded} rows, the size of a {name}{IF_WRONG_GIVE}--vocab-size")
            return size
    notes.append(
        f"vocabulary: the true size is not in the file; all {padded} rows are kept (padding among them)"
        f"{NO_ACTION_NEEDED}, but --vocab-size removes the padding"
    )
    return padded


def _check_fits(rows: int, padded: int, what: str, found: Any) -> int:
    if rows > padded:
        rule = f"must fit into the {padded} rows of the embedding" + (f", and needs {rows}" if rows != found else "")
        cure = "Give the true size, --vocab-size, which is at most that of the padded one"
        raise CheckpointError(problem(what, found, rule, cure))
    return rows


def _vocab_file_size(file: Any, args: Mapping[str, Any], padded: int, notes: list[str]) -> int | None:
    """The number of tokens in a vocabulary file (a JSON object, or one token a line), with those the tokenizer adds.

    None where the file is not on this machine, or of another type.
    """
    path = pathlib.Path(str(file)) if file else None
    if path is None or not path.is_file() or path.suffix not in (".json", ".txt"):
        return None
    try:
        text = path.read_text(encoding="utf-8")
        ids = (
            json.loads(text)
            if path.suffix == ".json"
            else {line.strip(): i for i, line in enumerate(text.splitlines())}
        )
        count, extra = 1 + max(ids.values()), args.get("vocab_extra_ids") or 0
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            problem("--vocab-file", str(path), f"cannot be read ({error})", "Name vocab.json or vocab.txt")
        ) from None
    added = [token for token in WORDPIECE_EXTRAS if path.suffix == ".txt" and token not in ids]
    if count + len(added) + extra > padded:  # Megatron's first releases did not add them
        added = []
    size = count + len(added) + extra
    notes.append(
        f"vocabulary: {size} tokens, as {path} has"
        + f" with {' and '.join(added)}, which the tokenizer adds" * bool(added)
        + NO_ACTION_NEEDED
    )
    return size
