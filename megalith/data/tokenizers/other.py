"""Tokenizers over tiktoken ranks, and the one that reads numbers."""

from __future__ import annotations

import base64
import json
import pathlib
from collections.abc import Iterable

import tokenizers

from megalith.common.errors import DataError, problem
from megalith.common.extras import require
from megalith.config.flags.text import Words
from megalith.data.tokenizers.tokenizer import Tokenizer, TokenizerOptions

DEFAULT_TIKTOKEN_VOCABULARY = 2**17
REQUIRED_TOKENS = ("<unk>", "<s>", "</s>")  # every special list must hold these
# How text is cut before ranks apply: Megatron's --tiktoken-pattern v1 and v2.
PATTERNS = {
    "v1": r"[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "v2": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


class TikTokenizer(Tokenizer):
    """--tokenizer-model is a JSON list of {rank, token_bytes, token_str}.

    The special tokens come first; the ids of ranks follow them.
    """

    def __init__(self, options: TokenizerOptions):
        """Load the ranks; pad the special tokens to --tiktoken-num-special-tokens."""
        super().__init__(options)
        library = require("tiktoken", options.tokenizer_type)
        path, count = options.file("tokenizer_model"), options.tiktoken_num_special_tokens
        special = list(options.tiktoken_special_tokens or REQUIRED_TOKENS)
        if options.tiktoken_pattern not in PATTERNS:
            cure = "Use the one the vocabulary was made with"
            raise DataError(problem("--tiktoken-pattern", options.tiktoken_pattern, "must be v1 or v2", cure))
        if len(set(special)) != len(special) or not set(REQUIRED_TOKENS) <= set(special) or len(special) > count:
            limit = f"at most --tiktoken-num-special-tokens ({count})"
            rule = f"must be distinct, hold {' '.join(REQUIRED_TOKENS)}, and be {limit}"
            raise DataError(problem("--tiktoken-special-tokens", special, rule, "Correct the list"))
        special += [f"<SPECIAL_{i}>" for i in range(len(special), count)]
        self.vocab_size = options.vocab_size or DEFAULT_TIKTOKEN_VOCABULARY
        ranks = _read_ranks(path, self.vocab_size - count)
        self.model = library.Encoding(
            name=path.stem,
            pat_str=PATTERNS[options.tiktoken_pattern],
            mergeable_ranks={token: rank + count for token, rank in ranks.items()},
            special_tokens={token: i for i, token in enumerate(special)},
        )
        self._special, self._ranks = special, ranks
        names = {
            "bos": "<s>",
            "eos": "</s>",
            "eod": "</s>",
            "pad": "<pad>",
            "mask": "<mask>",
            "cls": "<cls>",
            "sep": "<sep>",
        }
        for name, token in names.items():
            setattr(self, name, special.index(token) if token in special else None)

    def encode(self, text: str) -> list[int]:
        """Token ids of one text; special tokens are not matched in it."""
        return self.model.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        return self.model.decode([int(i) for i in ids])

    def tokens(self) -> list[str]:
        """The vocabulary in id order; bytes that are not UTF-8 show as the replacement character."""
        return self._special + [token.decode("utf-8", "replace") for token in self._ranks]

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """Byte-level BPE of the same ranks: a merge for every way to cut a token in two, in the order of the ranks."""
        first, characters = len(self._special), characters_of_bytes()
        names = {token: "".join(characters[byte] for byte in token) for token in self._ranks}
        vocabulary = {name: i for i, name in enumerate(self._special)}
        if repeated := sorted(vocabulary.keys() & set(names.values())):
            rule = "must not be those of special tokens, because tokenizer.json has tokens by name"
            raise DataError(problem("The names of the vocabulary", repeated[:3], rule, "Use it through megalith"))
        vocabulary |= {names[token]: first + rank for token, rank in self._ranks.items()}
        merges = []
        for token in self._ranks:
            cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            known = [
                (self._ranks[left], self._ranks[right], left, right)
                for left, right in cuts
                if {left, right} <= self._ranks.keys()
            ]
            merges += [(names[left], names[right]) for *_, left, right in sorted(known)]
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
        whole = tokenizers.Regex(PATTERNS[self.options.tiktoken_pattern])
        parts = [
            tokenizers.pre_tokenizers.Split(whole, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
        backend.decoder = tokenizers.decoders.ByteLevel()
        return backend


def characters_of_bytes() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2's encoder.py, bytes_to_unicode)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _read_ranks(path: pathlib.Path, wanted: int) -> dict[bytes, int]:
    """The first `wanted` ranks of the file, in order."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in entries[: max(wanted, 0)]}
    except (ValueError, TypeError, KeyError) as error:
        rule = f"must be a JSON list of objects with rank, token_bytes, token_str ({type(error).__name__}: {error})"
        cure = "Give the vocabulary file of the tokenizer"
        raise DataError(problem("--tokenizer-model", str(path), rule, cure)) from error
    if list(ranks.values()) != list(range(wanted)):
        rule = f"must hold ranks 0 to {wanted - 1} in order (--vocab-size less the special tokens)"
        found, cure = Words(f"{len(ranks)} ranks"), "Set --vocab-size to the size of this vocabulary"
        raise DataError(problem("--tokenizer-model", found, rule, cure))
    return ranks


class NullTokenizer(Tokenizer):
    """A text is token ids as decimal numbers, separated by spaces; eod is --vocab-size, the id after the last."""

    def __init__(self, options: TokenizerOptions):
        """Needs --vocab-size."""
        super().__init__(options)
        if options.vocab_size is None:
            rule = "must be given, because NullTokenizer needs the number of ids"
            raise DataError(problem("--vocab-size", Words("nothing"), rule, "Add --vocab-size N"))
        self.eod = self.eos = int(options.vocab_size)
        self.vocab_size = self.eod + 1

    def encode(self, text: str) -> list[int]:
        """The numbers in `text`; raises DataError for anything else."""
        try:
            ids = [int(word) for word in text.split()]
        except ValueError as error:
            rule = "must be token ids separated by spaces"
            raise DataError(problem("Text for NullTokenizer", text[:40], rule, "Use another tokenizer")) from error
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            worst = max(ids) if min(ids) >= 0 else min(ids)
            rule = f"must be 0 to {self.vocab_size - 1}"
            raise DataError(problem("A token id", worst, rule, "Raise --vocab-size or correct the data"))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The numbers, separated by spaces."""
        return " ".join(str(int(i)) for i in ids)

    def tokens(self) -> list[str]:
        """Every id as a string."""
        return [str(i) for i in range(self.vocab_size)]

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """Words that are numbers, without leading zeros."""
        backend = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({str(i): i for i in range(self.vocab_size)}, unk_token=str(self.eod))
        )
        backend.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(r"(?<!\S)0+(?=\d)"), "")
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        return backend
