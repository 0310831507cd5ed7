"""Tokenizers that the `tokenizers` library runs: any tokenizer.json, or a Hugging Face folder. transformers is not needed."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from megalith.common.errors import DataError, problem
from megalith.data.tokenizers import Tokenizer, TokenizerOptions, optional_import

# A lone tokenizer.json does not say which of its added tokens plays which part; these are the names in use.
USUAL_NAMES = {
    "eos": ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|eot_id|>", "<|im_end|>", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>"),
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json")


class LibraryTokenizer(Tokenizer):
    """A tokenizer whose `backend` is a tokenizers.Tokenizer; the faster encoder `gigatoken` is used once `accelerate` saw it agree."""

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
        self.prefix, self.suffix = _wrapping(backend)
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
            rows = [self._encoder(text) for text in texts]
        else:
            rows = [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self.prefix or self.suffix:
            rows = [np.concatenate([self.prefix, row, self.suffix]).astype(np.int64) for row in rows]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return (np.concatenate(rows) if rows else np.empty(0, np.int32)), lengths

    def accelerate(self, sample: Sequence[str]) -> tuple[bool, str]:
        """Use gigatoken if it is installed and gives the ids of `tokenizers` for every text of `sample`."""
        try:
            encoder = optional_import("gigatoken", "data", "the fast encoder").Tokenizer.from_json(self.fast_json()).backend.encode
            same = all(self.backend.encode(text, add_special_tokens=False).ids == encoder(text).tolist() for text in sample)
        except (DataError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            return False, f"encoder: tokenizers (gigatoken not usable: {error})"
        if not same:
            return False, "encoder: tokenizers (gigatoken gave other ids for a sample of this input)"
        self._encoder = encoder
        return True, f"encoder: gigatoken (same ids as tokenizers on {len(sample)} sampled texts)"

    def fast_json(self) -> str:
        """The tokenizer.json handed to gigatoken."""
        return self.backend.to_str()


def _wrapping(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor adds before and after a text."""
    bare, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    return full[:start], full[start + len(bare) :]


class HuggingFaceTokenizer(LibraryTokenizer):
    """--tokenizer-model is a tokenizer.json, a folder that holds one (or vocab.json and merges.txt), or a name on the Hub.

    As Megatron does, a text gets what the tokenizer's post-processor adds (a leading BOS for Llama 3). eod is the eos token.
    """

    def __init__(self, options: TokenizerOptions):
        """Load the file and find the special tokens, by the configuration beside it or by their usual names."""
        self.source = _locate(options)
        super().__init__(options, _load(options, self.source))
        named = _named_tokens(self.source)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        for name, usual in USUAL_NAMES.items():
            wanted = (named[name],) if named.get(name) else usual if not named else ()
            setattr(self, name, next((vocabulary[token] for token in wanted if token in vocabulary), None))
        self.complete()
        self.eod = self.eos
        sentinels = [f"<extra_id_{i}>" for i in range(options.vocab_extra_ids)]
        self.backend.add_special_tokens(sentinels)
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.extra_ids = [vocabulary[token] for token in sentinels]
        self.vocab_size = max(vocabulary.values(), default=-1) + 1

    def complete(self) -> None:
        """Add special tokens that the file lacks; here none."""

    def files(self) -> dict[str, pathlib.Path]:
        """The tokenizer.json, where it is a file."""
        return {"tokenizer_model": self.source} if self.source and self.source.is_file() else {}

    def save(self, folder: str | pathlib.Path) -> None:
        """Write tokenizer.json and its companions, which transformers reads as well."""
        super().save(folder)
        folder = pathlib.Path(folder)
        if not self.files():
            self.backend.save(str(folder / "tokenizer.json"))
        for name in COMPANIONS:
            beside = self.source.parent / name if self.source and self.source.is_file() else None
            if beside and beside.is_file() and beside.resolve() != (folder / name).resolve():
                shutil.copyfile(beside, folder / name)


class HFTokenizer(HuggingFaceTokenizer):
    """As Megatron-DeepSpeed's: `[PAD]`, `</s>`, `<s>` and `<unk>` are added, in this order, for the parts that no token plays."""

    def complete(self) -> None:
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
        raise DataError(
            problem(
                "--tokenizer-model",
                str(path),
                "the folder holds neither tokenizer.json nor vocab.json with merges.txt",
                "For a sentencepiece .model use --tokenizer-type Llama2Tokenizer or GPTSentencePieceTokenizer with the file itself",
            )
        )
    if path.exists():
        return path
    if path.suffix or len(path.parts) > 2 or path.is_absolute():
        return options.file("tokenizer_model" if options.tokenizer_model else "vocab_file")
    return None


def _load(options: TokenizerOptions, source: pathlib.Path | None) -> tokenizers.Tokenizer:
    try:
        if source is None:
            return tokenizers.Tokenizer.from_pretrained(str(options.tokenizer_model))
        if source.is_dir():
            return byte_level_bpe(source / "vocab.json", source / "merges.txt")
        return tokenizers.Tokenizer.from_file(str(source))
    except Exception as error:  # the library raises bare Exception
        rule = "it must be a tokenizer.json, a folder with one, or a reachable name on the Hugging Face Hub"
        cure = "Give the path of a file, for example one made by `megalith data bpe`"
        raise DataError(problem("--tokenizer-model", options.tokenizer_model, f"{rule} ({error})", cure)) from error


def byte_level_bpe(vocab_file: pathlib.Path, merge_file: pathlib.Path) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer from its two files, no special tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(str(vocab_file), str(merge_file)))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _named_tokens(source: pathlib.Path | None) -> dict[str, str]:
    """The parts that tokenizer_config.json and special_tokens_map.json give to tokens, as {"eos": "</s>", ...}."""
    named: dict[str, str] = {}
    if source is None:
        return named
    folder = source if source.is_dir() else source.parent
    for name in COMPANIONS:
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for part in USUAL_NAMES:
            token = content.get(f"{part}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token:
                named.setdefault(part, token)
    return named
