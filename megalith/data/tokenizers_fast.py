"""GPT-2's and BERT's tokenizers from their original vocabulary files.

As in Megatron, special tokens are never matched inside a text: a document that contains the characters `<|endoftext|>` or `[SEP]`
does not end there.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megalith.common.errors import DataError, problem
from megalith.data.tokenizers import TokenizerOptions
from megalith.data.tokenizers_huggingface import LibraryTokenizer, byte_level_bpe

END_OF_TEXT = "<|endoftext|>"
MAX_WORD_CHARACTERS = 200  # Google's value, which Megatron uses; the library's own default is 100
MAX_REMEMBERED_WORDS = 400_000  # about 80 MB, and as much again for pieces of words
SAMPLE = 1 << 16  # bytes of a batch that are counted to tell which kind it is
PROSE = 7.5  # bytes a word, white space included; source code has more, and its words seldom come again whole
PIECES = re.compile(rb"[^\s!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]+").findall  # runs without ASCII punctuation, and runs of it
# BERT's cleaning deletes these, while bytes.split would split at them: deleting them first makes both agree.
VERTICAL = b"\x0b\x0c"


class GPT2BPETokenizer(LibraryTokenizer):
    """GPT-2's byte-level BPE from --vocab-file (vocab.json) and --merge-file (merges.txt); eod is `<|endoftext|>`, there is no pad."""

    def __init__(self, options: TokenizerOptions):
        """Load both files."""
        vocab_file, merge_file = options.file("vocab_file"), options.file("merge_file")
        try:
            backend = byte_level_bpe(vocab_file, merge_file)
        except Exception as error:  # the library raises bare Exception
            rule = f"they must be GPT-2's vocab.json and merges.txt ({error})"
            raise DataError(
                problem("--vocab-file and --merge-file", [str(vocab_file), str(merge_file)], rule, "Check the two paths")
            ) from error
        super().__init__(options, backend)
        # Sentinels get ids but stay out of the library's tables: text that looks like one is still just text.
        self.extra_ids = range(self.vocab_size, self.vocab_size + options.vocab_extra_ids)
        self.vocab_size += options.vocab_extra_ids
        self.eod = self.eos = self.bos = backend.token_to_id(END_OF_TEXT)

    def tokens(self) -> list[str]:
        """The vocabulary in id order."""
        listed = super().tokens()
        for i, sentinel in enumerate(self.extra_ids):
            listed[sentinel] = f"<extra_id_{i}>"
        return listed

    def decode(self, ids) -> str:
        """Text of token ids; sentinels stay visible."""
        pieces, plain = [], super().decode
        for is_sentinel, run in itertools.groupby(map(int, ids), lambda i: i in self.extra_ids):
            numbers = list(run)
            pieces += [f"<extra_id_{i - self.extra_ids[0]}>" for i in numbers] if is_sentinel else [plain(numbers)]
        return "".join(pieces)


