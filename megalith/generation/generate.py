"""Text generation: `generate` returns texts, `stream` pieces as they come, `complete` Completions, `score`
log-probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.generation.beam import beam_search
from megalith.generation.engine import Engine
from megalith.generation.model import TextModel, check_length
from megalith.generation.parallel.driver import Driver
from megalith.generation.parallel.replicas import ReplicatedEngine, engine_of
from megalith.generation.prompts import Completion, Prompts, tokenize_prompts
from megalith.generation.request import Event, Request
from megalith.generation.sampling import SamplingParams
from megalith.runtime.build import Runtime

OnToken = Callable[[int, int, str], None]  # (number of the text, new token, text that is now certain)
AnyEngine: TypeAlias = Engine | ReplicatedEngine | Driver
Model: TypeAlias = TextModel | Runtime | nn.Module | AnyEngine


def generate(
    model: Model, prompts: Prompts = None, *, max_new_tokens: int = 64, num_samples: int = 1, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None,
    stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False, beam_width: int | None = None,
    length_penalty: float = 1.0, on_token: OnToken | None = None, batch_size: int = 32,
) -> list[str]:  # fmt: skip
    """Texts, each a prompt and its continuation (for a T5 the answer alone): num_samples for each prompt, in order.

    model: from `megalith.load`. prompts: a text, several, lists of token ids, or None for texts without a prompt.
    max_new_tokens: most tokens generated after a prompt. seed: the same seed gives the same texts; None draws one.
    temperature: below 1 likely tokens become likelier, above 1 less likely ones; 0 is greedy. top_k: sample among the k
    likeliest tokens (0: all). top_p: among the likeliest tokens of this probability together (0: all); top_p_decay,
    top_p_bound: it becomes max(p x decay, bound) after each token. stop: texts that end a text, without being part of
    it. stop_at_eod: whether the end-of-document token ends a text. add_bos: put that token before every prompt.
    on_token, batch_size: see `complete`. beam_width: use beam search with so many beams and return the best
    num_samples, ranked by log-probability / length ** length_penalty; it is deterministic, so a seed changes nothing,
    and options of sampling are refused.

    Raises ConfigError for options that cannot work and for prompts too long for the model, DataError for unknown
    tokens.
    """
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound
    )  # fmt: skip
    if beam_width is None:
        completions = complete(
            model, prompts, temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay,
            top_p_bound=top_p_bound, max_new_tokens=max_new_tokens, num_samples=num_samples, seed=seed, stop=stop,
            stop_at_eod=stop_at_eod, add_bos=add_bos, on_token=on_token, batch_size=batch_size,
        )  # fmt: skip
        return [completion.text for completion in completions]
    if params != SamplingParams() or stop or not stop_at_eod or on_token:
        rule = (
            "must be given without options of sampling, because beam search samples nothing, ends at the end of "
            "document, and knows its texts only at the end"
        )
        cure = "Leave out temperature, top_k, top_p, stop, stop_at_eod and on_token, or beam_width"
        raise ConfigError(problem("beam_width", Words(f"{beam_width}, and options of sampling"), rule, cure))
    text = as_text_model(model)
    search = functools.partial(
        beam_search, text, beam_width=beam_width, max_new_tokens=max_new_tokens, length_penalty=length_penalty
    )  # fmt: skip
    found = [search(each.prompt_ids, prompt=each.prompt) for each in tokenize_prompts(text, prompts, add_bos)]
    return [completion.text for completions in found for completion in completions[:num_samples]]


def complete(
    model: Model, prompts: Prompts = None, *, max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None,
    num_samples: int = 1, stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False,
    logprobs: bool = False, on_token: OnToken | None = None, batch_size: int = 32,
) -> list[Completion]:  # fmt: skip
    """What the model writes after each prompt, or in answer to it: num_samples completions for each, in order.

    model: from `load`, any module that has `.config`, or a Runtime; or an idle engine of one, to keep its memory and
        its compiled step for the next call. Where several processes hold the model, or replicas of it, all of them call
        with the same arguments, and all get all results.
    prompts: texts, or lists of token ids, or None; an empty one starts from the end-of-document token.
    temperature, top_k, top_p, top_p_decay, top_p_bound: see SamplingParams. temperature=0 or top_k=1 is greedy.
    seed: completion number i of a call draws its random numbers from (seed, i, position); None draws a seed.
    stop: texts that end a completion, without being part of it. stop_at_eod: the end-of-document token ends it.
    add_bos: put the end-of-document token before every prompt, as Megatron does.
    on_token: called for each new token; the pieces of text of one completion add up to its continuation.
    batch_size: sequences that are decoded at one time; others start when these end (an Engine has its own number).
        Results do not depend on it; with batch_size 1, or one prompt, they agree to rounding, see generation/engine.py.

    Raises ConfigError for options that cannot work and for prompts too long for the model, DataError for unknown
    tokens.
    """
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound,
        seed=seed, logprobs=logprobs,
    )  # fmt: skip
    rows, engine, params = _prepare(
        model, prompts, params, max_new_tokens, num_samples, stop, stop_at_eod, add_bos, batch_size
    )  # fmt: skip
    for number, token, piece in _run(engine, rows, params) if engine is not None else ():
        if on_token is not None:
            on_token(number, token, piece)
    return [row.completion for row in rows]


def stream(
    model: Model, prompts: Prompts = None, *, max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None,
    num_samples: int = 1, stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False,
    batch_size: int = 32,
) -> Iterator[tuple[int, int, str]]:  # fmt: skip
    """As `complete`, but token by token: (number of the completion, token, text that is now certain).

    The pieces of text of one completion add up to its continuation. Closing the generator cancels what is left.
    """
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound,
        seed=seed,
    )  # fmt: skip
    rows, engine, params = _prepare(
        model, prompts, params, max_new_tokens, num_samples, stop, stop_at_eod, add_bos, batch_size
    )  # fmt: skip
    return _run(engine, rows, params) if engine is not None else iter(())


class PendingCompletion:
    """A completion that is being generated."""

    def __init__(self, number: int, completion: Completion, model: TextModel, stop: Sequence[str]):
        self.number, self.completion = number, completion
        self.stream = completion.stream(model.tokenizer, stop) if model.tokenizer is not None else None
        self.done = False

    def push(self, event: Event) -> str:
        """Add a new token and return the text that is now certain."""
        assert event.token is not None
        self.completion.ids.append(event.token)
        if self.completion.logprobs is not None and event.logprob is not None:
            self.completion.logprobs.append(event.logprob)
        piece, stopped = "", event.finish == "stop"
        if self.stream is not None:
            if not stopped:
                piece = self.stream.push(event.token)
                stopped = self.stream.stopped
            if stopped or event.finish:
                piece += self.stream.finish()
            self.completion.continuation = self.stream.text
        self.done = stopped or event.finish is not None
        self.completion.finish = "stop" if stopped else "length"
        return piece


def _prepare(
    model: Model, prompts: Prompts, params: SamplingParams, max_new_tokens: int, num_samples: int,
    stop: Sequence[str], stop_at_eod: bool, add_bos: bool, batch_size: int,
) -> tuple[list[PendingCompletion], AnyEngine | None, SamplingParams]:  # fmt: skip
    """Pending completions, the engine that generates them (None where nothing is to be generated), and its settings."""
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("num_samples", num_samples, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ConfigError(problem(name, value, f"must be at least {least}", f"Give {least} or more"))
    text = as_text_model(model)
    end_token = text.end_token if stop_at_eod else None
    completions = [
        dataclasses.replace(prompt, ids=[], logprobs=[] if params.logprobs else None)
        for prompt in tokenize_prompts(text, prompts, add_bos)
        for _ in range(num_samples)
    ]
    longest = max((len(completion.prompt_ids) for completion in completions), default=0)
    check_length(text.config, longest, max_new_tokens)
    rows = [PendingCompletion(number, completion, text, stop) for number, completion in enumerate(completions)]
    if not rows or not max_new_tokens:
        return rows, None, params
    if isinstance(model, AnyEngine):
        engine = model
    else:
        length = max(longest, max_new_tokens + 1) if text.config.decoder_layers else longest + max_new_tokens
        engine = engine_of(text, max_batch_size=min(batch_size, len(rows)), max_length=length)
    stops = () if end_token is None else (end_token,)
    return rows, engine, dataclasses.replace(params, max_new_tokens=max_new_tokens, stop_token_ids=stops)


def _run(
    engine: AnyEngine, rows: Sequence[PendingCompletion], params: SamplingParams
) -> Iterator[tuple[int, int, str]]:
    """Generate all of `rows`: (number of the row, new token, text that is now certain)."""
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
                request = Request(prompt_ids=row.completion.prompt_ids, params=params, index=row.number)
                rows_by_id[engine.add(request)] = row
            while engine.busy:
                for event in engine.step():
                    if event.id not in rows_by_id:
                        raise ConfigError(shared)
                    row = rows_by_id[event.id]
                    piece = row.push(event)
                    if row.done and event.finish is None:  # ended by a stop text, of which the engine does not know
                        engine.cancel(event.id)
                    yield row.number, event.token, piece
        finally:
            for id in rows_by_id:
                engine.cancel(id)


def score(model: Model, texts: Prompts, *, add_bos: bool = False, batch_size: int = 8) -> list[list[float]]:
    """Log-probabilities of each token of each text after the first: len(tokens) - 1 numbers, natural logarithms.

    texts: as the prompts of `complete`. The sum of a list is the text's log likelihood given its first token; add_bos
    counts the first token too.
    """
    text = as_text_model(model)
    if batch_size < 1:
        raise ConfigError(problem("batch_size", batch_size, "must be at least 1", "Give 1 or more"))
    if text.config.decoder_layers:
        raise ConfigError(problem("The model", "t5", "must be decoder-only to score texts", "Load a GPT"))
    sequences = [prompt.prompt_ids for prompt in tokenize_prompts(text, texts, add_bos)]
    longest = max(map(len, sequences), default=1)
    check_length(text.config, longest, 0)
    engine = engine_of(text, max_batch_size=max(1, min(batch_size, len(sequences))), max_length=longest)
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=True)
    numbers = {engine.add(Request(prompt_ids=ids, params=params)): number for number, ids in enumerate(sequences)}
    results: list[list[float]] = [[] for _ in sequences]
    with text.evaluating():
        while engine.busy:
            for event in engine.step():
                assert event.prompt is not None
                results[numbers[event.id]] = event.prompt.logprobs
    return results


def as_text_model(model: Model) -> TextModel:
    """The TextModel of an engine, a Runtime, a module or a TextModel."""
    return model.text_model if isinstance(model, AnyEngine) else TextModel.of(model)
