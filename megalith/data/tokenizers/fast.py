"""GPT-2's and BERT's tokenizers from their original vocabulary files.

As in Megatron, special tokens are never matched inside a text: a document that contains the characters `<|endoftext|>`
or `[SEP]` does not end there.
"""

from __future__ import annotations

import array
import itertools
import string
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.tokenizers.huggingface import LibraryTokenizer, byte_level_bpe
from megalith.data.tokenizers.tokenizer import TokenizerOptions

END_OF_TEXT = "<|endoftext|>"
MAX_WORD_CHARACTERS = 200  # Google's value, which Megatron uses; the library's own default is 100
MAX_CACHED_WORDS = 800_000  # some 150 MB; then the cache is cleared, and the frequent words are soon back
SLOT_BITS = 20  # 20 MB of slots; a quarter of them takes 15 % longer
# 2^64 over the golden ratio: multiplying by it spreads a word's bytes over the high bits
HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
BYTE_MASKS = np.array([(1 << 8 * count) - 1 for count in range(9)], "<u8")  # masks of the first 0 to 8 of 8 bytes
# White space is 0, ASCII punctuation 1, any other byte 2; a word is a run of 1 or of 2.
BYTE_CLASSES = bytes(0 if chr(i) in string.whitespace else 1 if chr(i) in string.punctuation else 2 for i in range(256))
DELETED_WHITE_SPACE = (
    b"\x0b\x0c"  # white space to Python; BERT's cleaning deletes it, so that the words around it merge
)


class GPT2BPETokenizer(LibraryTokenizer):
    """GPT-2's byte-level BPE from --vocab-file (vocab.json) and --merge-file (merges.txt).

    eod is `<|endoftext|>`, and there is no pad.
    """

    def __init__(self, options: TokenizerOptions):
        """Load both files."""
        vocab_file, merge_file = options.file("vocab_file"), options.file("merge_file")
        try:
            backend = byte_level_bpe(vocab_file, merge_file)
        except Exception as error:  # the library raises bare Exception
            what, found = "--vocab-file and --merge-file", Words(f"{vocab_file} and {merge_file}")
            rule = f"must be GPT-2's vocab.json and merges.txt ({error})"
            cure = "Write --vocab-file FOLDER/vocab.json --merge-file FOLDER/merges.txt"
            raise DataError(problem(what, found, rule, cure)) from error
        super().__init__(options, backend)
        # Sentinels get ids but stay out of the library's tables: text that looks like one is still just text.
        self.extra_ids = range(self.vocab_size, self.vocab_size + options.vocab_extra_ids)
        self.vocab_size += options.vocab_extra_ids
        self.eod = self.eos = self.bos = backend.token_to_id(END_OF_TEXT)

    def to_huggingface(self) -> tokenizers.Tokenizer:
        """The backend, with the sentinels."""
        backend = super().to_huggingface()
        backend.add_special_tokens([f"<extra_id_{i}>" for i in range(len(self.extra_ids))])
        return backend

    def tokens(self) -> list[str]:
        """The vocabulary in id order."""
        listed = super().tokens()
        for i, sentinel in enumerate(self.extra_ids):
            listed[sentinel] = f"<extra_id_{i}>"
        return listed

    def decode(self, ids) -> str:
        """Text of token ids; sentinels stay visible."""
        pieces, decode = [], super().decode
        for is_sentinel, run in itertools.groupby(map(int, ids), lambda i: i in self.extra_ids):
            numbers = list(run)
            pieces += [f"<extra_id_{i - self.extra_ids[0]}>" for i in numbers] if is_sentinel else [decode(numbers)]
        return "".join(pieces)