class BertWordPiece(LibraryTokenizer):
    """BERT's WordPiece from --vocab-file (one token a line); [BOS] and [EOS] are appended where absent, then the sentinels."""

    lower_case: bool

    def __init__(self, options: TokenizerOptions):
        """Load the file."""
        vocabulary = _read_vocabulary(options)
        sentinels = [f"<extra_id_{i}>" for i in range(options.vocab_extra_ids)]
        for token in ("[BOS]", "[EOS]", *sentinels):
            vocabulary.setdefault(token, len(vocabulary))
        # The library may hold them: its pre-tokenizer splits at brackets, so no text ever yields one whole.
        backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS))
        backend.normalizer = normalizers.BertNormalizer(lowercase=self.lower_case)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        super().__init__(options, backend)
        self.cls, self.sep, self.pad, self.mask = (vocabulary.get(f"[{name}]") for name in ("CLS", "SEP", "PAD", "MASK"))
        self.bos, self.eos = vocabulary["[BOS]"], vocabulary["[EOS]"]
        self.eod = self.eos
        self.extra_ids = [vocabulary[token] for token in sentinels]
        self._words: WordMemory | None = None

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each."""
        return self._words.encode_flat(texts) if self._words is not None else super().encode_flat(texts)

    def accelerate(self, sample: Sequence[str]) -> tuple[bool, str]:
        """Remember words already encoded, if that gives the ids of encoding whole texts for every text of `sample`."""
        words = WordMemory(self.backend, self.lower_case, self.vocab_size)
        ids, lengths = words.encode_flat(sample)
        expected = [encoding.ids for encoding in self.backend.encode_batch_fast(list(sample), add_special_tokens=False)]
        if [len(row) for row in expected] != lengths.tolist() or list(itertools.chain.from_iterable(expected)) != ids.tolist():
            return False, "encoder: tokenizers (remembering words gave other ids for a sample of this input)"
        self._words = words
        return True, f"encoder: tokenizers with a memory of words (same ids as without on {len(sample)} sampled texts)"


class BertWordPieceLowerCase(BertWordPiece):
    """BERT uncased."""

    lower_case = True


class BertWordPieceCase(BertWordPiece):
    """BERT cased."""

    lower_case = False


def _read_vocabulary(options: TokenizerOptions) -> dict[str, int]:
    path = options.file("vocab_file")
    try:
        vocabulary = {line.strip(): i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines())}
    except UnicodeDecodeError as error:
        raise DataError(
            problem("--vocab-file", str(path), f"it must be UTF-8 text, one token a line ({error})", "Check the path")
        ) from error
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]") if token not in vocabulary]
    if missing:
        rule = f"a BERT vocabulary holds {', '.join(missing)}, which this file lacks"
        raise DataError(problem("--vocab-file", str(path), rule, "Give BERT's vocab.txt (one token a line)"))
    return vocabulary


class WordMemory(dict):
    """Word -> its ids as bytes, learnt on first sight. WordPiece on remembered words, for text that is mostly words seen before.

    WordPiece looks neither across white space nor across punctuation, so the ids of a text are those of its words in a row, and a word's
    those of the pieces between its punctuation. Looking bytes up and joining them costs a tenth of normalising and matching again.
    """

    def __init__(self, backend: tokenizers.Tokenizer, lower_case: bool, vocab_size: int):
        """backend: a BERT WordPiece, which encodes what is not remembered."""
        super().__init__()
        self.backend, self.match, self.lower_case = backend, backend.model.tokenize, lower_case
        self.dtype = np.dtype(np.uint16 if vocab_size <= np.iinfo(np.uint16).max else np.int32)
        self.end = np.iinfo(np.uint16).max if self.dtype == np.uint16 else np.iinfo(np.int32).max  # no token has this id
        self.coded = [np.array(i, self.dtype).tobytes() for i in range(vocab_size)]  # one object an id, however many words share it
        self[b"\0"] = np.array(self.end, self.dtype).tobytes()

    def __missing__(self, word: bytes) -> bytes:
        """Ids of a new word, remembered while there is room: frequent words come early."""
        room = 2 * MAX_REMEMBERED_WORDS
        if word.isalnum():  # plain ASCII: normalising is lowering the case
            text = (word.lower() if self.lower_case else word).decode()
            ids = b"".join([self.coded[token.id] for token in self.match(text)])
        elif len(pieces := PIECES(word)) > 1:
            ids, room = b"".join(map(self.__getitem__, pieces)), MAX_REMEMBERED_WORDS
        else:
            text = word.decode("utf-8", "surrogatepass")
            ids = b"".join([self.coded[i] for i in self.backend.encode(text, add_special_tokens=False).ids])
        if len(self) < room:
            self[word] = ids
        return ids

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each."""
        if not texts:
            return np.empty(0, self.dtype), np.empty(0, np.int64)
        joined = " \0 ".join(texts)
        if joined.count("\0") >= len(texts):  # BERT's cleaning deletes it; here it ends a text
            joined = " \0 ".join(text.replace("\0", "") for text in texts)
        data = joined.encode("utf-8", "surrogatepass").translate(None, VERTICAL)
        sample = data[:SAMPLE]
        words = data.split() if len(sample) <= PROSE * len(sample.split()) else PIECES(data)
        ids = np.frombuffer(b"".join(map(self.__getitem__, words)), self.dtype)
        ends = np.flatnonzero(ids == self.end)
        return np.delete(ids, ends), np.diff(ends, prepend=-1, append=len(ids)) - 1
