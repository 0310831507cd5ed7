"""Tokenizers of the library `tokenizers`: any tokenizer.json, or a Hugging Face folder; transformers is not needed."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
import re
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from megalith.common.errors import DataError, problem
from megalith.common.extras import MissingPackage, require
from megalith.config.flags.text import Words
from megalith.data.tokenizers.settings import (
    CONFIG_FILES,
    default_template,
    files_beside,
    read_settings,
    save_changes,
    token_content,
)
from megalith.data.tokenizers.tokenizer import (
    SPECIAL_TOKEN_NAMES,
    Tokenizer,
    TokenizerOptions,
    check_file,
)

# A tokenizer.json alone does not say which of its added tokens has which role; these are the usual names.
USUAL_SPECIAL_TOKENS = {
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
TEXT_ID = 2**32 - 1  # the id used for a text: the largest that the library holds
GENERIC_CLASS = "PreTrainedTokenizerFast"  # the class of transformers that reads tokenizer.json as it is
# Classes of transformers 5 that add no tokens to a text where tokenizer.json does not; BERT's, RoBERTa's, ... do.
BARE_CLASSES = (
    GENERIC_CLASS, "TokenizersBackend", "GPT2Tokenizer", "LlamaTokenizer", "GemmaTokenizer", "BloomTokenizer",
    "GPTNeoXTokenizer",
)  # fmt: skip


class LibraryTokenizer(Tokenizer):
    """A tokenizer whose `backend` is a tokenizers.Tokenizer.

    The faster encoder `gigatoken` is used once `accelerate` has seen it agree.
    """

    backend: tokenizers.Tokenizer
    prefix: list[int]  # ids that the post-processor puts before every text (a BOS), and after it
    suffix: list[int]

    def __init__(self, options: TokenizerOptions, backend: tokenizers.Tokenizer):
        """Wrap `backend`; special ids are set by the subclass."""
        super().__init__(options)
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.prefix, self.suffix = post_processor_ids(backend)
        self._encoder: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, with what the post-processor adds."""
        return self.prefix + self.backend.encode(text, add_special_tokens=False).ids + self.suffix

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens stay visible."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def tokens(self) -> list[str]:
        """The vocabulary in id order; an id that no token has is an empty string."""
        listed = [""] * self.vocab_size
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            listed[i] = token
        return listed

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each."""
        if self._encoder is not None:
            rows = [self._encode_fast(text) for text in texts]
        else:
            rows = [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self.prefix or self.suffix:
            rows = [np.concatenate([self.prefix, row, self.suffix]).astype(np.int64) for row in rows]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return (np.concatenate(rows) if rows else np.empty(0, np.int32)), lengths

    def _encode_fast(self, text: str) -> Any:
        """Ids of a text by gigatoken, unless it has characters of which the two libraries may think differently."""
        if text.isascii() or unassigned().search(text) is None:
            return self._encoder(text)
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, np.int64)

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """A copy of the backend."""
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    def accelerate(self, sample: Sequence[str]) -> tuple[bool, str]:
        """Use gigatoken if it is installed and gives the ids of `tokenizers` for every text of `sample`."""
        try:
            encoder = require("gigatoken", "the fast encoder").Tokenizer.from_json(self.gigatoken_json()).backend.encode
            same = all(
                self.backend.encode(text, add_special_tokens=False).ids == encoder(text).tolist() for text in sample
            )
        except (DataError, MissingPackage, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            return False, f"encoder: tokenizers (gigatoken not usable: {str(error).partition(chr(10))[0]})"
        if not same:
            return False, "encoder: tokenizers (gigatoken gave other ids for a sample of this input)"
        self._encoder = encoder
        return True, f"encoder: gigatoken (same ids as tokenizers on {len(sample)} sampled texts)"

    def gigatoken_json(self) -> str:
        """The tokenizer.json that gigatoken gets."""
        return self.backend.to_str()


@functools.cache
def unassigned() -> re.Pattern[str]:
    """Characters that Python's Unicode tables do not have yet.

    Libraries whose tables are of different years class them differently, as letters or not, and split words elsewhere.
    """
    pieces, first = list[str](), None
    for code in range(0x80, 0x40000):  # no letters lie beyond
        if unicodedata.category(chr(code)) != "Cn":
            pieces += [] if first is None else [f"{chr(first)}-{chr(code - 1)}"]
            first = None
        elif first is None:
            first = code
    return re.compile(f"[{''.join(pieces)}{chr(first)}-{chr(0x3FFFF)}]")


def post_processor_ids(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor adds before and after every text, of whatever kind it is.

    A template, BERT's, RoBERTa's or a sequence is run on one token whose id no vocabulary has, so that nothing it adds
    can be taken for the text. Raises DataError where it names an id that the vocabulary gives to another token, or does
    not give the text once.
    """
    processor = backend.post_processor
    if processor is None:
        return [], []
    for token, i in _post_processor_tokens(json.loads(processor.__getstate__())):
        if backend.token_to_id(token) != i:
            found = Words(f"{token} as id {i}, where the vocabulary has {token} as {backend.token_to_id(token)}")
            rule, cure = "must add tokens under their ids", "Correct the id in post_processor, or save the file again"
            raise DataError(problem("The post_processor of tokenizer.json", found, rule, cure))
    text = tokenizers.Tokenizer(tokenizers.models.WordLevel({"text": TEXT_ID})).encode("text")
    full = processor.process(text).ids
    if full.count(TEXT_ID) != 1:
        what, found = "the post_processor of tokenizer.json", Words(f"the text {full.count(TEXT_ID)} times")
        raise DataError(problem(what, found, "must keep the text once", "Correct its template"))
    return full[: full.index(TEXT_ID)], full[full.index(TEXT_ID) + 1 :]


