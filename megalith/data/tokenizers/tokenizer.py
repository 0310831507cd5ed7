"""Tokenizers under Megatron's names: one small protocol over the libraries that do the work.

Ids and special tokens equal Megatron's, so that its datasets and checkpoints keep their meaning. A tokenizer can be
saved into a checkpoint folder and loaded from there without the files it was first made from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.files import write_text
from megalith.common.pointers import refuse_pointer
from megalith.common.registry import Registry
from megalith.config.flags.text import Words
from megalith.config.sections.data import TOKENIZER_FILES

if TYPE_CHECKING:
    import tokenizers

TOKENIZERS = Registry(
    "tokenizer",
    {
        "GPT2BPETokenizer": "megalith.data.tokenizers.fast:GPT2BPETokenizer",
        "BertWordPieceLowerCase": "megalith.data.tokenizers.fast:BertWordPieceLowerCase",
        "BertWordPieceCase": "megalith.data.tokenizers.fast:BertWordPieceCase",
        "HuggingFaceTokenizer": "megalith.data.tokenizers.huggingface:HuggingFaceTokenizer",
        "HFTokenizer": "megalith.data.tokenizers.huggingface:HFTokenizer",
        "SentencePieceTokenizer": "megalith.data.tokenizers.sentencepiece:SentencePieceTokenizer",
        "GPTSentencePieceTokenizer": "megalith.data.tokenizers.sentencepiece:GPTSentencePieceTokenizer",
        "Llama2Tokenizer": "megalith.data.tokenizers.sentencepiece:Llama2Tokenizer",
        "TikTokenizer": "megalith.data.tokenizers.other:TikTokenizer",
        "NullTokenizer": "megalith.data.tokenizers.other:NullTokenizer",
    },
)
CHAT_TEMPLATE = "chat_template.jinja"  # of newer versions of transformers, instead of the setting chat_template
RECORD = "megalith_tokenizer.json"  # what `save` leaves beside the vocabulary files
WORDPIECE_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase")
SENTENCEPIECE_TYPES = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")
FILE_PATTERNS = {  # type -> option -> usual name of the file
    "GPT2BPETokenizer": {"vocab_file": "vocab.json", "merge_file": "merges.txt"},
    **{kind: {"vocab_file": "vocab.txt"} for kind in WORDPIECE_TYPES},
    **{kind: {"tokenizer_model": "*.model"} for kind in SENTENCEPIECE_TYPES},
}
BUILT_FROM_VOCAB_SIZE = ("NullTokenizer", "TikTokenizer")  # by --vocab-size alone, or with a file
SPECIAL_TOKEN_NAMES = ("eod", "bos", "eos", "pad", "cls", "sep", "mask")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerOptions:
    """Everything a tokenizer can be made from; the names are Megatron's flags."""

    tokenizer_type: str
    vocab_file: str | None = None
    merge_file: str | None = None
    tokenizer_model: str | None = None
    vocab_extra_ids: int = 0
    vocab_size: int | None = None
    tiktoken_pattern: str = "v2"
    tiktoken_num_special_tokens: int = 1000
    tiktoken_special_tokens: tuple[str, ...] | None = None

    def file(self, name: str) -> pathlib.Path:
        """The path of option `name`; raises DataError naming the flag when it was not given or does not exist."""
        flag, value = "--" + name.replace("_", "-"), getattr(self, name)
        if value is None:
            rule = f"must be given, because {self.tokenizer_type} is made from it"
            raise DataError(problem(flag, Words("nothing"), rule, f"Add {flag} PATH"))
        path = pathlib.Path(value)
        if not path.exists():
            raise DataError(problem(flag, value, "must name an existing file", f"Correct the path after {flag}"))
        check_file(path, flag)
        return path


def check_file(path: pathlib.Path, flag: str) -> None:
    """Raise DataError where `path` is a stream, which can be read only once, or a Git LFS pointer to a file."""
    if path.exists() and not path.is_file() and not path.is_dir():
        rule = "must be an ordinary file, because each worker reads it"
        raise DataError(problem(flag, str(path), rule, "Write what comes from there into a file, and give that"))
    refuse_pointer(path)


