"""Text generation: `generate` returns texts, `stream` pieces as they come, `complete` Completions, `score`
log-probabilities.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import nn

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags.text import Words
from megalith.generation.beam import check_options, completions_of, search
from megalith.generation.engine import Engine
from megalith.generation.load import load
from megalith.generation.model import TextModel, check_length
from megalith.generation.newlines import newlines_of
from megalith.generation.parallel.driver import Driver
from megalith.generation.parallel.replicas import ReplicatedEngine, engine_of
from megalith.generation.params import GenerationParams
from megalith.generation.prompts import Completion, Prompts, prompt_list, tokenize_prompt
from megalith.generation.request import BeamRequest, Event, Hypothesis, Request
from megalith.runtime.build import Runtime

OnToken = Callable[[int, int, str], None]  # (number of the completion, new token, text that is now certain)
AnyEngine: TypeAlias = Engine | ReplicatedEngine | Driver
Model: TypeAlias = TextModel | Runtime | nn.Module | AnyEngine | str | os.PathLike
Params: TypeAlias = GenerationParams | Sequence[GenerationParams] | None


class Piece(NamedTuple):
    """A new token of completion number `number` of a call, and the text that is certain by now."""

    number: int
    token: int
    text: str


def takes_options(function: Callable) -> Callable:
    """List the fields of GenerationParams among the function's keyword arguments, for `help` and editors."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    fields, default = inspect.signature(GenerationParams).parameters.values(), GenerationParams()
    options = [each.replace(default=getattr(default, each.name)) for each in fields]
    function.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    return function


@takes_options
def generate(
    model: Model, prompts: Prompts = None, *, params: Params = None, on_token: OnToken | None = None,
    batch_size: int = 32, batch_invariant: bool = True, compile: bool = False, **options: Any,
) -> list[str]:  # fmt: skip
    """Texts, each a prompt and its continuation (for a T5 the answer alone): num_samples for each prompt, in order.

    Arguments and errors are those of `complete`. Raises ConfigError for a model without a tokenizer, too.
    """
    completions = complete(
        model, prompts, params=params, on_token=on_token, batch_size=batch_size, batch_invariant=batch_invariant,
        compile=compile, **options,
    )  # fmt: skip
    return [completion.text for completion in completions]


@takes_options
def complete(
    model: Model, prompts: Prompts = None, *, params: Params = None, on_token: OnToken | None = None,
    batch_size: int = 32, batch_invariant: bool = True, compile: bool = False, **options: Any,
) -> list[Completion]:  # fmt: skip
    """What the model writes after each prompt, or in answer to it: num_samples completions for each, in order.

    model: from `load`, or a path, which is loaded for this call, or any module that has `.config`, or a Runtime; or an
        idle engine of one, to keep its memory and its compiled step for the next call. Where several processes hold the
        model, or replicas of it, all of them call with the same arguments, and all get all results.
    prompts: texts, or lists of token ids; one of either, or several. None or an empty one is no prompt: the text starts
        from what the tokenizer puts before every text (Llama's BOS), or else from the end-of-document token.
    params, options: how to continue: the fields of GenerationParams (`help(megalith.GenerationParams)` explains them),
        all prompts alike or one GenerationParams for each; options replace what params say. Completion number i of a
        call draws its random numbers from (seed, i, position).
    on_token: called for each new token; the pieces of text of one completion add up to its continuation.
    batch_size: sequences that are decoded at one time; others start when these end. Results do not depend on it with
        batch_invariant; without, one sequence alone is a third faster. compile: decode by a compiled graph. See
        Engine; one that is given has its own.

    Raises ConfigError for options that cannot work and for prompts too long for the model, DataError for unknown
    tokens, both before anything is generated.
    """
    call = Call(model, prompts, params, options)
    if on_token is not None:
        call.refuse_beams()
    for piece in call.run(batch_size, batch_invariant, compile):
        if on_token is not None:
            on_token(*piece)
    return call.completions()


@takes_options
def stream(
    model: Model, prompts: Prompts = None, *, params: Params = None, batch_size: int = 32,
    batch_invariant: bool = True, compile: bool = False, **options: Any,
) -> Iterator[Piece]:  # fmt: skip
    """As `complete`, but token by token: (number of the completion, token, text that is now certain).

    The pieces of text of one completion add up to its continuation. Closing the generator cancels what is left. Raises
    the errors of `complete`, and ConfigError for beam search, which knows its texts only at the end.
    """
    call = Call(model, prompts, params, options)
    call.refuse_beams()
    return call.run(batch_size, batch_invariant, compile)


def score(model: Model, texts: Prompts, *, add_bos: bool = False, batch_size: int = 8) -> list[list[float]]:
    """Log-probabilities of each token of each text after the first: len(tokens) - 1 numbers, natural logarithms.

    texts: as the prompts of `complete`. The sum of a list is the text's log likelihood given its first token; add_bos
    counts the first token too. Raises ConfigError for an encoder-decoder and for texts too long for the model.
    """
    model = as_model(model)
    if as_text_model(model).config.decoder_layers:
        raise ConfigError(problem("The model", "t5", "must be decoder-only to score texts", "Load a GPT"))
    options = {"max_new_tokens": 0, "prompt_logprobs": True, "add_bos": add_bos, "batch_size": batch_size}
    return [completion.prompt_logprobs for completion in complete(model, texts, **options)]


