"""Chats as text and tokens: the tokenizer's own template, rendered as transformers does."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from megalith.common.errors import DataError, problem
from megalith.config.flags.text import Words
from megalith.data.tokenizers.huggingface import HuggingFaceTokenizer
from megalith.data.tokenizers.tokenizer import Tokenizer

SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Half characters, which no text of a tokenizer holds: they mark {% generation %} while a template is rendered.
BEGIN, END = "\udc01", "\udc02"
MARKS = re.compile(f"([{BEGIN}{END}])")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The chat template of a tokenizer, rendered as transformers does, in a sandbox, with the same variables."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        """source: the template, in Jinja. Raises DataError for a tokenizer that the library tokenizers has no form of.

        The special tokens are those of a Hugging Face folder's files, or those that the tokenizer's class knows.
        """
        self.source = source
        self.special_tokens = dict[str, str]()
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self.backend = tokenizer.to_huggingface() if tokenizer.split_special_tokens else tokenizer.backend
            settings = tokenizer.settings
        else:
            self.backend, settings = tokenizer.to_huggingface(), {}
            listed = tokenizer.tokens()
            ids = {i for part in SPECIAL_TOKENS if (i := getattr(tokenizer, part, None)) is not None}
            known = self.backend.get_added_tokens_decoder()
            self.backend.add_special_tokens([listed[i] for i in sorted(ids - known.keys())])
        # Special tokens that the template writes are found even where a text's are not (split_special_tokens).
        self.backend.encode_special_tokens = False
        for part in SPECIAL_TOKENS:
            token = settings.get(f"{part}_token")
            if token is not None:
                self.special_tokens[f"{part}_token"] = token["content"] if isinstance(token, dict) else str(token)
            elif (number := getattr(tokenizer, part, None)) is not None:
                self.special_tokens[f"{part}_token"] = self.backend.id_to_token(number)

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> ChatTemplate | None:
        """The template of a tokenizer: of its files chat_template.jinja or tokenizer_config.json, or given to it."""
        return None if tokenizer is None or tokenizer.chat_template is None else cls(tokenizer, tokenizer.chat_template)

    @functools.cached_property
    def template(self) -> jinja2.Template:
        """The compiled template."""
        return _environment(_Generation).from_string(self.source)

    @functools.cached_property
    def marked(self) -> jinja2.Template:
        """The compiled template, which writes BEGIN and END around what {% generation %} holds."""
        return _environment(_MarkedGeneration).from_string(self.source)

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what an assistant writes, by {% generation %}."""
        return GENERATION.search(self.source) is not None

    def check(self, what: str) -> None:
        """Raise DataError where it is no template in Jinja. what: its description in the message."""
        try:
            _ = self.template, self.marked
        except jinja2.TemplateError as error:
            found = Words(f"{error} in line {getattr(error, 'lineno', '?')}")
            raise DataError(problem(what, found, "must be a template in Jinja", "Correct it")) from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], *, prompt: bool = True
    ) -> str:  # fmt: skip
        """The text of a chat, with `prompt` up to where the assistant's next message begins.

        variables: the template's own. Raises DataError where the template does not take them, or the messages.
        """
        return self._render("template", messages, variables, prompt)

    def render_marked(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and its characters [begin, end) that {% generation %} holds, in order."""
        pieces, spans, length, begin = list[str](), list[tuple[int, int]](), 0, 0
        for piece in MARKS.split(self._render("marked", messages, variables, False)):
            if piece == BEGIN:
                begin = length
            elif piece == END:
                spans.append((begin, length))
            else:
                pieces.append(piece)
                length += len(piece)
        return "".join(pieces), spans

    def _render(
        self, name: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], prompt: bool
    ) -> str:  # fmt: skip
        given = {"tools": None, "documents": None, "add_generation_prompt": prompt, **variables, "messages": messages}
        try:
            text = getattr(self, name).render({**self.special_tokens, **given})
        except Exception as error:  # a template is a program of its own, with errors of every kind
            reason = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            rule = "must be such as the model's chat template takes"
            raise DataError(problem("messages", Words(reason), rule, "Correct them")) from None
        MARKS.sub("", text).encode()  # raises UnicodeEncodeError where variables have brought halves of characters
        return text

    def encode(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[int]:
        """The tokens of `render`. The template writes special tokens itself, so that none are added."""
        return self.backend.encode(self.render(messages, variables), add_special_tokens=False).ids


class _Generation(jinja2.ext.Extension):
    """{% generation %}...{% endgeneration %}, which marks for training what an assistant writes: here its content."""

    tags = {"generation"}  # noqa: RUF012 jinja's name and form

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        # As in transformers, what is set inside has no effect outside.
        return [jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))]


class _MarkedGeneration(_Generation):
    """The same, with a mark before the content and one after it."""

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in (BEGIN, END))
        return [begin, *super().parse(parser), end]


def _environment(generation: type[jinja2.ext.Extension]) -> jinja2.Environment:
    """What transformers gives to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation, jinja2.ext.loopcontrols]
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
