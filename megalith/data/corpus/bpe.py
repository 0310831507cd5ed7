"""Training a byte-level BPE vocabulary on the user's text."""

from __future__ import annotations

import os
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megalith.common.errors import ConfigError, problem
from megalith.common.files import write_text

END_OF_TEXT = "<|endoftext|>"
NUM_BYTES = 256  # every byte is a token, so that any text can be encoded


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    output: str | os.PathLike,
    *,
    special_tokens: tuple[str, ...] = (END_OF_TEXT,),
) -> int:
    """Train GPT-2's kind of tokenizer on `texts`, write it to `output` (a tokenizer.json), return its number of tokens.

    vocab_size counts special tokens and the 256 bytes; little text gives fewer. The special tokens take the last ids,
    as GPT-2's does. The same texts give the same file. Memory: the distinct words of the text and their counts.
    """
    smallest = NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        rule = f"must have room for the {NUM_BYTES} bytes and the special tokens ({len(special_tokens)})"
        raise ConfigError(problem("--vocab-size", vocab_size, rule, f"Use {smallest} or more"))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = vocab_size - len(special_tokens)
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(special_tokens))
    write_text(output, backend.to_str(pretty=True) + "\n")
    return backend.get_vocab_size(with_added_tokens=True)
