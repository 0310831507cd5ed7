"""Tokenizer files of Hugging Face folders, and of the folder tokenizer/ in megalith's checkpoints."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from megalith.checkpoint.formats.huggingface.files import read_json
from megalith.common.pointers import refuse_pointer

FOLDER = "tokenizer/"  # of these files in megalith's checkpoints
USUAL_FILES = re.compile(
    r"tokenizer.*|vocab\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|.*\.model|.*\.tiktoken|"
    r"chat_template\..*"
)
# Written by data/tokenizers/tokenizer.py: the tokenizer's type, and the file of each of its options.
RECORD = "megalith_tokenizer.json"
TRANSFORMERS_CLASSES = {  # tokenizer_type -> class in transformers, and {option: the file name that the class expects}
    "GPT2BPETokenizer": ("GPT2Tokenizer", {"vocab_file": "vocab.json", "merge_file": "merges.txt"}),
    "BertWordPieceLowerCase": ("BertTokenizer", {"vocab_file": "vocab.txt"}),
    "BertWordPieceCase": ("BertTokenizer", {"vocab_file": "vocab.txt"}),
    "HuggingFaceTokenizer": ("PreTrainedTokenizerFast", {"tokenizer_model": "tokenizer.json"}),
    "HFTokenizer": ("PreTrainedTokenizerFast", {"tokenizer_model": "tokenizer.json"}),
    "Llama2Tokenizer": ("LlamaTokenizer", {"tokenizer_model": "tokenizer.model"}),
}
# Files of older versions of transformers: tokenizer.json states all that they do.
LEGACY_FILES = ("special_tokens_map.json", "added_tokens.json")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
EOS_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "[SEP]")  # tried in this order where no file names the EOS


def tokenizer_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name in megalith's checkpoint: file} of a folder's tokenizer files: of usual names, or named in RECORD."""
    named = {RECORD, *map(str, read_json(folder / RECORD).values())} if (folder / RECORD).is_file() else set()
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    found = {f"{FOLDER}{file.name}": file for file in files if USUAL_FILES.fullmatch(file.name) or file.name in named}
    for file in found.values():
        refuse_pointer(file)  # it would be copied, and be found missing only when text is tokenized
    return found


def files_for_transformers(files: Mapping[str, pathlib.Path]) -> dict[str, bytes]:
    """{name in a Hugging Face folder: content} of a checkpoint's files, as transformers' AutoTokenizer expects them."""
    stored = {name.removeprefix(FOLDER): file for name, file in files.items() if name.startswith(FOLDER)}
    contents = {name: file.read_bytes() for name, file in stored.items() if USUAL_FILES.fullmatch(name)}
    record = read_json(stored[RECORD]) if RECORD in stored else {}
    class_name, names = TRANSFORMERS_CLASSES.get(record.get("tokenizer_type", ""), (None, {}))
    for option, name in names.items():
        file = stored.get(record.get(option) or "")
        if file is not None and file.name != name:
            contents.pop(file.name, None)
            contents[name] = file.read_bytes()
    if class_name and "tokenizer_config.json" not in contents:
        config = {"tokenizer_class": class_name}
        if class_name == "BertTokenizer":
            config["do_lower_case"] = record["tokenizer_type"] == "BertWordPieceLowerCase"
        contents["tokenizer_config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return contents


def token_ids(files: Mapping[str, bytes], content: Mapping[str, Any]) -> dict[str, int | None]:
    """{"bos_token_id": ...}, the special tokens' ids in tokenizer files.

    content: config.json so far; an id that the files do not state stays as it is there. A decoder's first token is the
    BOS, or the padding where there is no BOS, as in T5's own vocabulary.
    """
    vocabulary: dict[str, Any] = {}
    if "tokenizer.json" in files:
        read = json.loads(files["tokenizer.json"])
        tokens = read.get("model", {}).get("vocab", {})
        vocabulary = (
            dict(tokens) if isinstance(tokens, dict) else {token: number for number, (token, _) in enumerate(tokens)}
        )
        vocabulary |= {each["content"]: each["id"] for each in read.get("added_tokens", ())}
    elif "vocab.json" in files:
        vocabulary = json.loads(files["vocab.json"])
    named = json.loads(files.get("tokenizer_config.json", b"{}"))
    special: dict[str, int | None] = {}
    for name in ("bos", "eos", "pad"):
        special[name] = vocabulary.get(_content(named.get(f"{name}_token")) or "")
    if special["bos"] is None:
        special["bos"] = _first_token(files, _content(named.get("cls_token")))
    if special["eos"] is None:  # no file names it
        special["eos"] = next((vocabulary[token] for token in EOS_TOKENS if token in vocabulary), None)
    if "decoder_start_token_id" in content:
        special["decoder_start"] = special["bos"] if special["bos"] is not None else special["pad"]
    found = {f"{name}_token_id": number for name, number in special.items()}
    return {
        key: content.get(key) if number is None and (not vocabulary or key != "pad_token_id") else number
        for key, number in found.items()
    }


def end_of_text(files: Mapping[str, bytes], content: Mapping[str, Any]) -> dict[str, Any]:
    """{"eos_token_id": ...} of config.json or generation_config.json, with that of the tokenizer's files among them.

    content: the file so far, with one id or several. {} where it has none, or nothing changes.
    """
    end, known = token_ids(files, {})["eos_token_id"], content.get("eos_token_id")
    others = known if isinstance(known, list) else [known]
    return {} if None in (end, known) or end in others else {"eos_token_id": [end, *others]}


def generation_config(source: pathlib.Path | None, content: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    """The text of generation_config.json: the source's, with the end of text of these tokenizer files, if any.

    Without a source it has the tokens of `content`, which is config.json.
    """
    if source is None:
        ids = {key: content[key] for key in TOKEN_IDS if key in content}
        return json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n"
    text = source.read_text(encoding="utf-8")
    changes = end_of_text(files, json.loads(text)) if files else {}
    return json.dumps({**json.loads(text), **changes}, indent=2) + "\n" if changes else text


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _first_token(files: Mapping[str, bytes], other_than: str | None) -> int | None:
    """The id of the token that tokenizer.json's template puts before every text; None where it is `other_than`."""
    processor = json.loads(files.get("tokenizer.json", b"{}")).get("post_processor") or {}
    for each in processor.get("processors", [processor]):
        first = (each.get("single") or [{}])[0].get("SpecialToken")
        if first and first["id"] != other_than:
            return int(each["special_tokens"][first["id"]]["ids"][0])
    return None