def template_processing(
    backend: tokenizers.Tokenizer, before: int | None, after: int | None, *, repeat_in_pair: bool = True
) -> tokenizers.processors.TemplateProcessing:
    """The post-processor that adds these tokens (or none) before and after a text.

    repeat_in_pair: `before` is added before the second text of a pair, too.
    """
    special = [(backend.id_to_token(i), i) for i in dict.fromkeys((before, after)) if i is not None]
    first, last = ([] if i is None else [backend.id_to_token(i)] for i in (before, after))
    second = [f"{piece}:1" for piece in (*(first if repeat_in_pair else ()), "$B", *last)]
    return tokenizers.processors.TemplateProcessing(
        single=[*first, "$A", *last], pair=[*first, "$A", *last, *second], special_tokens=special
    )


def _post_processor_tokens(processor: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """(token, id) of all that a post-processor, as tokenizer.json describes it, may add."""
    for inner in processor.get("processors", ()):
        yield from _post_processor_tokens(inner)
    yield from (tuple(processor[part]) for part in ("cls", "sep") if part in processor)
    if processor["type"] == "TemplateProcessing":
        used = {part["SpecialToken"]["id"] for part in processor["single"] if "SpecialToken" in part}
        for name in used:
            yield from zip(
                processor["special_tokens"][name]["tokens"], processor["special_tokens"][name]["ids"], strict=True
            )


class HuggingFaceTokenizer(LibraryTokenizer):
    """--tokenizer-model is a tokenizer.json, a folder that holds one (or vocab.json and merges.txt), or a Hub name.

    As in Megatron, a text gets what transformers' AutoTokenizer gives it: the tokens that tokenizer_config.json names
    are found in the text, and the post-processor (for vocab.json and merges.txt: add_bos_token and add_eos_token there)
    adds its tokens. eod is the eos token.
    """

    def __init__(self, options: TokenizerOptions):
        """Load the file and find the special tokens, by the configuration beside it or by their usual names."""
        self.source = _locate(options)
        self.settings = read_settings(self.source)
        self.chat_template = default_template(self.settings.get("chat_template"))
        backend = _load(options, self.source)
        backend.add_tokens(_missing_added_tokens(backend, self.settings))
        backend.encode_special_tokens = bool(self.settings.get("split_special_tokens"))
        vocabulary = backend.get_vocab(with_added_tokens=True)
        named = {
            part: token_content(self.settings[key])
            for part in USUAL_SPECIAL_TOKENS
            if self.settings.get(key := f"{part}_token")
        }
        for name, usual in USUAL_SPECIAL_TOKENS.items():
            wanted = (named[name],) if name in named else usual if not named else ()
            setattr(self, name, next((vocabulary[token] for token in wanted if token in vocabulary), None))
        added = {part: getattr(self, part) for part in ("bos", "eos") if self.settings.get(f"add_{part}_token")}
        if self.source is not None and self.source.is_dir():
            backend.post_processor = template_processing(backend, added.get("bos"), added.get("eos"))
        super().__init__(options, backend)
        self._note_disagreements()
        self.add_missing_special_tokens()
        self.eod = self.eos
        sentinels = [f"<extra_id_{i}>" for i in range(options.vocab_extra_ids)]
        self.backend.add_special_tokens(sentinels)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.extra_ids = [vocabulary[token] for token in sentinels]
        self.vocab_size = max(vocabulary.values(), default=-1) + 1

    @property
    def split_special_tokens(self) -> bool:
        """Whether its configuration says so, or no token is marked as one to look for."""
        return self.backend.encode_special_tokens or not self.backend.get_added_tokens_decoder()

    def _note_disagreements(self) -> None:
        """Note where tokenizer_config.json adds other tokens to a text than tokenizer.json, which is followed."""
        for part, added in (("bos", self.prefix), ("eos", self.suffix)):
            wanted, does = self.settings.get(name := f"add_{part}_token"), getattr(self, part) in added
            if wanted is not None and bool(wanted) != does:
                self.notes += (
                    f"{name} is {str(bool(wanted)).lower()} in tokenizer_config.json, and the post_processor of "
                    f"tokenizer.json {'adds' if does else 'does not add'} it: tokenizer.json is followed, as "
                    f"transformers 5 does",
                )
        kind = str(self.settings.get("tokenizer_class", GENERIC_CLASS))
        class_adds = not {kind, kind.removesuffix("Fast")} & {*BARE_CLASSES}
        if self.source is not None and self.backend.post_processor is None and class_adds:
            self.notes += (
                f"tokenizer_config.json names {kind}, and tokenizer.json has no post_processor: nothing is added to a "
                f"text here, where AutoTokenizer lets such classes add their tokens (RobertaTokenizer <s> and </s>). "
                f"Save it with transformers (save_pretrained), which writes them into tokenizer.json, or make "
                f"tokenizer_class {GENERIC_CLASS}",
            )

    def add_missing_special_tokens(self) -> None:
        """Add special tokens that the file lacks; here none."""

    def end_texts_with(self, number: int) -> None:
        """Make this id eos and eod; what is saved says so."""
        self.settings = self.settings | {"eos_token": self.backend.id_to_token(number)}
        self.eos = self.eod = number

    def files(self) -> dict[str, pathlib.Path]:
        """The tokenizer.json, where it is a file."""
        return {"tokenizer_model": self.source} if self.source and self.source.is_file() else {}

    def save(self, folder: str | pathlib.Path) -> None:
        """Write tokenizer.json and the configuration files beside it, which transformers reads as well."""
        folder = pathlib.Path(folder)
        super().save(folder)
        if not self.files():
            self.backend.save(str(folder / "tokenizer.json"))
        for file in files_beside(self.source, CONFIG_FILES):
            if file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        save_changes(folder, self.source, self.settings.get("eos_token"), self.chat_template)

    def fingerprint(self) -> str:
        """Digest of the resulting tokenizer, not of its files: saving turns vocab.json and merges.txt into one file."""
        special = {name: getattr(self, name) for name in SPECIAL_TOKEN_NAMES}
        parts = [
            self.options.tokenizer_type,
            special,
            list(self.extra_ids),
            self.split_special_tokens,
            self.backend.to_str(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class HFTokenizer(HuggingFaceTokenizer):
    """As Megatron-DeepSpeed's: `[PAD]`, `</s>`, `<s>` and `<unk>` are added in this order for roles without a token."""

    def add_missing_special_tokens(self) -> None:
        """Add what is missing; unlike there, bos is bos and vocab_size counts the added tokens."""
        for name, token in (("pad", "[PAD]"), ("eos", "</s>"), ("bos", "<s>")):
            if getattr(self, name) is None:
                self.backend.add_special_tokens([token])
                setattr(self, name, self.backend.token_to_id(token))
        if not any(self.backend.token_to_id(token) is not None for token in ("<unk>", "[UNK]", "<|endoftext|>")):
            self.backend.add_special_tokens(["<unk>"])


def _locate(options: TokenizerOptions) -> pathlib.Path | None:
    """The tokenizer.json meant by --tokenizer-model (or --vocab-file); None when it is a name on the Hub."""
    name = options.tokenizer_model or options.vocab_file
    if name is None:
        options.file("tokenizer_model")
    path = pathlib.Path(str(name))
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.is_dir() and not ((path / "vocab.json").is_file() and (path / "merges.txt").is_file()):
        rule, found = "must be a folder with tokenizer.json or vocab.json and merges.txt", Words(f"{path} with neither")
        types = "--tokenizer-type Llama2Tokenizer or GPTSentencePieceTokenizer"
        cure = f"For a sentencepiece .model use {types} with the file itself"
        raise DataError(problem("--tokenizer-model", found, rule, cure))
    if path.exists():
        return path
    if path.suffix or len(path.parts) > 2 or path.is_absolute():
        return options.file("tokenizer_model" if options.tokenizer_model else "vocab_file")
    return None


def _load(options: TokenizerOptions, source: pathlib.Path | None) -> tokenizers.Tokenizer:
    for file in (source / "vocab.json", source / "merges.txt", source) if source else ():
        check_file(file, "--tokenizer-model")
    try:
        if source is None:
            return tokenizers.Tokenizer.from_pretrained(str(options.tokenizer_model))
        if source.is_dir():
            return byte_level_bpe(source / "vocab.json", source / "merges.txt")
        return tokenizers.Tokenizer.from_file(str(source))
    except Exception as error:  # the library raises bare Exception
        rule = "must be a tokenizer.json, a folder with one, or a reachable name on the Hugging Face Hub"
        cure = "Give the path of a file, for example one made by `megalith data bpe`"
        raise DataError(problem("--tokenizer-model", options.tokenizer_model, f"{rule} ({error})", cure)) from error


def byte_level_bpe(vocab_file: pathlib.Path, merge_file: pathlib.Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from its two files, no special tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab_file), str(merge_file)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _missing_added_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> list[tokenizers.AddedToken]:
    """The tokens that transformers adds to a tokenizer.json because of its configuration, in its order.

    Most are in the vocabulary.
    """
    listed: list[Any] = [
        token for _, token in sorted(settings.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    ]
    named = [
        settings[f"{part}_token"]
        for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
        if settings.get(f"{part}_token")
    ]
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing: dict[str, tokenizers.AddedToken] = {}
    others = [
        {"special": True, "content": token_content(token)} | (token if isinstance(token, dict) else {})
        for token in (*named, *(more.values() if isinstance(more, dict) else more))
    ]
    for token in listed + others:
        if token["content"] not in known:
            flags = {
                key: bool(token[key])
                for key in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if key in token
            }
            missing.setdefault(token["content"], tokenizers.AddedToken(token["content"], **flags))
    return list(missing.values())
