"""The body of PUT /api: one table of its fields for what is checked and for what is documented.

Megatron's fields have Megatron's names, defaults and limits; beside them every field of GenerationParams may be given
by its own name. What Megatron refuses with a text and status 200 is an error here.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from megalith.common.errors import ConfigError, MegalithError, problem
from megalith.config.flags.text import Words, fail, flag, nearest
from megalith.generation.params import EXPECTED, LARGEST_PENALTY, GenerationParams
from megalith.serving.answers import SHOWN, shown
from megalith.serving.errors import ServingError
from megalith.serving.options import LONGEST_STOP, MOST_STOPS, ServeOptions

MAX_TEXTS = 128  # of one request: prompts, and results
MAX_PROBLEMS = 9  # that an error lists: there may be a hundred thousand, and looking for names takes time

INTEGER, NUMBER, BOOLEAN, TEXT = {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "string"}
STOP = TEXT | {"maxLength": LONGEST_STOP}
SCHEMAS: dict[str, dict[str, Any]] = {  # type of a field, as GenerationParams has it -> JSON Schema of its values
    "int": INTEGER,
    "float": NUMBER,
    "bool": BOOLEAN,
    "tuple[str, ...]": {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": MOST_STOPS}]},
    "tuple[int, ...]": {"type": "array", "items": INTEGER},
    "Mapping[int, float]": {"type": "object", "additionalProperties": NUMBER},
}


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of a body.

    rule: what must hold, for errors. sets: the field of GenerationParams that it is another name for. low, high: limits
    of a number, which may have these values; above: a limit that it may not have.
    """

    name: str
    kind: str
    help: str
    rule: str
    sets: str | None = None
    default: Any = None
    low: float | None = None
    high: float | None = None
    above: float | None = None

    @property
    def optional(self) -> bool:
        """Whether null is a value."""
        return self.kind.endswith(" | None")

    @property
    def schema(self) -> dict[str, Any]:
        """Its JSON Schema."""
        schema = {**SCHEMAS[self.kind.removesuffix(" | None")], "description": self.help}
        words = {"default": self.default, "minimum": self.low, "maximum": self.high, "exclusiveMinimum": self.above}
        schema |= {word: value for word, value in words.items() if value is not None}
        return schema | ({"type": [schema["type"], "null"]} if self.optional else {})

    def accepts(self, value: Any) -> bool:
        """Whether a value is of its type and within its limits."""
        if value is None:
            return self.optional
        return _is(self.kind.removesuffix(" | None"), value) and not (
            (self.low is not None and value < self.low)
            or (self.high is not None and value > self.high)
            or (self.above is not None and value <= self.above)
        )


def _is(kind: str, value: Any) -> bool:
    """Whether a JSON value is of a type; whole numbers are numbers too, true and false are none."""
    if kind == "bool":
        return isinstance(value, bool)
    if kind in ("int", "float"):
        return isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
    if kind == "tuple[str, ...]":
        texts = [value] if isinstance(value, str) else value
        return isinstance(texts, list) and len(texts) <= MOST_STOPS and all(map(_is_stop, texts))
    if kind == "tuple[int, ...]":
        return isinstance(value, list) and all(_is("int", each) for each in value)
    return isinstance(value, dict) and all(token.isdecimal() and _is("float", value[token]) for token in value)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_STOP


def _switch(name: str, help: str, sets: str | None = None) -> Field:
    return Field(name, "bool", help, "must be a boolean value", sets, False)


