"""The tokenizer that a command names instead of that of the weights: a folder, or files by Megatron's flags."""

from __future__ import annotations

import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words, choose, flag
from megalith.config.sections.data import MADE_FROM, TOKENIZER_FILES, TOKENIZERS, DataConfig, too_many_tokens
from megalith.data.tokenizers.tokenizer import (
    RECORD,
    WORDPIECE_TYPES,
    Tokenizer,
    load_tokenizer,
    saved_options,
    tokenizer_from_config,
)

FIELDS = ("tokenizer_type", *TOKENIZER_FILES)


class TokenizerOverride:
    """A folder of tokenizer files (as --tokenizer), or {field of the config: value} of the files and their type.

    notes: what was inferred, once it is built. Raises ConfigError for both a folder and files, and for an unknown type.
    """

    def __init__(self, folder: str | os.PathLike | None = None, named: Mapping[str, Any] | None = None):
        """Nothing is read yet, because the type may be that of the weights' config."""
        self.folder = None if folder is None else pathlib.Path(folder)
        self.named = {name: value for name, value in (named or {}).items() if name in FIELDS and value is not None}
        self.notes: list[str] = []
        self._built: dict[tuple, Tokenizer] = {}
        files = [f"{flag(name)} {self.named[name]}" for name in TOKENIZER_FILES if name in self.named]
        if self.folder is not None and files:
            found = Words(f"{folder}, and {', '.join(files)}")
            rule = "excludes --vocab-file, --merge-file and --tokenizer-model, because a model has one tokenizer"
            raise ConfigError(problem("--tokenizer", found, rule, "Leave out one of them"))
        if self.folder is not None and not self.folder.is_dir():
            rule = "must be a folder with tokenizer.json, or with vocab.json and merges.txt"
            cure = "Name a folder on this machine: nothing is downloaded by name"
            raise ConfigError(problem("--tokenizer", str(folder), rule, cure))
        kind = self.named.get("tokenizer_type")
        if kind is not None and ":" not in kind:
            choose("tokenizer", kind, TOKENIZERS)

    def __bool__(self) -> bool:
        return self.folder is not None or any(name in self.named for name in TOKENIZER_FILES)

    def build(self, data: DataConfig) -> Tokenizer:
        """The tokenizer, built once.

        data: of the weights' config, whose type and sentinels apply where the flags do not give them. Raises DataError
        for files that are missing or of another type, ConfigError where their type cannot be inferred.
        """
        key = (data.tokenizer_type, data.vocab_extra_ids)
        if key not in self._built:
            self._built[key] = self._build(data)
        return self._built[key]

    def _build(self, data: DataConfig) -> Tokenizer:
        if self.folder is None:
            files = {name: self.named.get(name) for name in TOKENIZER_FILES}
            kind = self.named.get("tokenizer_type") or self._infer_type(data.tokenizer_type, files)
            return tokenizer_from_config(_with_fields(data, tokenizer_type=kind, **files))
        if not (self.folder / RECORD).exists() and (files := _megatron_named_files(self.folder)):
            override = TokenizerOverride(None, {**files, **self.named})
            tokenizer, self.notes = override.build(data), override.notes
            return tokenizer
        requested = self.named.get("tokenizer_type")
        options = saved_options(self.folder, _with_fields(data, tokenizer_type=requested or data.tokenizer_type))
        found = options["tokenizer_type"]
        if requested not in (None, found):
            rule = f"must be that of {self.folder} ({found})"
            cure = f"Leave it out, or name the files of a {requested}"
            raise ConfigError(problem("--tokenizer-type", requested, rule, cure))
        return load_tokenizer(self.folder, _with_fields(data, tokenizer_type=found))

    def vocab_size(self, data: DataConfig) -> int | None:
        """The size of its vocabulary; None where none is given."""
        return self.build(data).vocab_size if self else None

    def _infer_type(self, of_weights: str | None, files: Mapping[str, Any]) -> str:
        """The type of tokenizer that these files are of. of_weights: the type in the weights' config."""
        present = {name for name in TOKENIZER_FILES if files[name]}
        if of_weights is not None and set(MADE_FROM.get(of_weights, ("tokenizer_model",))) == present:
            return of_weights
        shown = Words(", ".join(f"{flag(name)} {files[name]}" for name in TOKENIZER_FILES if files[name]))
        if present == {"vocab_file", "merge_file"}:
            kind, why = "GPT2BPETokenizer", ""
        elif present == {"tokenizer_model"} and not str(files["tokenizer_model"]).endswith(".model"):
            kind, why = "HuggingFaceTokenizer", ""
        elif present == {"vocab_file"} and str(files["vocab_file"]).endswith(".txt"):
            lower = _is_lower_case(pathlib.Path(files["vocab_file"]))
            kind, why = WORDPIECE_TYPES[0 if lower else 1], f", {'without' if lower else 'with'} capital letters"
        else:
            rule = "must be a vocab.json and its merges.txt, or a vocab.txt alone, or a tokenizer.json alone"
            cure = "Add --merge-file FILE, or name the type with --tokenizer-type"
            raise ConfigError(problem("The tokenizer", shown, rule, cure))
        instead = f", where the weights' arguments say {of_weights}" if of_weights not in (None, kind) else ""
        self.notes.append(f"tokenizer: a {kind}, as {shown} is of one{why}{instead}; --tokenizer-type names another")
        return kind


def _with_fields(data: DataConfig, **values: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{**vars(data), **values})


def vocab_size_notes(tokens: int, rows: int) -> list[str]:
    """Notes about a tokenizer with so many tokens for an embedding of so many rows."""
    if tokens > rows:
        cure = f"`megalith checkpoint edit SOURCE FOLDER --vocab-size {tokens}` gives it more rows"
        return [f"{too_many_tokens(tokens, rows)}; {cure}"]
    if tokens < rows:
        return [
            f"the tokenizer has {tokens} tokens and the embedding {rows} rows: the last {rows - tokens} stand for no "
            f"text"
        ]
    return []


def _megatron_named_files(folder: pathlib.Path) -> dict[str, str]:
    """Files that a folder without the usual ones has under the names of Megatron's READMEs.

    They are gpt2-vocab.json and gpt2-merges.txt, or bert-vocab.txt.
    """
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return {}
    found = {
        name: sorted(folder.glob(pattern))
        for name, pattern in (("vocab_file", "*vocab.*"), ("merge_file", "*merges.txt"))
    }
    return {name: str(files[0]) for name, files in found.items() if len(files) == 1}


def _is_lower_case(vocabulary: pathlib.Path) -> bool:
    try:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        rule = f"must be a readable text file ({getattr(error, 'strerror', None) or error})"
        raise DataError(problem("--vocab-file", str(vocabulary), rule, "Check the path")) from None
    return not any(word != word.lower() for word in words if not word.startswith("["))