def as_model(model: Model) -> TextModel | Runtime | nn.Module | AnyEngine:
    """The model of a path; anything else as it is."""
    return load(model) if isinstance(model, (str, os.PathLike)) else model


def as_text_model(model: TextModel | Runtime | nn.Module | AnyEngine) -> TextModel:
    """The TextModel of an engine, a Runtime, a module or a TextModel."""
    return model.text_model if isinstance(model, AnyEngine) else TextModel.of(model)


class PendingCompletion:
    """A completion that is being generated: the request that an engine gets, and what its events mean for the text."""

    def __init__(self, number: int, completion: Completion, params: GenerationParams, model: TextModel):
        """number: of the completion in its call. completion: a tokenized prompt, which is copied.

        Raises DataError for stop tokens that the model does not have, ConfigError for rules about text where the
        tokenizer has no newlines, or where there is no tokenizer.
        """
        tokenizer, vocab_size = model.tokenizer, model.config.vocab_size
        if wrong := [token for token in params.stop_token_ids if not 0 <= token < vocab_size]:
            rule = f"must be among the {vocab_size} tokens of the model's vocabulary, numbered from 0"
            raise DataError(problem("--stop-token-ids", wrong[0], rule, "Correct the number"))
        if params.stop and tokenizer is None:
            rule = "must be left out, because this model has no tokenizer"
            raise ConfigError(problem("--stop", params.stop[0], rule, "Use stop_token_ids"))
        self.number, self.params, self.done = number, params, False
        self.newlines = newlines_of(params, tokenizer, vocab_size)
        end_tokens = {model.end_token} if params.stop_at_eod else set()
        hidden = {*params.stop_token_ids, *end_tokens.intersection(range(vocab_size))}  # no part of the text
        self.line_ends: frozenset[int] = frozenset()  # stop tokens that are part of it
        if params.stop_on_eol or params.stop_on_double_eol:
            self.line_ends = (self.newlines.any if params.stop_on_eol else self.newlines.double) - hidden
        self.request = Request(
            prompt_ids=completion.prompt_ids, index=number,
            params=dataclasses.replace(params, stop_token_ids=(*hidden, *self.line_ends)),
            banned_after=self.newlines.banned_after if params.prevent_newline_after_colon else {},
        )  # fmt: skip
        self.completion = dataclasses.replace(
            completion, ids=[], echo=params.echo, logprobs=[] if params.logprobs or params.top_logprobs else None,
            top_logprobs=[] if params.top_logprobs else None,
        )  # fmt: skip
        self.stream = None if tokenizer is None else self.completion.stream(tokenizer, params.stop)

    def push(self, event: Event) -> str:
        """Take an event of the request and return the text that is now certain; sets `done` at the text's end."""
        completion, stopped, piece = self.completion, event.finish == "stop", ""
        if event.prompt is not None:
            completion.prompt_logprobs = event.prompt.logprobs
            completion.prompt_top_logprobs = event.prompt.top if self.params.top_logprobs else None
        if event.token is not None:
            completion.ids.append(event.token)
            if completion.logprobs is not None:
                completion.logprobs.append(event.logprob)
            if completion.top_logprobs is not None:
                completion.top_logprobs.append(event.top_logprobs)
            if self.stream is not None and (not stopped or event.token in self.line_ends):
                piece = self.stream.push(event.token, may_stop=len(completion.ids) > self.params.min_new_tokens)
            stopped = stopped or self._at_empty_line()
        if self.stream is not None:
            stopped = stopped or self.stream.stopped
            if stopped or event.finish:
                piece += self.stream.finish()
                stopped = stopped or self.stream.stopped
            completion.continuation = self.stream.text
        self.done = stopped or event.finish is not None
        completion.finish = "stop" if stopped else "length"
        return piece

    def _at_empty_line(self) -> bool:
        """Whether the last token begins with a newline, and the one before it ends with one."""
        before = [] if self.completion.answer else self.completion.prompt_ids
        ids = [*before[-1:], *self.completion.ids[-2:]][-2:]
        return (
            self.params.stop_on_double_eol and len(self.completion.ids) > self.params.min_new_tokens
            and len(ids) == 2 and ids[0] in self.newlines.ending and ids[1] in self.newlines.starting
        )  # fmt: skip


