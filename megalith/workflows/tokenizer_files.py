"""Tokenizer files of a converted checkpoint, from which AutoTokenizer must give the ids that preprocessing gave."""

from __future__ import annotations

import dataclasses
import pathlib

from megalith.checkpoint.formats import HuggingFaceOptions, Options
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.tokenizer import (
    FOLDER,
    LEGACY_FILES,
    files_for_transformers,
    tokenizer_files,
)
from megalith.checkpoint.weights import Weights
from megalith.common.errors import DataError
from megalith.data.tokenizers.export import transformers_files
from megalith.data.tokenizers.given import TokenizerOverride, vocab_size_notes
from megalith.data.tokenizers.tokenizer import RECORD, load_tokenizer


def with_tokenizer(
    weights: Weights, options: Options, given: TokenizerOverride, folder: pathlib.Path
) -> tuple[Weights, Options]:
    """The weights with the files of their tokenizer, and notes: the one given, saved in `folder`, or the source's.

    A Hugging Face folder is copied as it is. Raises DataError or ConfigError where what is given makes no tokenizer.
    """
    stored = [name for name in weights.files if name.startswith(FOLDER)]
    if not given:
        if stored or weights.config.data.tokenizer_type == "NullTokenizer":
            return weights, options
        note = (
            "no tokenizer is converted along, and text needs one: add --tokenizer FOLDER, "
            "or --vocab-file FILE --merge-file FILE"
        )
        return dataclasses.replace(weights, notes=(*weights.notes, note)), options
    tokenizer, rows = given.build(weights.config.data), weights.config.model.vocab_size or 0
    notes = [*weights.notes, *given.notes]
    notes += vocab_size_notes(tokenizer.vocab_size, rows)
    hugging_face = given.folder is not None and not (given.folder / RECORD).exists() and tokenizer_files(given.folder)
    if hugging_face:
        files = hugging_face
    else:
        tokenizer.save(folder)
        files = {f"{FOLDER}{file.name}": file for file in sorted(folder.iterdir())}
        options = dataclasses.replace(options, tokenizer=folder)
    others = {name: file for name, file in weights.files.items() if not name.startswith(FOLDER)}
    config = weights.config.replace(tokenizer_type=tokenizer.options.tokenizer_type)
    return dataclasses.replace(weights, config=config, files=others | files, notes=tuple(notes)), options


def files_for_export(
    weights: Weights, options: HuggingFaceOptions, folder: pathlib.Path
) -> tuple[HuggingFaceOptions, tuple[str, ...]]:
    """Write tokenizer files of `weights` (or of options.tokenizer) into `folder`; options that name it, and notes.

    Files that came with a Hugging Face folder's weights are copied as they are, and then the options do not change.
    """
    named = {name: file for name, file in weights.files.items() if name.startswith(FOLDER)}
    source = options.tokenizer or next((file.parent for file in named.values()), None)
    if source is None:
        return options, ()
    published = options.tokenizer is None and f"{huggingface.SOURCE_FOLDER}{huggingface.CONFIG}" in weights.files
    if published and not (source / RECORD).is_file():
        return options, ()
    here = {f"{FOLDER}{file.name}": file for file in source.iterdir() if file.is_file()}
    model, notes = weights.config.model, list[str]()
    files = {name: content for name, content in files_for_transformers(here).items() if name not in LEGACY_FILES}
    try:
        tokenizer = load_tokenizer(source, weights.config.data)
        if tokenizer.vocab_size > (model.vocab_size or 0):
            notes += vocab_size_notes(tokenizer.vocab_size, model.vocab_size or 0)
        files |= transformers_files(tokenizer, causal=model.causal, decoder=model.architecture.decoder)
        if not model.causal and tokenizer.split_special_tokens:
            notes.append(
                "AutoTokenizer reads [MASK] in a text as ordinary characters, as preprocessing did; for a fill-mask "
                "pipeline give it tokenizer=AutoTokenizer.from_pretrained(FOLDER, split_special_tokens=False)"
            )
        if huggingface.choose_family(weights, options)[0] in FIXED:
            notes.append(
                "AutoTokenizer takes Qwen2Tokenizer for every qwen2, whatever the files say: "
                "PreTrainedTokenizerFast gives the ids of preprocessing"
            )
    except DataError as error:
        notes.append(
            "tokenizer files are copied as they are, and AutoTokenizer may read them in another way, or not at all: "
            f"{error}"
        )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return dataclasses.replace(options, tokenizer=folder), tuple(notes)


# Model types whose tokenizer class transformers 5 fixes (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS).
FIXED = ("qwen2",)
