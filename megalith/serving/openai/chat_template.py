"""Chats as prompts: the tokenizer's own template, and the tokens of what it writes."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from megalith.common.errors import problem
from megalith.config.flags.text import Words
from megalith.data.tokenizers.huggingface import HuggingFaceTokenizer
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.serving.errors import BadRequest

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class ChatTemplate:
    """The chat template of a tokenizer, rendered as transformers does, in a sandbox, with the same variables."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, source: str):
        """source: the template, in Jinja."""
        self.source = source
        # Special tokens that the template writes are found even where a text's are not (split_special_tokens).
        self.backend = tokenizer.to_huggingface() if tokenizer.split_special_tokens else tokenizer.backend
        self.special_tokens = dict[str, str]()
        for part in SPECIAL_TOKENS:
            token = tokenizer.settings.get(f"{part}_token")
            if token is not None:
                self.special_tokens[f"{part}_token"] = token["content"] if isinstance(token, dict) else str(token)
            elif (number := getattr(tokenizer, part, None)) is not None:
                self.special_tokens[f"{part}_token"] = tokenizer.backend.id_to_token(number)

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> ChatTemplate | None:
        """The template of a tokenizer's files: chat_template.jinja, or chat_template in tokenizer_config.json."""
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            return None
        source = tokenizer.settings.get("chat_template")
        if isinstance(source, list):  # several by name
            source = {each.get("name"): each.get("template") for each in source}.get("default")
        return cls(tokenizer, source) if isinstance(source, str) else None

    @functools.cached_property
    def template(self) -> jinja2.Template:
        """The compiled template."""
        return _environment().from_string(self.source)

    def render(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """The text of a chat, up to where the assistant's next message begins.

        variables: the template's own. Raises BadRequest where the template does not take them, or the messages.
        """
        given = {"tools": None, "documents": None, "add_generation_prompt": True, **variables, "messages": messages}
        try:
            text = self.template.render({**self.special_tokens, **given})
        except Exception as error:  # a template is a program of its own, with errors of every kind
            reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            what, rule = "messages", "must be such as the model's chat template takes"
            raise BadRequest(problem(what, Words(reason), rule, "Correct them"), param="messages") from None
        text.encode()  # raises UnicodeEncodeError where the variables have brought halves of characters
        return text

    def encode(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[int]:
        """The tokens of `render`. The template writes special tokens itself, so that none are added."""
        return self.backend.encode(self.render(messages, variables), add_special_tokens=False).ids


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which marks for training what an assistant writes: here its content."""

    tags = {"generation"}  # noqa: RUF012 jinja's name and form

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.Environment:
    """What transformers gives to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json  # jinja's own writes HTML
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
