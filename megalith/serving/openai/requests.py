"""What clients may ask for: the fields of both kinds of completions, and the GenerationParams that they mean."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megalith.common.errors import MegalithError, problem
from megalith.config.flags.text import Words
from megalith.generation.model import TooLong
from megalith.generation.params import LARGEST_PENALTY, GenerationParams
from megalith.serving.errors import BadRequest, ServingError
from megalith.serving.openai.fields import (
    MAX_MESSAGES,
    UNSUPPORTED,
    UNSUPPORTED_OF_MESSAGES,
    Content,
    LogitBias,
    Prompt,
    Stop,
    Token,
    known_fields,
)  # fmt: skip
from megalith.serving.options import ServeOptions

FIELDS_OF_OPTIONS = {  # where the field of a request has another name than GenerationParams' option
    "max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "num_samples": "n", "stop_at_eod": "ignore_eos",
}  # fmt: skip
SAME_NAMES = (
    "temperature", "top_k", "top_p", "top_p_decay", "top_p_bound", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "stop_token_ids", "add_bos", "length_penalty",
)  # fmt: skip
NUCLEUS_OF_ONE = 1e-9  # a top_p that only the likeliest token fits


class StreamOptions(BaseModel):
    """Options of a streamed answer. include_usage: its last chunk has the numbers of tokens, and no choices."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool | None = False

    @model_validator(mode="before")
    @classmethod
    def _known(cls, fields: Any) -> Any:
        return known_fields(fields, cls.model_fields, {})


class Options(BaseModel):
    """What both kinds of completions have. A field that is null is one left out."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str | None = Field(None, description="The served model's name, as /v1/models has it, or nothing.")
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, description="Most new tokens.")
    max_completion_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="The newer name of max_tokens."
    )
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = Field(
        None, description="Logits are divided by it; 0 takes the likeliest token. Default: the server's, usually 1."
    )
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="Choose among the likeliest tokens that together reach this probability; 1: all."
    )
    n: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Texts for each prompt; default 1.")
    stop: Stop = Field((), description="Texts that end the text, and are no part of it.")
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = Field(
        None, description="Subtracted from the logits of tokens that the new text has."
    )
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = Field(
        None, description="The same, times how often the new text has them."
    )
    logit_bias: LogitBias = Field(None, description="Added to the logits of these tokens, by their numbers.")
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = Field(
        None, description="The same seed gives the same texts."
    )
    stream: bool | None = Field(None, description="Send the text as it is written, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    user: str | None = Field(None, description="Ignored.")
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="Choose among the k likeliest tokens; 0 or -1: all. Not OpenAI's, as all that follow."
    )
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="Choose among the tokens at least this times as probable as the likeliest."
    )
    top_p_decay: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(
        None, description="top_p is multiplied by this after each new token; 0: it stays."
    )
    top_p_bound: Annotated[float, Field(ge=0.0, le=1.0)] | None = Field(None, description="Where top_p_decay ends.")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = Field(
        None, description="Above 1 tokens of prompt and text become less likely."
    )
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(
        None, description="Nothing ends the text before it has so many tokens."
    )
    stop_token_ids: Annotated[list[Token], Field(max_length=1024)] | None = Field(
        None, description="Tokens that end the text, and are no part of it."
    )
    ignore_eos: bool | None = Field(None, description="The end-of-document token does not end the text.")
    add_bos: bool | None = Field(None, description="Put the end-of-document token before the prompt.")
    beam_width: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = Field(
        None, description="Beam search with so many beams; the best n are the texts. Not with stream."
    )
    use_beam_search: bool | None = Field(None, description="Beam search with n beams.")
    length_penalty: Annotated[float, Field(ge=-LARGEST_PENALTY, le=LARGEST_PENALTY)] | None = Field(
        None, description="Beams are ranked by log-probability / length^length_penalty; default 1."
    )

    @model_validator(mode="before")
    @classmethod
    def _known(cls, fields: Any) -> Any:
        return known_fields(fields, cls.model_fields, UNSUPPORTED)

    @model_validator(mode="after")
    def _agree(self) -> Any:
        first, second = self.max_tokens, self.max_completion_tokens
        if None not in (first, second) and first != second:
            rule = "must equal max_completion_tokens, its newer name, where both are given"
            _refuse("max_tokens", f"{first} and {second}", rule, "Leave out the one")
        if self.stream_options is not None and not self.stream:
            _refuse("stream_options", "stream false", "must be left out without stream", "Leave it out, or stream")
        if self.length_penalty is not None and self.beams is None:
            _refuse("length_penalty", "no beams", "must be left out without beam search", "Add beam_width")
        for name in ("top_p_decay", "top_p_bound"):
            if getattr(self, name) is not None and self.top_p is None:
                _refuse(name, getattr(self, name), "must be left out without top_p", "Add top_p, such as 0.9")
        if self.beams is not None and self.stream:
            rule = "must be left out with stream: beam search knows its texts only at the end"
            _refuse("beam_width" if self.beam_width else "use_beam_search", self.beams, rule, "Leave out the one")
        return self

    @property
    def texts(self) -> int:
        """How many texts there are for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def beams(self) -> int | None:
        """The beams of beam search, where it is asked for."""
        return self.beam_width or (self.texts if self.use_beam_search else None)

    @property
    def most_tokens(self) -> int | None:
        """max_tokens, under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def params(self, defaults: ServeOptions, max_new_tokens: int, **options: Any) -> GenerationParams:
        """What the fields mean. defaults: the server's. options: what only one kind of completions has.

        Raises BadRequest for fields that cannot work together.
        """
        given = {name: value for name in SAME_NAMES if (value := getattr(self, name)) is not None}
        if self.beams is not None:
            if given.get("temperature") in (0.0, 1.0):  # which many clients send along with everything
                del given["temperature"]
        else:
            given.setdefault("temperature", defaults.temperature)
            if self.top_k is None and self.top_p is None:
                given |= {"top_k": defaults.top_k, "top_p": defaults.top_p}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        if self.top_p == 0.0:  # off in GenerationParams
            given["top_p"] = NUCLEUS_OF_ONE
        try:
            return GenerationParams(
                max_new_tokens=max_new_tokens, min_new_tokens=self.min_tokens or 0, num_samples=self.texts,
                stop=self.stop, stop_at_eod=not self.ignore_eos, logit_bias=self.logit_bias or {},
                beam_width=self.beams, **given, **options,
            )  # fmt: skip
        except MegalithError as error:
            raise in_fields(error) from None


class CompletionRequest(Options):
    """Fields of /v1/completions."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"prompt": "Once upon a time", "max_tokens": 32, "temperature": 0.8, "top_p": 0.9, "seed": 1},
        {"prompt": ["A tale", "A song"], "max_tokens": 8, "n": 2, "logprobs": 3, "echo": True},
    ]})  # fmt: skip
    prompt: Prompt = Field("", description="A text, a list of texts, token numbers, or a list of lists of these.")
    best_of: Annotated[int, Field(ge=1, le=128)] | None = Field(None, description="Only as n; all texts are returned.")
    echo: bool | None = Field(None, description="Texts begin with their prompt.")
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Return the log-probability of each token (with echo of the prompt's too), and so many "
        "of the likeliest tokens with theirs."
    )  # fmt: skip

    @model_validator(mode="after")
    def _can_be_answered(self) -> Any:
        if self.best_of not in (None, self.texts):
            _refuse("best_of", self.best_of, f"must equal n, {self.texts}: all texts are returned", "Leave it out")
        return self


