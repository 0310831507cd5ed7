"""Tokenizer files that go along with an export to Hugging Face: AutoTokenizer must give the ids that preprocessing gave."""

from __future__ import annotations

import dataclasses
import pathlib

from megalith.checkpoint.formats import Options
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.tokenizer import HERE, SPARE, found_in, written
from megalith.checkpoint.weights import Weights
from megalith.common.errors import DataError
from megalith.data.tokenizers.export import transformers_files
from megalith.data.tokenizers.given import GivenTokenizer, misfit
from megalith.data.tokenizers.tokenizer import RECORD, load_tokenizer


def with_tokenizer(
    weights: Weights, options: Options, given: GivenTokenizer, folder: pathlib.Path
) -> tuple[Weights, Options]:
    """The weights with the tokenizer that goes along with them: the one given, saved in `folder`, or their own; and what is to be told.

    A Hugging Face folder is copied as it is. Raises DataError or ConfigError where what is given makes no tokenizer.
    """
    own = [name for name in weights.files if name.startswith(HERE)]
    if not given:
        if own or weights.config.data.tokenizer_type == "NullTokenizer":
            return weights, options
        note = "no tokenizer goes along, and text needs one: add --tokenizer FOLDER, or --vocab-file FILE --merge-file FILE"
        return dataclasses.replace(weights, notes=(*weights.notes, note)), options
    tokenizer, rows = given.make(weights.config.data), weights.config.model.vocab_size or 0
    notes = [*weights.notes, *given.notes]
    notes += misfit(tokenizer.vocab_size, rows)
    plain = given.folder is not None and not (given.folder / RECORD).exists() and found_in(given.folder)
    if plain:
        files = plain
    else:
        tokenizer.save(folder)
        files = {f"{HERE}{file.name}": file for file in sorted(folder.iterdir())}
        options = dataclasses.replace(options, tokenizer=folder)
    others = {name: file for name, file in weights.files.items() if not name.startswith(HERE)}
    config = weights.config.replace(tokenizer_type=tokenizer.options.tokenizer_type)
    return dataclasses.replace(weights, config=config, files=others | files, notes=tuple(notes)), options


def prepared(weights: Weights, options: Options, folder: pathlib.Path) -> tuple[Options, tuple[str, ...]]:
    """Options with tokenizer files of `weights` (or of options.tokenizer) made in `folder`, and notes.

    Those that came with a Hugging Face folder's weights go along as they are: options then stay as they are, too.
    """
    named = {name: file for name, file in weights.files.items() if name.startswith(HERE)}
    source = options.tokenizer or next((file.parent for file in named.values()), None)
    if source is None:
        return options, ()
    published = options.tokenizer is None and f"{huggingface.KEPT}{huggingface.CONFIG}" in weights.files
    if published and not (source / RECORD).is_file():
        return options, ()
    own = {f"{HERE}{file.name}": file for file in source.iterdir() if file.is_file()}
    model, notes = weights.config.model, list[str]()
    files = {name: content for name, content in written(own).items() if name not in SPARE}
    try:
        tokenizer = load_tokenizer(source, weights.config.data)
        if tokenizer.vocab_size > (model.vocab_size or 0):
            notes += misfit(tokenizer.vocab_size, model.vocab_size or 0)
        files |= transformers_files(tokenizer, causal=model.causal, decoder=model.architecture.decoder)
        if not model.causal and tokenizer.literal:
            notes.append(
                "[MASK] in a text is plain characters to AutoTokenizer, as it was in preprocessing; for a fill-mask pipeline give it "
                "tokenizer=AutoTokenizer.from_pretrained(FOLDER, split_special_tokens=False)"
            )
        if huggingface.choose(weights, options)[0] in FIXED:
            notes.append(
                "AutoTokenizer takes Qwen2Tokenizer for every qwen2, whatever the files say: PreTrainedTokenizerFast gives our ids"
            )
    except DataError as error:
        notes.append(
            f"tokenizer files go along as they are, and AutoTokenizer may read them otherwise, or not at all: {error}"
        )
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return dataclasses.replace(options, tokenizer=folder), tuple(notes)


FIXED = ("qwen2",)  # model types whose tokenizer class transformers 5 fixes (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)
