"""The settings beside a tokenizer.json, as transformers keeps them: special tokens by role, and the chat template."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from megalith.common.errors import DataError, problem
from megalith.common.files import write_text
from megalith.common.pointers import refuse_pointer
from megalith.config.flags.text import Words
from megalith.data.tokenizers.tokenizer import CHAT_TEMPLATE

CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def files_beside(source: pathlib.Path | None, names: Sequence[str]) -> list[pathlib.Path]:
    """Those of the named files that lie beside a tokenizer.json (or vocab.json)."""
    folder = source if source is None or source.is_dir() else source.parent
    return [] if folder is None else [folder / name for name in names if (folder / name).is_file()]


def read_settings(source: pathlib.Path | None) -> dict[str, Any]:
    """The settings of tokenizer_config.json, for the rest those of special_tokens_map.json; and the chat template."""
    settings: dict[str, Any] = {}
    for file in files_beside(source, (CHAT_TEMPLATE, *CONFIG_FILES)):
        refuse_pointer(file)
        try:
            text = file.read_text(encoding="utf-8")
            content = {"chat_template": text} if file.name == CHAT_TEMPLATE else json.loads(text)
            settings = {key: value for key, value in content.items() if value is not None} | settings
        except (OSError, ValueError, AttributeError) as error:
            found, rule = Words(f"{type(error).__name__}: {error}"), "must be a JSON object"
            rule = "must be text in UTF-8" if file.name == CHAT_TEMPLATE else rule
            raise DataError(problem(str(file), found, rule, "Copy or download it again")) from None
    if not settings.keys() - {"chat_template"} and source is not None and source.is_dir():
        # as GPT2Tokenizer, which reads such folders
        settings |= dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>")
    return settings


def default_template(template: Any) -> str | None:
    """The template of tokenizer_config.json, which may have several by name."""
    if isinstance(template, list):
        template = {each.get("name"): each.get("template") for each in template}.get("default")
    return template if isinstance(template, str) else None


def token_content(token: Any) -> str:
    """The text of a token, which may be an object with its flags."""
    return token["content"] if isinstance(token, dict) else str(token)


def save_changes(folder: pathlib.Path, source: pathlib.Path | None, eos: Any, template: str | None) -> None:
    """Write another eos token than that of the source, and leave out its template where another is used."""
    file = folder / CONFIG_FILES[0]
    stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept = dict(stored)
    if eos != read_settings(source).get("eos_token"):
        kept["eos_token"] = eos
    if default_template(stored.get("chat_template")) not in (None, template):
        del kept["chat_template"]
    if kept != stored:
        write_text(file, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
