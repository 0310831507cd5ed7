"""Text out of a model: `generate` gives texts, `stream` pieces as they come, `complete` all there is to know, `score`
log-probabilities.
"""

from __future__ import annotations

import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.generation.beam import beam_search
from megalith.generation.cache import KVCache, Piece
from megalith.generation.engine import Engine, Event, Request
from megalith.generation.model import TextModel, check_length
from megalith.generation.prompts import Completion, Prompts, tokenized
from megalith.generation.runner import PREFILL_TOKENS, Runner, batched
from megalith.generation.sampling import SamplingParams, logprobs_of

OnToken = Callable[[int, int, str], None]  # (which text, new token, text that became certain by it)
Model: TypeAlias = TextModel | nn.Module | Engine


def generate(
    model: Model, prompts: Prompts = None, *, max_new_tokens: int = 64, num_samples: int = 1, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None,
    stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False, beam_width: int | None = None,
    length_penalty: float = 1.0, on_token: OnToken | None = None, batch_size: int = 32,
) -> list[str]:  # fmt: skip
    """Texts, each a prompt and what follows (or the answer alone, of a T5): num_samples for each prompt, in order.

    model: from `megalith.load`. prompts: a text, several, lists of token ids, or None for texts that start from
    nothing. max_new_tokens: most tokens written after a prompt. seed: the same seed gives the same texts; None draws
    one. temperature: below 1 likely tokens become likelier, above 1 less likely ones; 0 is greedy. top_k: among the k
    likeliest tokens (0: all). top_p: among the likeliest tokens of this probability together (0: all); top_p_decay,
    top_p_bound: it becomes max(p x decay, bound) after each token. stop: texts that end one and are left out of it.
    stop_at_eod: so does the end-of-document token. add_bos: put that token before every prompt. on_token, batch_size:
    see `complete`. beam_width: beam search with so many beams, the best num_samples given, ranked by log-probability /
    length ** length_penalty; nothing is drawn then, so a seed changes nothing, and options of sampling are refused.

    Raises ConfigError for options that cannot work and for prompts too long for the model, DataError for unknown
    tokens.
    """
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound
    )  # fmt: skip
    if beam_width is None:
        made = complete(
            model, prompts, temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay,
            top_p_bound=top_p_bound, max_new_tokens=max_new_tokens, num_samples=num_samples, seed=seed, stop=stop,
            stop_at_eod=stop_at_eod, add_bos=add_bos, on_token=on_token, batch_size=batch_size,
        )  # fmt: skip
        return [each.text for each in made]
    if params != SamplingParams() or stop or not stop_at_eod or on_token:
        rule = "beam search draws nothing, ends at the end of document, and knows its texts at the end alone"
        cure = "Leave out temperature, top_k, top_p, stop, stop_at_eod and on_token, or the beams"
        raise ConfigError(problem("beam_width", Words(f"{beam_width}, and options of sampling"), rule, cure))
    text = text_model(model)
    search = functools.partial(
        beam_search, text, beam_width=beam_width, max_new_tokens=max_new_tokens, length_penalty=length_penalty
    )  # fmt: skip
    found = [search(one.prompt_ids, prompt=one.prompt) for one in tokenized(text, prompts, add_bos)]
    return [each.text for several in found for each in several[:num_samples]]


def complete(
    model: Model, prompts: Prompts = None, *, max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None,
    num_samples: int = 1, stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False,
    logprobs: bool = False, on_token: OnToken | None = None, batch_size: int = 32,
) -> list[Completion]:  # fmt: skip
    """What the model writes after each prompt, or in answer to it, num_samples completions for each, in order.

    model: from `load`, or any module in evaluation mode that has `.config`; or an Engine of one that has nothing else
    to do, to keep
        its memory and its compiled step for the next call.
    prompts: texts, or lists of token ids, or None; an empty one starts from the end-of-document token.
    temperature, top_k, top_p, top_p_decay, top_p_bound: see SamplingParams. temperature=0 or top_k=1 is greedy.
    seed: completion number i of a call draws its random numbers from (seed, i, place); None draws a seed.
    stop: texts that end a completion and are left out of it. stop_at_eod: the end-of-document token ends it.
    add_bos: put the end-of-document token before every prompt, as Megatron does.
    on_token: called for each new token; the pieces of text of one completion add up to its continuation.
    batch_size: rows that are worked on at one time, as others end and leave (an Engine has its own number). Results do
    not depend on
        it; with batch_size 1, or one prompt, they are equal to rounding, see generation/engine.py.

    Raises ConfigError for options that cannot work and for prompts too long for the model, DataError for unknown
    tokens.
    """
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound,
        seed=seed, logprobs=logprobs,
    )  # fmt: skip
    rows, engine, params = _prepared(
        model, prompts, params, max_new_tokens, num_samples, stop, stop_at_eod, add_bos, batch_size
    )  # fmt: skip
    for number, token, piece in _written(engine, rows, params) if engine is not None else ():
        if on_token is not None:
            on_token(number, token, piece)
    return [row.made for row in rows]


def stream(
    model: Model, prompts: Prompts = None, *, max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None,
    num_samples: int = 1, stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False,
    batch_size: int = 32,
) -> Iterator[tuple[int, int, str]]:  # fmt: skip
    """As `complete`, token by token as they come: (number of the completion, token, text that became certain by it).

    The pieces of text of one completion add up to its continuation. Closing the generator ends the work.
    """
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound,
        seed=seed,
    )  # fmt: skip
    rows, engine, params = _prepared(
        model, prompts, params, max_new_tokens, num_samples, stop, stop_at_eod, add_bos, batch_size
    )  # fmt: skip
    return _written(engine, rows, params) if engine is not None else iter(())


