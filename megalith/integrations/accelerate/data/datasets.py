"""What indexed datasets need beside their files: a tokenizer; and datasets that a user's own function gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.config.megatron.counts import vocab_size_of_rows
from megalith.config.run import RunConfig
from megalith.config.sections.data import too_many_tokens
from megalith.data.tokenizers.tokenizer import load_tokenizer, tokenizer_from_config
from megalith.integrations.accelerate.session import Session

MEGATRON_NAMES = {  # array of a sample in Megatron -> its name here; None: it is made where it is used
    "tokens": "input_ids", "text": "input_ids", "position_ids": "positions", "types": "token_types",
    "is_random": "sentence_order", "text_enc": "input_ids", "text_dec": "decoder_input_ids", "attention_mask": None,
    "truncated": None, "enc_mask": None, "dec_mask": None, "enc_dec_mask": None, "dataset_id": None,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ModelVocabulary:
    """As much of a tokenizer as GPT's datasets need, of a model: its number of tokens, and what ends a document."""

    vocab_size: int
    eod: int | None


def tokenizer_type(config: RunConfig) -> str | None:
    """The type of the tokenizer that the config names; where it names files alone, that which is made from these."""
    data = config.data
    if data.tokenizer_type is not None:
        return data.tokenizer_type
    if data.merge_file:
        return "GPT2BPETokenizer"
    if data.vocab_file:
        return config.model.architecture.tokenizer_type
    return "HuggingFaceTokenizer" if data.tokenizer_model else None


def choose_tokenizer(config: RunConfig, session: Session, vocab_size: int | None = None) -> tuple[Any, str]:
    """The tokenizer of indexed datasets, and a line that says which it is.

    vocab_size: of a tokenizer that is made from a number, NullTokenizer; None is the model's.
    Raises ConfigError where BERT or T5 has none, or it has more tokens than the model.
    """
    rows, folder = config.model.vocab_size, session.tokenizer_folder
    if config.data.tokenizer_type is not None:
        size = vocab_size or vocab_size_of_rows(rows, config.data.tokenizer_type)
        tokenizer: Any = tokenizer_from_config(config.data, size)
        name = config.data.tokenizer_type
    elif (found := _of_folder(config, session)) is not None:
        tokenizer, name = found, f"that of {folder}"
    elif config.data.dataset == "gpt":
        end = getattr(session.hf_config, "eos_token_id", None)
        end = end[0] if isinstance(end, list) else end
        tokenizer, name = (
            ModelVocabulary(rows, end),
            f"none; the model has {rows} tokens, of which {end} ends documents",
        )
    else:
        rule = f"must be given, as a {config.data.dataset} dataset masks words"
        cure = "Write vocab_file=... (or tokenizer_model=...), or load the model from a folder that has it"
        raise ConfigError(problem("The tokenizer", Words("none"), rule, cure))
    if tokenizer.vocab_size > rows:
        raise ConfigError(too_many_tokens(tokenizer.vocab_size, rows))
    return tokenizer, f"tokenizer of the indexed datasets: {name}"


def _of_folder(config: RunConfig, session: Session) -> Any:
    if session.tokenizer_folder is None:
        return None
    try:
        return load_tokenizer(session.tokenizer_folder, config.data)
    except DataError:  # a model without its tokenizer
        return None


class ProvidedDataset:
    """A user's dataset, whose samples may have Megatron's names; numbered as it is.

    A sample of GPT is input_ids, labels and loss_mask [s] (and positions), or Megatron's text [s + 1].
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sample `index` under the names that megalith's datasets have. Raises DataError where one is missing."""
        given = {name: np.asarray(value) for name, value in self.dataset[index].items()}
        sample = {new: given[name] for name in given if (new := MEGATRON_NAMES.get(name, name)) is not None}
        if "text" in given and "labels" not in given:
            text = given["text"]
            sample |= {"input_ids": text[:-1], "labels": text[1:], "loss_mask": np.ones(len(text) - 1, np.float32)}
        if "enc_mask" in given and "padding_mask" not in sample:
            mask = given["enc_mask"]
            sample["padding_mask"] = mask if mask.ndim == 1 else mask.diagonal().copy()
        if missing := [name for name in ("input_ids", "labels", "loss_mask") if name not in sample]:
            found = Words(f"{', '.join(sample)}, without {' and '.join(missing)}")
            rule = "must have input_ids, labels (of the next token) and loss_mask, or Megatron's names of them"
            what = "A sample of custom_megatron_datasets_provider_function"
            raise DataError(problem(what, found, rule, "Return dicts of arrays that have them"))
        return sample