MEGATRON = (
    Field(
        "tokens_to_generate", "int", "most new tokens; 0 only scores the prompts, and needs logprobs",
        "must be an integer greater than or equal to 0", "max_new_tokens", 64, low=0,
    ),
    Field("logprobs", "bool", "return the log-probabilities of all tokens after the first", "must be a boolean value",
          "prompt_logprobs", False),
    Field("temperature", "float", "logits are divided by it (default: the server's --temperature)",
          "must be a positive number less than or equal to 100.0", "temperature", above=0, high=100),
    Field("top_k", "int", "choose among the k likeliest tokens; 1 is greedy, 0 is off (default: the server's --top-k)",
          "must be an integer equal to or greater than 0 and less than or equal to 1000", "top_k", low=0, high=1000),
    Field("top_p", "float", "choose among the likeliest tokens that have this probability together; 0 is off (default: "
          "the server's --top-p). With neither top_k nor top_p tokens are drawn among all",
          "must be a positive number less than or equal to 1.0, or 0 for off", "top_p", low=0, high=1),
    Field("top_p_decay", "float", "top_p is multiplied by this after each new token",
          "must be a number from 0 (off) to 1.0", "top_p_decay", low=0, high=1),
    Field("top_p_bound", "float", "where top_p_decay ends", "must be a number greater than 0 and at most top_p",
          "top_p_bound", above=0, high=1),
    _switch("add_BOS", "put the end-of-document token before each prompt; an empty prompt needs it", "add_bos"),
    _switch("stop_on_double_eol", "end after the first empty line", "stop_on_double_eol"),
    _switch("stop_on_eol", "end after the first newline", "stop_on_eol"),
    _switch("prevent_newline_after_colon", "no newline follows a colon", "prevent_newline_after_colon"),
    Field("random_seed", "int", "the same seed gives the same texts; -1: another each time",
          "must be a positive integer, or -1 for another seed each time", "seed", -1, low=-1),
    _switch("no_log", "keep prompts and texts out of the server's log. They never are in it, whatever this says"),
    Field("beam_width", "int | None", "beam search for one prompt, with so many beams, which are the texts",
          f"must be an integer from 1 to {MAX_TEXTS}", "beam_width", low=1, high=MAX_TEXTS),
    Field("stop_token", "int", "of beam search alone: the token that ends a text, in place of end of document; "
          "stop_token_ids is for all", "must be an integer that numbers a token", low=0),
    Field("length_penalty", "float", "of beam search alone: beams are ranked by log-probability / "
          "length^length_penalty", f"must be a number from -{LARGEST_PENALTY:g} to {LARGEST_PENALTY:g}",
          "length_penalty", 1.0, low=-LARGEST_PENALTY, high=LARGEST_PENALTY),
)  # fmt: skip
REPLACED = {"max_len": "tokens_to_generate", "sentences": "prompts"}  # fields of older servers -> what took their place
HINTS = {"stream": "texts are streamed by POST /v1/completions", "messages": "chats are for POST /v1/chat/completions"}
LIMITS: dict[str, dict[str, float]] = {
    "num_samples": {"low": 1, "high": MAX_TEXTS},
    "top_logprobs": {"low": 0, "high": 100},
}


def _own_field(each: dataclasses.Field) -> Field:
    """A field that only megalith has."""
    kind, default = str(each.type), getattr(GenerationParams(), each.name)
    rule, limits = f"must be {EXPECTED[kind.removesuffix(' | None')]}", LIMITS.get(each.name, {})
    if limits:
        rule += f" from {limits['low']} to {limits['high']}"
    if kind == "tuple[str, ...]":
        rule += f", at most {MOST_STOPS}, of at most {LONGEST_STOP} characters each"
    default = default if isinstance(default, (int, float)) else None
    return Field(each.name, kind, str(each.metadata["help"]), rule, each.name, default, **limits)


_KNOWN = {each.name for each in MEGATRON}
OWN = tuple(_own_field(each) for each in dataclasses.fields(GenerationParams) if each.name not in _KNOWN)
FIELDS = {each.name: each for each in (*MEGATRON, *OWN)}


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """What a body asks for. logprobs: whether its answer has log-probabilities."""

    prompts: list[str]
    params: GenerationParams
    logprobs: bool


def body_schema() -> dict[str, Any]:
    """The JSON Schema of a body."""
    prompts = {"type": "array", "items": TEXT, "minItems": 1, "maxItems": MAX_TEXTS, "description": "texts to continue"}
    return {
        "type": "object",
        "required": ["prompts"],
        "additionalProperties": False,
        "properties": {"prompts": prompts, **{name: each.schema for name, each in FIELDS.items()}},
        "example": {"prompts": ["Hello world"], "tokens_to_generate": 1},
    }