class Row:
    """One completion in the making."""

    def __init__(self, number: int, made: Completion, model: TextModel, stop: Sequence[str]):
        self.number, self.made = number, made
        self.stream = made.stream(model.tokenizer, stop) if model.tokenizer is not None else None
        self.done = False

    def push(self, event: Event) -> str:
        """Take a new token; the text that became certain by it."""
        self.made.ids.append(event.token)
        if self.made.logprobs is not None and event.logprob is not None:
            self.made.logprobs.append(event.logprob)
        piece, stopped = "", event.finish == "stop"
        if self.stream is not None:
            if not stopped:
                piece = self.stream.push(event.token)
                stopped = self.stream.stopped
            if stopped or event.finish:
                piece += self.stream.finish()
            self.made.continuation = self.stream.text
        self.done, self.made.finish = stopped or event.finish is not None, "stop" if stopped else "length"
        return piece


def _prepared(
    model: Model, prompts: Prompts, params: SamplingParams, max_new_tokens: int, num_samples: int,
    stop: Sequence[str], stop_at_eod: bool, add_bos: bool, batch_size: int,
) -> tuple[list[Row], Engine | None, SamplingParams]:  # fmt: skip
    """Completions to be made, what makes them (None where nothing is to be written), and how."""
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("num_samples", num_samples, 1),
        ("batch_size", batch_size, 1),
    ):
        if value < least:
            raise ConfigError(problem(name, value, f"it must be at least {least}", f"Give {least} or more"))
    text = text_model(model)
    eod = text.end if stop_at_eod else None
    made = [
        dataclasses.replace(one, ids=[], logprobs=[] if params.logprobs else None)
        for one in tokenized(text, prompts, add_bos)
        for _ in range(num_samples)
    ]
    longest = max((len(one.prompt_ids) for one in made), default=0)
    check_length(text.config, longest, max_new_tokens)
    rows = [Row(number, one, text, stop) for number, one in enumerate(made)]
    if not rows or not max_new_tokens:
        return rows, None, params
    if isinstance(model, Engine):
        engine = model
    else:
        length = max(longest, max_new_tokens + 1) if text.config.decoder_layers else longest + max_new_tokens
        engine = Engine(text, max_batch_size=min(batch_size, len(rows)), max_length=length)
    seed = secrets.randbits(63) if params.seed is None else params.seed
    stops = () if eod is None else (eod,)
    return rows, engine, dataclasses.replace(params, max_new_tokens=max_new_tokens, seed=seed, stop_token_ids=stops)


def _written(engine: Engine, rows: Sequence[Row], params: SamplingParams) -> Iterator[tuple[int, int, str]]:
    """Work on all of `rows` to their ends: (number of the row, new token, text that became certain by it)."""
    ids = dict[int, Row]()
    shared = "engine: found requests that others added; their tokens would be lost here. Add these to it by `add` too."
    if engine.busy:
        raise ConfigError(shared)
    try:
        for row in rows:
            ids[engine.add(Request(prompt_ids=row.made.prompt_ids, params=params, index=row.number))] = row
        while engine.busy:
            for event in engine.step():
                if event.id not in ids:
                    raise ConfigError(shared)
                row = ids[event.id]
                piece = row.push(event)
                if row.done and event.finish is None:  # by a text, which the engine does not know
                    engine.cancel(event.id)
                yield row.number, event.token, piece
    finally:
        for id in ids:
            engine.cancel(id)


def score(model: Model, texts: Prompts, *, add_bos: bool = False, batch_size: int = 8) -> list[list[float]]:
    """Log-probabilities of each token of each text after the first: len(tokens) - 1 numbers, natural logarithms.

    texts: as the prompts of `complete`. The sum of a list is the text's log likelihood given its first token; add_bos
    counts the first token too.
    """
    text = text_model(model)
    if batch_size < 1:
        raise ConfigError(problem("batch_size", batch_size, "it must be at least 1", "Give 1 or more"))
    if text.config.decoder_layers:
        raise ConfigError(problem("model", "t5", "the texts scored are those of models of one stack", "Load a GPT"))
    made = [one.prompt_ids for one in tokenized(text, texts, add_bos)]
    longest = max(map(len, made), default=0)
    check_length(text.config, longest, 0)
    results: list[list[float]] = [[] for _ in made]
    runner = Runner(text.model, KVCache(text.model, min(batch_size, len(made)), longest))
    for first in range(0, len(made), batch_size):
        pieces = [
            Piece(row, ids[start : start + PREFILL_TOKENS], start)
            for row, ids in enumerate(made[first : first + batch_size])
            for start in range(0, len(ids), PREFILL_TOKENS)
        ]
        for batch in batched(pieces):  # the logits of all texts would be large
            logits, at = runner.read(batch, all_logits=True), 0
            for piece in batch:
                here, ids = logits[at : at + len(piece.ids)], made[first + piece.row]
                labels = torch.tensor(ids[piece.start + 1 : piece.start + len(piece.ids) + 1], device=logits.device)
                results[first + piece.row] += logprobs_of(here[: len(labels)], labels).tolist()
                at += len(piece.ids)
    return results


def text_model(model: Model) -> TextModel:
    """The model with its tokenizer, of whatever kind it is given."""
    return model.text if isinstance(model, Engine) else TextModel.of(model)