class Message(BaseModel):
    """A message of a chat."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="Who wrote it; developer is OpenAI's newer name of system, and templates get it as system."
    )
    content: Content = Field(description="A text, or a list of parts of type text.")
    name: str | None = Field(None, description="Of who wrote it, for templates that use it.")
    refusal: None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, fields: Any) -> Any:
        return known_fields(fields, cls.model_fields, UNSUPPORTED_OF_MESSAGES)

    def for_template(self) -> dict[str, str]:
        """As chat templates read it."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content, **named}


class ChatRequest(Options):
    """Fields of /v1/chat/completions."""

    model_config = ConfigDict(json_schema_extra={"examples": [
        {"messages": [{"role": "user", "content": "Tell me a tale."}], "max_tokens": 32, "temperature": 0.8},
    ]})  # fmt: skip
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The chat so far; the model writes the next message of the assistant."
    )
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Return so many of the likeliest tokens with theirs, too; only with logprobs."
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Variables of the model's chat template, such as enable_thinking."
    )

    @model_validator(mode="after")
    def _can_be_answered(self) -> Any:
        if self.top_logprobs is not None and not self.logprobs:
            _refuse("top_logprobs", self.top_logprobs, "must be left out without logprobs", "Add logprobs: true")
        return self


def in_fields(error: MegalithError) -> MegalithError:
    """An error about options, `--top-p must ...`, as one about the fields of a request, with their names here."""
    if isinstance(error, (ServingError, TooLong)):
        return error
    named = list[str]()

    def field(found: re.Match[str]) -> str:
        option = found[0].removeprefix("--").replace("-", "_")
        named.append(FIELDS_OF_OPTIONS.get(option, option))
        return named[-1]

    text = re.sub(rf"--[a-z][a-z-]+|\b({'|'.join(FIELDS_OF_OPTIONS)})\b", field, str(error))
    return BadRequest(text, param=named[0] if named else None)


def _refuse(name: str, found: object, rule: str, cure: str) -> None:
    raise BadRequest(problem(name, Words(found), rule, cure), param=name)
