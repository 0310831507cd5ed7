"""Tokenizers over a sentencepiece .model: Megatron's SentencePieceTokenizer, the GPT variant, and Llama 2's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from megalith.common.errors import DataError, problem
from megalith.common.extras import require
from megalith.data.tokenizers.huggingface import template_processing
from megalith.data.tokenizers.spm import from_sentencepiece_model
from megalith.data.tokenizers.tokenizer import Tokenizer, TokenizerOptions


class GPTSentencePieceTokenizer(Tokenizer):
    """The pieces of the model and nothing else; eod is its eos."""

    def __init__(self, options: TokenizerOptions):
        """Load --tokenizer-model."""
        super().__init__(options)
        library = require("sentencepiece", options.tokenizer_type)
        path = options.file("tokenizer_model")
        try:
            self.model = library.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            rule = f"must be a sentencepiece .model ({error})"
            cure = "For a tokenizer.json use --tokenizer-type HuggingFaceTokenizer"
            raise DataError(problem("--tokenizer-model", str(path), rule, cure)) from error
        self.vocab_size = self.model.get_piece_size()
        self.pad, self.bos, self.eos = (
            i if i >= 0 else None for i in (self.model.pad_id(), self.model.bos_id(), self.model.eos_id())
        )
        self.eod = self.eos

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.model.encode(text)

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each."""
        return _flat(self.model.encode(list(texts), num_threads=1))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids."""
        return self.model.decode([int(i) for i in ids])

    def tokens(self) -> list[str]:
        """The pieces in id order."""
        return [self.model.id_to_piece(i) for i in range(self.model.get_piece_size())]

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """Unigram or BPE of the same pieces."""
        return from_sentencepiece_model(self.model.serialized_model_proto())


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """As Megatron's: every text starts with BOS; eod is eos."""

    def encode(self, text: str) -> list[int]:
        """BOS and the token ids of one text."""
        return [self.require("bos"), *self.model.encode(text)]

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, BOS before each, and how many belong to each."""
        bos = self.require("bos")
        return _flat([[bos, *row] for row in self.model.encode(list(texts), num_threads=1)])

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """The tokenizer of the pieces, with BOS before every text."""
        backend = super().to_huggingface()
        backend.post_processor = template_processing(backend, self.require("bos"), None)
        return backend


class SentencePieceTokenizer(GPTSentencePieceTokenizer):
    """As Megatron's for T5 and BERT: the pieces, then <CLS> <SEP> <EOD> <MASK> and more.

    These are <PAD> <BOS> <EOS> where the model has none, and last the sentinels. All of them are found in the raw text
    before the model sees the text between them.
    """

    def __init__(self, options: TokenizerOptions):
        """Load --tokenizer-model and append what it lacks."""
        super().__init__(options)
        pieces = super().tokens()
        known = {piece: i for i, piece in enumerate(pieces)}

        def add(token: str) -> int:
            if token not in known:
                known[token] = len(known)
                pieces.append(token)
            self.special[token] = known[token]  # matched in the text even where the model already has it
            return known[token]

        self.special: dict[str, int] = {}
        self.cls, self.sep, self.eod, self.mask = (add(token) for token in ("<CLS>", "<SEP>", "<EOD>", "<MASK>"))
        self.pad, self.bos, self.eos = (
            add(fallback if i is None else pieces[i])
            for i, fallback in ((self.pad, "<PAD>"), (self.bos, "<BOS>"), (self.eos, "<EOS>"))
        )
        self.extra_ids = [add(f"<extra_id_{i}>") for i in range(options.vocab_extra_ids)]
        self.pieces, self.vocab_size = pieces, len(pieces)
        self._pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        ids: list[int] = []
        for piece in self._pattern.split(text):
            ids += [self.special[piece]] if piece in self.special else self.model.encode(piece)
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each."""
        return _flat([self.encode(text) for text in texts])

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; the appended tokens stay visible."""
        added = {i: token for token, i in self.special.items()}
        runs = itertools.groupby((int(i) for i in ids), lambda i: i in added)
        return " ".join(
            " ".join(added[i] for i in run) if special else self.model.decode(list(run)) for special, run in runs
        )

    def tokens(self) -> list[str]:
        """The vocabulary in id order."""
        return list(self.pieces)

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """The tokenizer of the pieces, and what was appended."""
        backend = super().to_huggingface()
        backend.add_special_tokens(sorted(self.special, key=self.special.__getitem__))
        return backend

    @property
    def split_special_tokens(self) -> bool:
        """Never: they are found in the text."""
        return False


def _flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths
