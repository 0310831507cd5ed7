"""The tokenizer that a command names for weights that have none, or another: a folder, or files as Megatron's flags have them."""

from __future__ import annotations

import os
import pathlib
import types
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words, choose, flag
from megalith.config.sections.data import MADE_FROM, TOKENIZER_FILES, TOKENIZERS, DataConfig, too_many_words
from megalith.data.tokenizers.tokenizer import (
    RECORD,
    WORD_PIECES,
    Tokenizer,
    load_tokenizer,
    saved_options,
    tokenizer_from_config,
)

FIELDS = ("tokenizer_type", *TOKENIZER_FILES)


class GivenTokenizer:
    """A folder of tokenizer files (as --tokenizer), or {field of the config: value} of the files themselves and their type.

    notes: what of it was concluded, once it was made. Raises ConfigError for both a folder and files, and for a type there is not.
    """

    def __init__(self, folder: str | os.PathLike | None = None, named: Mapping[str, Any] | None = None):
        """Nothing is read yet, because the type may be that of the weights' config."""
        self.folder = None if folder is None else pathlib.Path(folder)
        self.named = {name: value for name, value in (named or {}).items() if name in FIELDS and value is not None}
        self.notes: list[str] = []
        self._made: dict[tuple, Tokenizer] = {}
        files = [f"{flag(name)} {self.named[name]}" for name in TOKENIZER_FILES if name in self.named]
        if self.folder is not None and files:
            raise ConfigError(
                problem(
                    "--tokenizer", f"{folder}, and {', '.join(files)}", "a model has one tokenizer", "Leave out the one"
                )
            )
        if self.folder is not None and not self.folder.is_dir():
            rule = "it is a folder with tokenizer.json, or vocab.json and merges.txt; nothing is downloaded by name"
            raise ConfigError(problem("--tokenizer", str(folder), rule, "Name a folder on this machine"))
        kind = self.named.get("tokenizer_type")
        if kind is not None and ":" not in kind:
            choose("tokenizer", kind, TOKENIZERS)

    def __bool__(self) -> bool:
        return self.folder is not None or any(name in self.named for name in TOKENIZER_FILES)

    def make(self, data: DataConfig) -> Tokenizer:
        """The tokenizer, made once. data: of the weights' config, whose type and sentinels count where the flags say nothing.

        Raises DataError for files that are missing or of another kind, ConfigError where their kind cannot be told.
        """
        key = (data.tokenizer_type, data.vocab_extra_ids)
        if key not in self._made:
            self._made[key] = self._make(data)
        return self._made[key]

    def _make(self, data: DataConfig) -> Tokenizer:
        if self.folder is None:
            files = {name: self.named.get(name) for name in TOKENIZER_FILES}
            kind = self.named.get("tokenizer_type") or self._kind(data.tokenizer_type, files)
            return tokenizer_from_config(_with(data, tokenizer_type=kind, **files))
        if not (self.folder / RECORD).exists() and (plain := _plain_files(self.folder)):
            given = GivenTokenizer(None, {**plain, **self.named})
            made, self.notes = given.make(data), given.notes
            return made
        asked = self.named.get("tokenizer_type")
        found = saved_options(self.folder, _with(data, tokenizer_type=asked or data.tokenizer_type))["tokenizer_type"]
        if asked not in (None, found):
            rule = f"{self.folder} holds a {found}"
            raise ConfigError(problem("--tokenizer-type", asked, rule, f"Leave it out, or name the files of a {asked}"))
        return load_tokenizer(self.folder, _with(data, tokenizer_type=found))

    def words(self, data: DataConfig) -> int | None:
        """The size of its vocabulary; None where none is given."""
        return self.make(data).vocab_size if self else None

    def _kind(self, said: str | None, files: Mapping[str, Any]) -> str:
        """The type of tokenizer that these files are of; said: that of the weights."""
        there = {name for name in TOKENIZER_FILES if files[name]}
        if said is not None and set(MADE_FROM.get(said, ("tokenizer_model",))) == there:
            return said
        shown = Words(", ".join(f"{flag(name)} {files[name]}" for name in TOKENIZER_FILES if files[name]))
        if there == {"vocab_file", "merge_file"}:
            kind, why = "GPT2BPETokenizer", ""
        elif there == {"tokenizer_model"} and not str(files["tokenizer_model"]).endswith(".model"):
            kind, why = "HuggingFaceTokenizer", ""
        elif there == {"vocab_file"} and str(files["vocab_file"]).endswith(".txt"):
            lower = _lower_case(pathlib.Path(files["vocab_file"]))
            kind, why = WORD_PIECES[0 if lower else 1], f", {'without' if lower else 'with'} capital letters"
        else:
            rule = "a vocab.json has its merges.txt beside it, a vocab.txt stands alone, and so does tokenizer.json"
            raise ConfigError(
                problem("tokenizer", shown, rule, "Add --merge-file FILE, or name the kind with --tokenizer-type")
            )
        instead = f", where the weights' arguments say {said}" if said not in (None, kind) else ""
        self.notes.append(f"tokenizer: a {kind}, as {shown} is of one{why}{instead}; --tokenizer-type says otherwise")
        return kind


def _with(data: DataConfig, **values: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{**vars(data), **values})


def misfit(tokens: int, rows: int) -> list[str]:
    """What to tell of a tokenizer with so many tokens for an embedding of so many rows."""
    if tokens > rows:
        return [
            f"{too_many_words(tokens, rows)}; `megalith checkpoint edit SOURCE FOLDER --vocab-size {tokens}` gives it more rows"
        ]
    if tokens < rows:
        return [
            f"the tokenizer has {tokens} tokens and the embedding {rows} rows: the last {rows - tokens} stand for no text"
        ]
    return []


def _plain_files(folder: pathlib.Path) -> dict[str, str]:
    """Files as Megatron's READMEs name them (gpt2-vocab.json and gpt2-merges.txt, bert-vocab.txt) of a folder that has no usual ones."""
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return {}
    found = {
        name: sorted(folder.glob(pattern))
        for name, pattern in (("vocab_file", "*vocab.*"), ("merge_file", "*merges.txt"))
    }
    return {name: str(files[0]) for name, files in found.items() if len(files) == 1}


def _lower_case(vocabulary: pathlib.Path) -> bool:
    try:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            problem("--vocab-file", str(vocabulary), f"it must be a readable text file ({error})", "Check the path")
        ) from None
    return not any(word != word.lower() for word in words if not word.startswith("["))