def read(raw: bytes, defaults: ServeOptions) -> ApiRequest:
    """What a body asks for. defaults: temperature, top_k and top_p where it names none.

    Raises ConfigError for everything that cannot work, whatever the model is.
    """
    body = _json_object(raw)
    fail(itertools.islice(_field_problems(body), MAX_PROBLEMS))
    prompts, values = body.pop("prompts"), _values(body)
    logprobs = bool(values.pop("prompt_logprobs", False) or values.get("top_logprobs"))
    if (beams := values.get("beam_width")) is not None:
        values.setdefault("num_samples", beams)
        if "stop_token" in body:
            values |= {"stop_token_ids": [body["stop_token"]], "stop_at_eod": False}
    else:
        values.setdefault("temperature", defaults.temperature)
        if not {"top_k", "top_p"} & values.keys():
            values |= {"top_k": defaults.top_k, "top_p": defaults.top_p}
    texts = len(prompts) * values.get("num_samples", 1)
    top_p, bound = values.get("top_p", 0.0), values.get("top_p_bound", 0.0)
    for holds, what, found, rule, cure in (
        (beams is None or len(prompts) == 1, "prompts", len(prompts), "must be one for beam search",
         "Send a request for each"),
        (texts <= MAX_TEXTS, "prompts times num_samples", texts, f"must be at most {MAX_TEXTS}", "Send more requests"),
        (all(prompts) or values.get("add_bos"), "add_BOS", False, "must be true where a prompt is empty", "Set it"),
        (values["max_new_tokens"] or logprobs, "logprobs", False,
         "must be true with tokens_to_generate 0, which only scores the prompts", "Set it, or ask for tokens"),
        (not (body.get("top_k") and top_p), "top_p", top_p, "must be left out or 0 with top_k", "Set one of both"),
        (top_p or "top_p_decay" not in body, "top_p_decay", body.get("top_p_decay"), "cannot be set without top_p",
         "Set top_p too"),
        (bound <= top_p, "top_p_bound", bound, f"must be at most top_p, {top_p}", "Lower it, or set top_p"),
        (beams is None or not logprobs, "logprobs", True, "must be false for beam search, whose answer has scores",
         "Leave it out"),
        (beams is None or values["num_samples"] <= beams, "num_samples", values.get("num_samples"),
         f"must be at most beam_width, {beams}", "Ask for fewer, or for more beams"),
    ):  # fmt: skip
        if not holds:
            raise ConfigError(problem(what, found, rule, cure))
    try:
        return ApiRequest(prompts, GenerationParams().replace(**values), logprobs)
    except ConfigError as error:
        raise in_fields(error) from None


def in_fields(error: MegalithError) -> MegalithError:
    """An error about options of a text, as one that names fields of a body where it named flags."""
    if isinstance(error, ServingError):
        return error
    names = {flag(name): name for name in FIELDS}
    return type(error)(re.sub(r"--[a-z][a-z-]*", lambda found: names.get(found[0], found[0]), str(error)))


def _json_object(raw: bytes) -> dict[str, Any]:
    cure = 'Write {"prompts": ["Hello world"]}'
    try:
        body = orjson.loads(raw)  # which refuses NaN, numbers beyond a double and halves of characters
    except orjson.JSONDecodeError as error:
        found = shown(raw.decode("utf-8", "replace"))
        raise ConfigError(problem("The body", found, f"must be JSON ({error})", cure)) from None
    if not isinstance(body, dict):
        raise ConfigError(problem("The body", shown(body), "must be a JSON object", cure))
    return body


def _field_problems(body: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with each field by itself."""
    if "prompts" not in body:
        rule, cure = "must be given: a list of texts", 'Write "prompts": ["Hello world"]'
        yield problem("prompts", Words("nothing"), rule, cure)
    for name, value in body.items():
        if name == "prompts":
            if not isinstance(value, list) or not all(isinstance(prompt, str) for prompt in value):
                yield problem(name, shown(value), "must be a list of strings", 'Write ["Hello world"]')
            elif not 1 <= len(value) <= MAX_TEXTS:
                rule = f"must be at least 1 text, and at most {MAX_TEXTS}"
                yield problem(name, Words(len(value)), rule, "Send more with another request")
        elif name in REPLACED:
            yield f"{name} is no longer used: write {REPLACED[name]} instead."
        elif name not in FIELDS:
            near = nearest(name[:SHOWN], ["prompts", *FIELDS])
            hint = HINTS.get(name) or (f"did you mean {near}?" if near else "/openapi.json describes all fields")
            yield f"unknown field {name[:SHOWN]}: {hint}"
        elif not FIELDS[name].accepts(value):
            yield problem(name, shown(value), FIELDS[name].rule, f"It is: {FIELDS[name].help}")


def _values(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of GenerationParams that a body sets; ConfigError where two of its fields disagree on one."""
    values, names = {"max_new_tokens": FIELDS["tokens_to_generate"].default}, dict[str, str]()
    for name, value in body.items():
        if (option := FIELDS[name].sets) is None:
            continue
        value = None if name == "random_seed" and value == -1 else value
        if option in names and values[option] != value:
            both = f"{names[option]} and {name}"
            found = Words(f"{shown(values[option])} and {shown(value)}")
            raise ConfigError(problem(both, found, "are two names of one option, and must agree", "Leave one out"))
        values[option], names[option] = value, name
    return values
