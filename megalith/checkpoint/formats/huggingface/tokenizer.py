"""Tokenizer files between Hugging Face folders and the tokenizer/ of our checkpoints."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.files import read_json
from megalith.common.pointers import refuse_pointer

HERE = "tokenizer/"  # where our checkpoints keep them
FILES = re.compile(
    r"tokenizer.*|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model|.*\.tiktoken|chat_template\..*"
)
RECORD = "megalith_tokenizer.json"  # of data/tokenizers/tokenizer.py: the tokenizer's type, and which file is which of its options
NAMED = {  # type -> transformers' class, and the names it wants of the files
    "GPT2BPETokenizer": ("GPT2Tokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
    "BertWordPieceLowerCase": ("BertTokenizer", {"vocab_file": "vocab.txt"}),
    "BertWordPieceCase": ("BertTokenizer", {"vocab_file": "vocab.txt"}),
    "HuggingFaceTokenizer": ("PreTrainedTokenizerFast", {"tokenizer_model": "tokenizer.json"}),
    "HFTokenizer": ("PreTrainedTokenizerFast", {"tokenizer_model": "tokenizer.json"}),
    "Llama2Tokenizer": ("LlamaTokenizer", {"tokenizer_model": "tokenizer.model"}),
}
SPARE = (
    "special_tokens_map.json",
    "added_tokens.json",
)  # of older versions of transformers: tokenizer.json has all that they say
IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]")  # words that end a text, where no file names one


def found_in(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name in a checkpoint of ours: file} of the tokenizer files in a folder: those of usual names, and those that a record names."""
    named = {RECORD, *map(str, read_json(folder / RECORD).values())} if (folder / RECORD).is_file() else set()
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    found = {f"{HERE}{file.name}": file for file in files if FILES.fullmatch(file.name) or file.name in named}
    for file in found.values():
        refuse_pointer(file)  # it would be copied, and missed when text is asked for
    return found


def written(files: Mapping[str, pathlib.Path]) -> dict[str, bytes]:
    """{name in a Hugging Face folder: content} of a checkpoint's files, as transformers' AutoTokenizer wants them."""
    own = {name.removeprefix(HERE): file for name, file in files.items() if name.startswith(HERE)}
    made = {name: file.read_bytes() for name, file in own.items() if FILES.fullmatch(name)}
    record = read_json(own[RECORD]) if RECORD in own else {}
    kind, names = NAMED.get(record.get("tokenizer_type", ""), (None, {}))
    for option, name in names.items():
        file = own.get(record.get(option) or "")
        if file is not None and file.name != name:
            made.pop(file.name, None)
            made[name] = file.read_bytes()
    if kind and "tokenizer_config.json" not in made:
        lower = (
            {"do_lower_case": record["tokenizer_type"] == "BertWordPieceLowerCase"} if kind == "BertTokenizer" else {}
        )
        made["tokenizer_config.json"] = (json.dumps({"tokenizer_class": kind, **lower}, indent=2) + "\n").encode()
    return made


def ids(made: Mapping[str, bytes], content: Mapping[str, Any]) -> dict[str, int | None]:
    """{"bos_token_id": ...}: the ids of these parts for a config.json with this content so far; one that the files do not tell stays.

    A decoder begins with the BOS, or with the padding where there is none, as in T5's own vocabulary.
    """
    vocabulary: dict[str, Any] = {}
    if "tokenizer.json" in made:
        read = json.loads(made["tokenizer.json"])
        words = read.get("model", {}).get("vocab", {})
        vocabulary = (
            dict(words) if isinstance(words, dict) else {word: number for number, (word, _) in enumerate(words)}
        )
        vocabulary |= {each["content"]: each["id"] for each in read.get("added_tokens", ())}
    elif "vocab.json" in made:
        vocabulary = json.loads(made["vocab.json"])
    named = json.loads(made.get("tokenizer_config.json", b"{}"))
    parts: dict[str, int | None] = {}
    for part in ("bos", "eos", "pad"):
        parts[part] = vocabulary.get(_content(named.get(f"{part}_token")) or "")
    if parts["bos"] is None:
        parts["bos"] = _begins(made, _content(named.get("cls_token")))
    if parts["eos"] is None:  # nothing names it
        parts["eos"] = next((vocabulary[word] for word in ENDS if word in vocabulary), None)
    if "decoder_start_token_id" in content:
        parts["decoder_start"] = parts["bos"] if parts["bos"] is not None else parts["pad"]
    found = {f"{part}_token_id": number for part, number in parts.items()}
    return {
        key: content.get(key) if number is None and (not vocabulary or key != "pad_token_id") else number
        for key, number in found.items()
    }


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _begins(made: Mapping[str, bytes], other_than: str | None) -> int | None:
    """The token that the template of tokenizer.json puts before every text, if it is another than that."""
    processor = json.loads(made.get("tokenizer.json", b"{}")).get("post_processor") or {}
    for each in processor.get("processors", [processor]):
        first = (each.get("single") or [{}])[0].get("SpecialToken")
        if first and first["id"] != other_than:
            return int(each["special_tokens"][first["id"]]["ids"][0])
    return None