class Call:
    """The prompts and options of one call, and what is generated for each."""

    def __init__(self, model: Model, prompts: Prompts, params: Params, options: dict[str, Any]):
        model = as_model(model)
        self.engine = model if isinstance(model, AnyEngine) else None
        self.model, each_prompt = as_text_model(model), prompt_list(prompts)
        if params is None or isinstance(params, GenerationParams):
            params = [params or GenerationParams()] * len(each_prompt)
        if len(params) != len(each_prompt):
            found = Words(f"{len(params)} for {len(each_prompt)} prompts")
            raise ConfigError(problem("params", found, "must be one for all prompts, or one for each", "Give so many"))
        self.params = [each.replace(**options) for each in params]
        self.prompts, self.rows, first = list[Completion](), list[list[PendingCompletion]](), 0
        self.searches, self.found = dict[int, BeamRequest](), dict[int, Sequence[Hypothesis]]()
        for number, (prompt, each) in enumerate(zip(each_prompt, self.params)):
            completion = tokenize_prompt(self.model, prompt, number, each.add_bos)
            name = f"prompt {number}" if len(each_prompt) > 1 else "the prompt"
            check_length(self.model.config, len(completion.prompt_ids), each.max_new_tokens, name)
            if self.engine is not None:  # before each of many texts has a copy of a prompt that is too long
                self.engine.check_length(len(completion.prompt_ids), each.max_new_tokens)
            numbers = range(first, first + each.num_samples)
            self.prompts.append(completion)
            self.rows.append([PendingCompletion(row, completion, each, self.model) for row in numbers])
            if each.beam_width is not None:
                self.searches[first] = self._beam_request(completion, each)
            first += each.num_samples

    def refuse_beams(self) -> None:
        """Raise ConfigError where a prompt asks for beam search, because texts are to be streamed."""
        if widths := [each.beam_width for each in self.params if each.beam_width is not None]:
            rule = "must be left out where texts are streamed: beam search knows them only at the end"
            raise ConfigError(problem("--beam-width", widths[0], rule, "Leave out the one or the other"))

    def sampled(self) -> list[PendingCompletion]:
        """What is to be sampled, or scored, by an engine."""
        return [
            row
            for group, each in zip(self.rows, self.params)
            for row in group
            if each.beam_width is None and (each.max_new_tokens or each.prompt_logprobs)
        ]

    def run(self, batch_size: int, batch_invariant: bool, compile: bool) -> Iterator[Piece]:
        """Generate all that is sampled."""
        if batch_size < 1:
            raise ConfigError(problem("--batch-size", batch_size, "must be at least 1", "Give 1 or more"))
        rows, engine = self.sampled(), self.engine
        if engine is None and rows:
            lengths = [(len(row.request.prompt_ids), row.params.max_new_tokens) for row in rows]
            answers = bool(self.model.config.decoder_layers)
            longest = max(max(prompt, new + 1) if answers else prompt + new for prompt, new in lengths)
            engine = engine_of(
                self.model, max_batch_size=min(batch_size, len(rows)), max_length=longest,
                batch_invariant=batch_invariant, compile=compile,
            )  # fmt: skip
        return _run(engine, rows)

    def requests(self) -> Iterator[tuple[int, PendingCompletion | BeamRequest]]:
        """What an engine is to do, each with the number of its (first) completion."""
        yield from self.searches.items()
        yield from ((row.number, row) for row in self.sampled())

    def take_beams(self, number: int, beams: Sequence[Hypothesis]) -> None:
        """Keep what an engine has found for the search of completion `number`."""
        self.found[number] = beams

    def completions(self) -> list[Completion]:
        """All completions, once `run`, or an engine, has ended; searches that no engine did are done here."""
        found = list[Completion]()
        for prompt, params, rows in zip(self.prompts, self.params, self.rows):
            if params.beam_width is None:
                found += [row.completion for row in rows]
                continue
            number = rows[0].number
            best = self.found.get(number) or search(self.model, self.searches[number])
            found += completions_of(best, dataclasses.replace(prompt, echo=params.echo), self.model, params.logprobs)
        return found

    def _beam_request(self, prompt: Completion, params: GenerationParams) -> BeamRequest:
        end_token = self.model.end_token if params.stop_at_eod else None
        request = BeamRequest(
            prompt_ids=prompt.prompt_ids, beam_width=params.beam_width or 1, num_samples=params.num_samples,
            max_new_tokens=params.max_new_tokens, length_penalty=params.length_penalty,
            stop_token_ids=(*params.stop_token_ids, *(() if end_token is None else (end_token,))),
        )  # fmt: skip
        check_options(request)
        return request


def _run(engine: AnyEngine | None, rows: Sequence[PendingCompletion]) -> Iterator[Piece]:
    """Generate all of `rows`; there may be none."""
    if not rows:
        return
    rows_by_id = dict[int, PendingCompletion]()
    shared = (
        "the engine has requests that others added, and their tokens would be lost here. "
        "Add these prompts to it by `add` too."
    )
    if engine.busy:
        raise ConfigError(shared)
    with engine.text_model.evaluating():
        try:
            for row in rows:
                rows_by_id[engine.add(row.request)] = row
            while engine.busy:
                for event in engine.step():
                    if event.id not in rows_by_id:
                        raise ConfigError(shared)
                    if event.error is not None:
                        raise event.error
                    row = rows_by_id[event.id]
                    text = row.push(event)
                    if row.done and event.finish is None:  # ended by its text, of which the engine does not know
                        engine.cancel(event.id)
                    if event.token is not None:
                        yield Piece(row.number, event.token, text)
        finally:
            for id in rows_by_id:
                engine.cancel(id)