class BertWordPiece(LibraryTokenizer):
    """BERT's WordPiece from --vocab-file (one token a line); [BOS] and [EOS] are appended if absent, then sentinels."""

    lower_case: bool

    def __init__(self, options: TokenizerOptions):
        """Load the file."""
        vocabulary = _read_vocabulary(options)
        sentinels = [f"<extra_id_{i}>" for i in range(options.vocab_extra_ids)]
        for token in ("[BOS]", "[EOS]", *sentinels):
            vocabulary.setdefault(token, len(vocabulary))
        # The library may hold them: its pre-tokenizer splits at brackets, so no text ever yields one whole.
        backend = tokenizers.Tokenizer(
            models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
        )
        backend.normalizer = normalizers.BertNormalizer(lowercase=self.lower_case)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece(cleanup=False)
        super().__init__(options, backend)
        self.cls, self.sep, self.pad, self.mask = (
            vocabulary.get(f"[{name}]") for name in ("CLS", "SEP", "PAD", "MASK")
        )
        self.bos, self.eos = vocabulary["[BOS]"], vocabulary["[EOS]"]
        self.eod = self.eos
        self.extra_ids = [vocabulary[token] for token in sentinels]
        self._word_cache: WordCache | None = None

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each."""
        return self._word_cache.encode_flat(texts) if self._word_cache is not None else super().encode_flat(texts)

    def accelerate(self, sample: Sequence[str]) -> tuple[bool, str]:
        """Cache the ids of words, if that gives the ids of encoding whole texts for every text of `sample`."""
        cache = WordCache(self.backend, self.lower_case, self.vocab_size)
        ids, lengths = cache.encode_flat(sample)
        expected = [encoding.ids for encoding in self.backend.encode_batch_fast(list(sample), add_special_tokens=False)]
        same_lengths = [len(row) for row in expected] == lengths.tolist()
        if not same_lengths or list(itertools.chain.from_iterable(expected)) != ids.tolist():
            return False, "encoder: tokenizers (a cache of words gave other ids for a sample of this input)"
        self._word_cache = cache
        return True, f"encoder: tokenizers with a cache of words (same ids as without on {len(sample)} sampled texts)"


class BertWordPieceLowerCase(BertWordPiece):
    """BERT uncased."""

    lower_case = True


class BertWordPieceCase(BertWordPiece):
    """BERT cased."""

    lower_case = False


def _read_vocabulary(options: TokenizerOptions) -> dict[str, int]:
    path = options.file("vocab_file")
    try:
        vocabulary = {
            line.strip(): i for i, line in enumerate(path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))
        }
    except UnicodeDecodeError as error:
        rule = f"must be UTF-8 text, one token a line ({error})"
        raise DataError(problem("--vocab-file", str(path), rule, "Check the path")) from error
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]") if token not in vocabulary]
    if missing:
        rule, found = "must hold the special tokens of BERT", Words(f"{path} without {', '.join(missing)}")
        raise DataError(problem("--vocab-file", found, rule, "Give BERT's vocab.txt (one token a line)"))
    return vocabulary


class WordCache:
    """WordPiece with a cache of the ids of words, for text that is mostly words seen before.

    numpy splits a batch into words and looks them up as a whole. WordPiece looks neither across white space nor across
    punctuation, so the ids of a text are those of the runs of bytes between, one after the other. A run ("word") of up
    to 16 bytes is compared, as two integers, with the one word that its hash's slot holds; longer ones, and those whose
    slot holds another word, are found in a dict. This takes a tenth of the time of normalizing and matching again.
    """

    def __init__(self, backend: tokenizers.Tokenizer, lower_case: bool, vocab_size: int):
        """backend: a BERT WordPiece, which encodes the words that are not in the cache."""
        self.backend, self.match, self.lower_case = backend, backend.model.tokenize, lower_case
        self.dtype = "H" if vocab_size <= 1 << 16 else "i"  # for numpy and array.array: uint16, int32
        self.clear()

    def clear(self) -> None:
        """Hold nothing but word 0, NUL, which is put before each text and has no ids; empty slots hold it too."""
        self.word_numbers = {b"\0": 0}
        # ids of word w: ids[bounds[w] : bounds[w + 1]]
        self.ids, self.bounds = array.array(self.dtype), array.array("q", (0, 0))
        self.low, self.high, self.slot_words = (np.zeros(1 << SLOT_BITS, dtype) for dtype in ("<u8", "<u8", np.int32))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts end to end, and how many belong to each."""
        if not texts:
            return np.empty(0, self.dtype), np.empty(0, np.int64)
        batch = " \0 ".join(["", *texts])
        if batch.count("\0") > len(texts):  # BERT's cleaning deletes it; here it begins a text
            batch = " \0 ".join(["", *(text.replace("\0", "") for text in texts)])
        data = batch.encode("utf-8", "surrogatepass").translate(None, DELETED_WHITE_SPACE)
        words = self._words((data.lower() if self.lower_case else data) + b" " * 16)
        bounds = np.asarray(self.bounds)
        begins, counts = bounds[words], bounds[words + 1] - bounds[words]
        ends = np.cumsum(counts)
        ids = np.asarray(self.ids)[np.arange(ends[-1]) + np.repeat(begins - ends + counts, counts)]
        return ids, np.diff(ends[words == 0], append=ends[-1])

    def _words(self, data: bytes) -> np.ndarray:
        """Numbers of the words of `data`, which begins with white space and ends with 16 bytes of it."""
        if len(self.word_numbers) > MAX_CACHED_WORDS:
            self.clear()
        kinds = np.frombuffer(data.translate(BYTE_CLASSES), np.uint8)
        edges = np.flatnonzero(kinds[1:] != kinds[:-1]) + 1
        runs = np.flatnonzero(kinds[edges])
        starts, ends = edges[runs], edges[runs + 1]
        lengths = ends - starts
        windows = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # the 8 bytes from each byte on
        low = windows[starts] & BYTE_MASKS[np.minimum(lengths, 8)]
        high = windows[starts + 8] & BYTE_MASKS[np.clip(lengths - 8, 0, 8)]
        slots = ((low * HASH_MULTIPLIER ^ high) * HASH_MULTIPLIER >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        words = self.slot_words[slots]
        missed = np.flatnonzero((self.low[slots] != low) | (self.high[slots] != high) | (lengths > 16))
        words[missed] = self._look_up(
            [data[start:end] for start, end in zip(starts[missed].tolist(), ends[missed].tolist())]
        )
        short = missed[lengths[missed] <= 16]
        targets = slots[short]
        self.low[targets], self.high[targets], self.slot_words[targets] = low[short], high[short], words[short]
        return words

    def _look_up(self, words: list[bytes]) -> list[int]:
        """Numbers of words that were not in their slots; new words are encoded."""
        for word in words:
            if word not in self.word_numbers:
                self.ids.extend(self._encode(word))
                self.bounds.append(len(self.ids))
                self.word_numbers[word] = len(self.word_numbers)
        return [self.word_numbers[word] for word in words]

    def _encode(self, word: bytes) -> list[int]:
        if word.isalnum():  # ASCII, of which only the case is normalized, and that is done
            return [token.id for token in self.match(word.decode())]
        return self.backend.encode(word.decode("utf-8", "surrogatepass"), add_special_tokens=False).ids
