"""The types of fields that JSON can give in several forms, and the fields of OpenAI that this server does not have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from megalith.common.errors import problem
from megalith.config.flags.text import unknown
from megalith.serving.answers import SHOWN, shown
from megalith.serving.errors import BadRequest
from megalith.serving.options import LONGEST_STOP, MOST_STOPS

LARGEST_TOKEN = 2**31 - 1  # of any vocabulary; the model's own is checked later
MAX_MESSAGES = 2048

# Fields that OpenAI's clients may send and this server has nothing for -> values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "audio": (), "function_call": ("none", "auto"), "functions": ([],), "modalities": (["text"],), "moderation": (),
    "parallel_tool_calls": (True, False), "prediction": (), "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},), "store": (False,), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "verbosity": (), "web_search_options": (),
}  # fmt: skip
UNSUPPORTED_OF_MESSAGES: Mapping[str, tuple[Any, ...]] = {
    "audio": (), "function_call": (), "tool_calls": ([],), "tool_call_id": (),
}  # fmt: skip
# Fields about OpenAI's own operation, which change no text.
IGNORED = (
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
    "service_tier",
)  # fmt: skip


def known_fields(fields: Any, names: Iterable[str], unsupported: Mapping[str, tuple[Any, ...]]) -> Any:
    """A JSON object without what asks for nothing. Raises BadRequest for fields not supported, or not known.

    A field that is not known is refused, as OpenAI does: a mistyped option that is left out unnoticed costs more than
    an error.
    """
    if not isinstance(fields, dict):
        return fields
    names = list(names)
    for name, value in fields.items():
        if name in unsupported and value is not None and value not in unsupported[name]:
            rule = "must be left out, because this server does not support it"
            raise BadRequest(problem(name, shown(value), rule, "Leave it out"), param=name)
        if name not in (*names, *unsupported, *IGNORED):
            otherwise = "/openapi.json lists the fields that there are"
            name = name[:SHOWN]  # it may be as large as a body, and looking for names takes time
            raise BadRequest(unknown("field", name, names, otherwise), param=name)
    return {name: value for name, value in fields.items() if name in names}


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_TOKEN


def is_text(value: Any) -> bool:
    """Whether it is a text that has a form in UTF-8: JSON can hold halves of surrogate pairs."""
    return isinstance(value, str) and (value.isascii() or value.encode("utf-8", "ignore").decode() == value)


def _check_prompt(value: Any) -> Any:
    if value is None or is_text(value):
        return value or ""
    if isinstance(value, list) and value:
        if all(map(is_text, value)) or all(map(_is_token, value)):
            return value
        if all(isinstance(each, list) and all(map(_is_token, each)) for each in value):
            return value
    rule = "must be a text, a list of texts, a list of token numbers, or a list of such lists"
    return _refuse(rule, "Give at least one prompt")


def _check_stop(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if value is None or (isinstance(texts, list) and len(texts) <= MOST_STOPS and all(map(_is_stop, texts))):
        return tuple(texts or ())
    rule = f"must be a text or a list of at most {MOST_STOPS} texts, each of 1 to {LONGEST_STOP} characters"
    return _refuse(rule, "Correct it, or leave it out")


def _is_stop(value: Any) -> bool:
    return is_text(value) and 0 < len(value) <= LONGEST_STOP


def _check_content(value: Any) -> Any:
    """The text of a message: itself, or the texts of its parts."""
    if isinstance(value, list) and value:
        if any(not isinstance(each, dict) or each.get("type") != "text" for each in value):
            return _refuse("must have parts of type text alone", "Leave out the others")
        value = [each.get("text") for each in value]
        value = "".join(value) if all(map(is_text, value)) else None
    return value if is_text(value) else _refuse("must be a text, or a list of parts of type text", "Correct it")


def _check_bias(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict) and all(map(_is_bias, value.items())):
        return {int(token): float(bias) for token, bias in value.items()}
    return _refuse("must be an object of token numbers, each with a number from -100 to 100", "Correct it")


def _is_bias(item: tuple[str, Any]) -> bool:
    token, bias = item
    return token.isascii() and token.isdecimal() and len(token) < 10 and type(bias) in (int, float) and abs(bias) <= 100


def _refuse(rule: str, cure: str) -> Any:
    raise PydanticCustomError("refused", rule, {"cure": cure})  # type: ignore[arg-type]


TOKEN = {"type": "integer", "minimum": 0, "maximum": LARGEST_TOKEN}
TOKENS = {"type": "array", "items": TOKEN}
TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
STOP = {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP}
Token = Annotated[int, Field(ge=0, le=LARGEST_TOKEN)]
# Checked by hand: pydantic's unions would try each form on each token, and report every form that does not fit; of an
# object it would report every entry that is wrong, of which a body has room for a hundred thousand.
Prompt = Annotated[Any, BeforeValidator(_check_prompt), WithJsonSchema({"anyOf": [
    {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}, TOKENS | {"minItems": 1},
    {"type": "array", "items": TOKENS, "minItems": 1}, {"type": "null"},
]})]  # fmt: skip
Stop = Annotated[Any, BeforeValidator(_check_stop), WithJsonSchema({"anyOf": [
    STOP,
    {"type": "array", "items": STOP, "maxItems": MOST_STOPS},
    {"type": "null"},
]})]  # fmt: skip
Content = Annotated[Any, BeforeValidator(_check_content), WithJsonSchema({"anyOf": [
    {"type": "string"}, {"type": "array", "items": TEXT_PART, "minItems": 1}
]})]  # fmt: skip
LogitBias = Annotated[Any, BeforeValidator(_check_bias), WithJsonSchema({"anyOf": [
    {
        "type": "object", "patternProperties": {"^[0-9]{1,9}$": {"type": "number", "minimum": -100, "maximum": 100}},
        "additionalProperties": False,
    },
    {"type": "null"},
]})]  # fmt: skip
