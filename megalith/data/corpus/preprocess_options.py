"""The options of `megalith data preprocess`: checks, notes, and the digest of what stored parts depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.common.extras import missing_package
from megalith.config.flags.text import Words
from megalith.data.corpus.inputs import Inputs, file_format, is_stream
from megalith.data.corpus.preprocess_pool import ENGINES
from megalith.data.corpus.sentences import language_code
from megalith.data.corpus.unusable import MAX_UNUSABLE, check_limit
from megalith.data.tokenizers.tokenizer import Tokenizer, TokenizerOptions

MIN_PART_BYTES, MAX_PART_BYTES = 4 << 20, 64 << 20  # of input; --partitions can ask for smaller ones
PARTS_VERSION = 2  # raise when the meaning of stored parts changes


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """The options of `megalith data preprocess`; the names are its flags."""

    input: Sequence[str]
    output_prefix: str
    tokenizer: TokenizerOptions
    json_keys: Sequence[str] = ("text",)
    split_sentences: bool = False
    lang: str = "english"
    keep_newlines: bool = False
    append_eod: bool = False
    prepend_bos: bool = False
    workers: int = 0  # 0: one for each core
    partitions: int = 1
    on_error: str = "skip"
    on_empty: str = "skip"
    max_unusable: float = MAX_UNUSABLE  # an int counts documents, a float is a fraction of them
    engine: str = "processes"
    fast: bool = True
    overwrite: bool = False


def check_options(options: PreprocessOptions) -> None:
    """Raise ConfigError that lists all mistakes in the options."""
    problems = []
    if not options.json_keys or len(set(options.json_keys)) != len(options.json_keys):
        rule = "must name at least one key, and each key once"
        problems.append(problem("--json-keys", list(options.json_keys), rule, "Correct the list"))
    if options.workers < 0 or options.partitions < 1:
        rule = "must be 0 (one for each core) or more, and --partitions 1 or more"
        found = Words(f"--workers {options.workers} and --partitions {options.partitions}")
        problems.append(problem("--workers", found, rule, "Correct them"))
    for flag, value, other in (("--on-error", options.on_error, "fail"), ("--on-empty", options.on_empty, "keep")):
        if value not in ("skip", other):
            problems.append(problem(flag, value, f"must be skip or {other}", "Choose one"))
    for check in (lambda: check_limit(options.max_unusable), lambda: language_code(options.lang)):
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    packages = {
        "sentencex": ("--split-sentences", options.split_sentences),
        "ray": ("--engine ray", options.engine == "ray"),
    }
    problems += [
        text for package, (name, used) in packages.items() if used and (text := missing_package(package, name))
    ]
    ENGINES.find(options.engine)
    if problems:
        raise ConfigError("\n".join(problems))


def check_keys(options: PreprocessOptions, inputs: Inputs) -> None:
    """Raise ConfigError for several keys where an input is plain text."""
    texts = [path for path in inputs.files if not is_stream(path) and file_format(path)[0] == "text"]
    if len(options.json_keys) > 1 and texts:
        rule = f"must be one key, because {texts[0]} is plain text, which has one text and no keys"
        raise ConfigError(problem("--json-keys", list(options.json_keys), rule, "Give one key"))


def require_special_tokens(options: PreprocessOptions, tokenizer: Tokenizer) -> None:
    """Raise DataError where the tokenizer lacks a token that the options add."""
    for name in ["eod"] * options.append_eod + ["bos"] * options.prepend_bos:
        tokenizer.require(name)


def output_prefixes(options: PreprocessOptions) -> dict[str, str]:
    """The prefix of each key's dataset."""
    level = "sentence" if options.split_sentences else "document"
    return {key: f"{options.output_prefix}_{key}_{level}" for key in options.json_keys}


def option_notes(options: PreprocessOptions, inputs: Inputs, tokenizer: Tokenizer) -> list[str]:
    """Lines on what the user may not expect of these options with this input and tokenizer."""
    return [*_no_effect_notes(options), *_duplicate_token_notes(options, tokenizer), *_plain_text_notes(inputs)]


def _no_effect_notes(options: PreprocessOptions) -> list[str]:
    """Lines on options that do not do all that their names say."""
    if not options.split_sentences:
        sentence_flags = {"--lang": options.lang != "english", "--keep-newlines": options.keep_newlines}
        used = [flag for flag, given in sentence_flags.items() if given]
        return [f"{flag} has no effect without --split-sentences: documents are not split" for flag in used]
    code = language_code(options.lang)
    if len(code) < 3:
        return []
    rules = "by its rules or its nearest language's; where none are known, by those of English"
    return [f"--lang {code}: sentences are split {rules}"]


def _duplicate_token_notes(options: PreprocessOptions, tokenizer: Tokenizer) -> list[str]:
    """Lines on tokens that both the tokenizer and an option add to every document, as it happens in Megatron too."""
    lines = []
    for flag, name, index, where in (("--append-eod", "eod", -1, "after"), ("--prepend-bos", "bos", 0, "before")):
        token, given = getattr(tokenizer, name), getattr(options, flag[2:].replace("-", "_"))
        if given and all(ids and ids[index] == token for ids in map(tokenizer.encode, ("", "a"))):
            twice = f"the tokenizer itself puts id {token} {where} every text, and documents get it twice"
            lines.append(f"{flag}: {twice}; leave out {flag}")
    return lines


def _plain_text_notes(inputs: Inputs) -> list[str]:
    """A line on plain text: it has no marks of where a document ends."""
    texts = [path for path in inputs.files if file_format(path)[0] == "text"]
    if not texts:
        return []
    subject = f"{inputs.location(texts[0], 1)} is plain text and becomes one document"
    if len(texts) > 1:
        subject = f"{len(texts)} files are plain text and become one document each"
    return [f"{subject}, which --split cannot divide; JSON lines hold a document a line"]


def input_sizes(options: PreprocessOptions, inputs: list[str]) -> tuple[int, int]:
    """Bytes of all inputs, and of a part."""
    total = sum(os.path.getsize(path) for path in inputs)
    default = max(MIN_PART_BYTES, min(total // 4096, MAX_PART_BYTES))
    return total, max(1, min(default, -(-total // options.partitions)))


def fingerprint(options: PreprocessOptions, inputs: Inputs, part_bytes: int, tokenizer: str) -> str:
    """Digest of what the parts depend on: settings, tokenizer files, and name, size, time and samples of each input."""
    settings = (
        options.split_sentences,
        options.lang,
        options.keep_newlines,
        options.append_eod,
        options.prepend_bos,
        options.on_empty,
    )
    content = [PARTS_VERSION, part_bytes, list(options.json_keys), settings, tokenizer]
    digest = hashlib.sha256(json.dumps(content).encode())
    update_with_inputs(digest, inputs)
    return digest.hexdigest()


def update_with_inputs(digest: Any, inputs: Inputs) -> None:
    """Add name, size, time and samples of each input to a digest of hashlib."""
    for path in inputs.files:
        if path in inputs.digests:
            digest.update(inputs.digests[path].encode())
            continue
        stat = os.stat(path)
        digest.update(f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode())
        with open(path, "rb") as file:
            for offset in (0, stat.st_size // 2, max(0, stat.st_size - 4096)):
                file.seek(offset)
                digest.update(file.read(4096))