class Tokenizer:
    """Text to token ids and back.

    Special ids (`eod bos eos pad cls sep mask`) are None where the vocabulary has none; `require` is for code that
    needs one.
    """

    vocab_size: int
    eod: int | None = None
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    extra_ids: Sequence[int] = ()  # sentinels <extra_id_0>, <extra_id_1>, ...
    chat_template: str | None = None  # in Jinja
    notes: tuple[str, ...] = ()  # for the user: where its files disagree, and which is followed

    def __init__(self, options: TokenizerOptions):
        """Store the options; a subclass loads its vocabulary and sets `vocab_size` and the special ids."""
        self.options = options

    @property
    def decoder_start(self) -> int:
        """The id before the first token of a T5's decoder: bos, or pad where there is none, as in T5's vocabulary."""
        return self.bos if self.bos is not None else self.require("pad")

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        raise NotImplementedError

    def tokens(self) -> list[str]:
        """The vocabulary in id order, vocab_size strings."""
        raise NotImplementedError

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each: ([sum of lengths] integer, [len(texts)] int64)."""
        rows = [self.encode(text) for text in texts]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter((i for row in rows for i in row), np.int32, int(lengths.sum())), lengths

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many texts, one integer array each."""
        ids, lengths = self.encode_flat(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(texts) else []

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """An equal tokenizer of the library `tokenizers`, which transformers reads; DataError where there is none."""
        rule = "must have a form that the library tokenizers knows"
        raise DataError(problem("The tokenizer", self.options.tokenizer_type, rule, "Use it through megalith"))

    @property
    def split_special_tokens(self) -> bool:
        """Whether special tokens in a text are encoded as ordinary characters, as by the option of transformers."""
        return True

    def accelerate(self, sample: Sequence[str]) -> tuple[bool, str]:
        """Switch to a faster encoder if there is one and it gives the same ids for `sample`.

        Returns whether it did, and a line that says so.
        """
        return False, f"encoder: {self.options.tokenizer_type}: there is no faster encoder than its library's"

    def require(self, name: str) -> int:
        """The special id `name` ("eod", "mask", ...); raises DataError where this vocabulary has none."""
        value = getattr(self, name)
        if value is None:
            what = f"the vocabulary of {self.options.tokenizer_type}"
            found = Words(f"{self.vocab_size} tokens without one")
            cure = "Choose a tokenizer that has one, or leave out the option that asks for it"
            raise DataError(problem(what, found, f"must have the {name} token, which is needed here", cure))
        return value

    def end_texts_with(self, number: int) -> None:
        """Make this id the one that ends a text; DataError where the tokenizer's class says which it is."""
        if number not in (self.eod, self.eos):
            token, kind = self.tokens()[number], self.options.tokenizer_type
            rule = f"must be the one that ends a text of a {kind}, {self.tokens()[self.require('eod')]}"
            cure = "Write {{ eos_token }} in the template, or use a HuggingFaceTokenizer, which takes others"
            raise DataError(problem("The token that ends a turn in the chat template", token, rule, cure))

    def files(self) -> dict[str, pathlib.Path]:
        """The files it was made from, by option name."""
        named = {name: getattr(self.options, name) for name in TOKENIZER_FILES}
        return {
            name: pathlib.Path(path)
            for name, path in named.items()
            if path is not None and pathlib.Path(path).is_file()
        }

    def fingerprint(self) -> str:
        """Hexadecimal digest of the settings and the contents of the files: equal fingerprints give equal ids."""
        settings = {k: v for k, v in dataclasses.asdict(self.options).items() if not k.endswith(("_file", "_model"))}
        if self.options.tokenizer_type in TOKENIZERS and self.options.tokenizer_type not in BUILT_FROM_VOCAB_SIZE:
            del settings["vocab_size"]  # the model's, and another where a run takes it from a checkpoint
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for name, path in sorted(self.files().items()):
            digest.update(name.encode() + path.read_bytes())
        return digest.hexdigest()

    def save(self, folder: str | pathlib.Path) -> None:
        """Copy what it is made from into `folder`, from which `load_tokenizer` makes an equal one."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        record = dataclasses.asdict(self.options)
        for name, path in self.files().items():
            if path.resolve() != (folder / path.name).resolve():
                shutil.copyfile(path, folder / path.name)
            record[name] = path.name
        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
        if self.chat_template is not None:
            write_text(folder / CHAT_TEMPLATE, self.chat_template)


def build_tokenizer(tokenizer_type: str, **options: Any) -> Tokenizer:
    """Build the tokenizer called `tokenizer_type` (a name of TOKENIZERS, or `module:class` of your own).

    options: the fields of TokenizerOptions (vocab_file, merge_file, tokenizer_model, vocab_extra_ids, vocab_size, ...).
    Your own class is called with one TokenizerOptions and follows the protocol of `Tokenizer`.
    Raises ConfigError for an unknown name or option, DataError for a missing or unreadable file.
    """
    try:
        tokenizer_options = TokenizerOptions(tokenizer_type=tokenizer_type, **options)
    except TypeError as error:
        known = ", ".join(field.name for field in dataclasses.fields(TokenizerOptions))
        raise ConfigError(f"tokenizer {tokenizer_type!r}: {error}; the options are {known}") from error
    return TOKENIZERS.find(tokenizer_type)(tokenizer_options)


def tokenizer_from_config(data: Any, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that a config section `data` describes; fields are read by name, absent ones keep their default.

    vocab_size: --vocab-size, which some tokenizers are made from (NullTokenizer, TikTokenizer).
    """
    if data.tokenizer_type is None:
        rule, cure = "must be given, because text needs a tokenizer", f"Add one of {', '.join(TOKENIZERS)}"
        raise ConfigError(problem("--tokenizer-type", Words("nothing"), rule, cure))
    names = [field.name for field in dataclasses.fields(TokenizerOptions)]
    values = {name: getattr(data, name) for name in names if getattr(data, name, None) is not None}
    if isinstance(values.get("tiktoken_special_tokens"), list):
        values["tiktoken_special_tokens"] = tuple(values["tiktoken_special_tokens"]) or None
    if vocab_size is not None:
        values.setdefault("vocab_size", vocab_size)
    return build_tokenizer(**values)


def load_tokenizer(folder: str | pathlib.Path, data: Any = None) -> Tokenizer:
    """The tokenizer that `save` saved in `folder`, or that of its vocabulary files; data: see `saved_options`."""
    tokenizer, template = build_tokenizer(**saved_options(folder, data)), pathlib.Path(folder) / CHAT_TEMPLATE
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def saved_options(folder: str | pathlib.Path, data: Any = None) -> dict[str, Any]:
    """The arguments with which `build_tokenizer` makes the tokenizer of `folder`.

    They are what `save` recorded; without a record those of a Hugging Face folder, unless `data`, the section of the
    config that came with the folder, names another type and the files of that type are there.
    """
    folder = pathlib.Path(folder)
    record = folder / RECORD
    if not record.exists():
        kind, extra = getattr(data, "tokenizer_type", None), getattr(data, "vocab_extra_ids", 0)
        found = {option: sorted(folder.glob(pattern)) for option, pattern in FILE_PATTERNS.get(kind or "", {}).items()}
        if found and all(found.values()):
            named = {option: str(files[0]) for option, files in found.items()}
            return {"tokenizer_type": kind, "vocab_extra_ids": extra, **named}
        return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder), "vocab_extra_ids": extra}
    try:
        options = json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        rule, reason = "must be the JSON that `save` wrote", Words(f"{type(error).__name__}: {error}")
        raise DataError(problem(str(record), reason, rule, "Save the tokenizer again")) from error
    for name in TOKENIZER_FILES:
        if options.get(name):
            options[name] = str(folder / options[name])
    if options.get("tiktoken_special_tokens"):
        options["tiktoken_special_tokens"] = tuple(options["tiktoken_special_tokens"])
    return options


def padded_vocab_size(vocab_size: int, divisible_by: int = 128, tensor_model_parallel_size: int = 1) -> int:
    """Rows of Megatron's embedding: vocab_size rounded up to a multiple of divisible_by x tensor-parallel size."""
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
