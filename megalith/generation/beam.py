"""Beam search: the likeliest continuations, found by keeping several at a time. Nothing is random."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.model import TextModel, check_length
from megalith.generation.parallel.runner import runner_of
from megalith.generation.params import LARGEST_PENALTY
from megalith.generation.prefix import CHUNK
from megalith.generation.prompts import Completion, tokenize_prompts
from megalith.generation.request import BeamRequest, Hypothesis
from megalith.generation.runner import ModelRunner
from megalith.generation.sampling import not_numbers
from megalith.runtime.build import Runtime

READ_AT_ONCE = 4 * CHUNK  # tokens of a prompt; an engine's other requests wait so long


class Beam(NamedTuple):
    """New tokens with their log-probabilities, and the sum of these."""

    total: float = 0.0
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


class BeamHypotheses:
    """The best `size` finished hypotheses so far: (score, beam, why it ended); as in Megatron's beam_utils.py."""

    def __init__(self, size: int, length_penalty: float):
        self.size, self.penalty = size, length_penalty
        self.best: list[tuple[float, Beam, str]] = []

    def score(self, total: float, length: int) -> float:
        """The score of `length` new tokens of log-probability `total`."""
        return total / length**self.penalty

    def add(self, beam: Beam, finish: str) -> None:
        """Add a hypothesis if it is among the best."""
        self.best.append((self.score(beam.total, len(beam.ids)), beam, finish))
        self.best.sort(key=lambda entry: -entry[0])
        del self.best[self.size :]

    def is_done(self, total: float, length: int) -> bool:
        """Whether no continuation of a beam of log-probability `total` could still be added, judged at its present
        length.
        """
        return len(self.best) == self.size and self.best[-1][0] >= self.score(total, length)


class BeamSearch:
    """A search, step by step, on a cache of its own, which is allocated with the first step.

    Every process of a model makes the same steps.
    """

    def __init__(self, model: TextModel, request: BeamRequest):
        """Raises ConfigError for options that cannot work."""
        check_options(request)
        if model.retriever is not None:
            rule = "must be left out with a retriever, as beams share what they have read"
            raise ConfigError(problem("--beam-width", request.beam_width, rule, "Sample, or use --greedy"))
        self.model, self.request, self.stops = model, request, set(request.stop_token_ids)
        self.prompt, self.source = list(request.prompt_ids), list[int]()  # of the decoder, of an encoder
        if model.config.decoder_layers:
            self.prompt, self.source = [model.decoder_start], self.prompt
        self.finished = BeamHypotheses(request.beam_width, request.length_penalty)
        self.runner: ModelRunner | None = None
        # Of the newest beams: those before them that they continue, and how many positions all rows have in common.
        self.beams, self.parents, self.common = [Beam()], list[int](), 0
        self.filled = 0  # tokens of the prompt that have been read

    @torch.no_grad()
    def step(self) -> bool:
        """Read a part of the prompt, or find one more token of each beam. Returns whether the search has ended.

        Raises CheckpointError where the model's logits are not numbers.
        """
        width, new = self.request.beam_width, self.request.max_new_tokens
        if self.runner is None:  # no other requests share its cache
            lengths = len(self.prompt) + new, len(self.source)
            self.runner = runner_of(self.model, width, *lengths, batch_invariant=False)
        if self.filled == len(self.prompt):
            return self._choose(self.runner, self._decode(self.runner))
        start, self.filled = self.filled, min(self.filled + READ_AT_ONCE, len(self.prompt))
        complete = self.filled == len(self.prompt)
        chunk = PrefillChunk(0, self.prompt[start : self.filled], start, source=self.source, keep=int(complete))
        logits = self.runner.prefill([chunk])  # read once; the rows of the other beams are copies
        return complete and self._choose(self.runner, logits)

    @property
    def best(self) -> tuple[Hypothesis, ...]:
        """The best num_samples finished hypotheses, best first."""
        found = self.finished.best[: self.request.num_samples]
        return tuple(Hypothesis(score, beam.ids, beam.logprobs, finish) for score, beam, finish in found)

    def _decode(self, runner: ModelRunner) -> Tensor | None:
        """The logits after the newest beams."""
        count, position = len(self.beams), len(self.prompt) + len(self.beams[0].ids) - 1  # of their newest tokens
        runner.cache.select(torch.tensor(self.parents, device=runner.cache.device), position, start=self.common)
        sources = [len(self.source)] * count if self.source else []
        return runner.decode(range(count), [beam.ids[-1] for beam in self.beams], [position] * count, sources)

    def _choose(self, runner: ModelRunner, logits: Tensor | None) -> bool:
        """Replace the beams by their likeliest continuations; whether the search has ended."""
        width, vocabulary = self.request.beam_width, self.model.config.vocab_size
        length = len(self.beams[0].ids) + 1
        # A beam has len(stops) continuations that stop: among so many at least `width` go on.
        number = min((1 + max(1, len(self.stops))) * width, len(self.beams) * vocabulary)
        compute = functools.partial(_likeliest, logits, [beam.total for beam in self.beams], number)
        best = runner.broadcast(compute, (number, 3)).tolist()
        continued, parents = list[Beam](), list[int]()
        for rank, (total, index, logprob) in enumerate(best):
            parent, token = divmod(int(index), vocabulary)
            before = self.beams[parent]
            beam = Beam(total, (*before.ids, token), (*before.logprobs, logprob))
            if token not in self.stops:
                continued.append(beam)
                parents.append(parent)
            elif rank < width:
                self.finished.add(beam, "stop")
            if len(continued) == width:
                break
        if self.finished.is_done(best[0][0], length):
            return True
        self.common = len(self.prompt) if len(continued) <= len(self.beams) else 0  # new rows need the prompt's too
        self.beams, self.parents = continued, parents
        if length < self.request.max_new_tokens and continued:
            return False
        for beam in continued:
            self.finished.add(beam, "length")
        return True


def check_options(request: BeamRequest) -> None:
    """Raise ConfigError for options of a search that cannot work."""
    width, new, samples = request.beam_width, request.max_new_tokens, request.num_samples
    penalty, limits = request.length_penalty, f"must lie between -{LARGEST_PENALTY:g} and {LARGEST_PENALTY:g}"
    for name, value, holds, rule, cure in (
        ("--beam-width", width, width >= 1, "must be at least 1", "Try 4"),
        ("--max-new-tokens", new, new >= 1, "must be at least 1 for beam search", "Ask for more"),
        ("--num-samples", samples, 1 <= samples <= width, f"must lie between 1 and {width}, the number of beams",
         "Ask for fewer, or for more beams"),
        ("--length-penalty", penalty, abs(penalty) <= LARGEST_PENALTY, limits, "Try 1"),
    ):  # fmt: skip
        if not holds:
            raise ConfigError(problem(name, value, rule, cure))


def no_memory(request: BeamRequest) -> ConfigError:
    """The error of a search whose cache the device has no memory for."""
    tokens = len(request.prompt_ids) + request.max_new_tokens
    found = Words(f"too little for {request.beam_width} beams of {tokens} tokens")
    rule, cure = "must hold the keys and values of each beam", "Ask for fewer beams, or for fewer tokens"
    return ConfigError(problem("The memory that the device has left", found, rule, cure))


def beam_search(
    model: TextModel | Runtime | nn.Module, prompt_ids: list[int], *, prompt: str | None = None, beam_width: int = 4,
    num_samples: int | None = None, max_new_tokens: int = 64, length_penalty: float = 1.0,
    stop_token_ids: Sequence[int] | None = None, logprobs: bool = False,
) -> list[Completion]:  # fmt: skip
    """The num_samples best (default: all) of beam_width continuations of one prompt, best first, found as in Megatron.

    A hypothesis ends with one of stop_token_ids (default: the tokenizer's end of document; () for none) or after
    max_new_tokens. Its score is the sum of the log-probabilities of its new tokens, the stop token among them, over
    their number ** length_penalty. logprobs: return these log-probabilities.

    Of a step's likeliest continuations those that stop are finished if they are among the first beam_width; of the
    others the first beam_width are continued. The search ends when the worst of beam_width finished hypotheses is no
    worse than the step's likeliest continuation, or after max_new_tokens, when the beams are finished as they are.
    transformers, with early_stopping=False, looks at the likeliest continuation that does not stop, and so may end
    earlier where length_penalty > 0; otherwise its results are the same.

    Raises ConfigError for options that cannot work and for a prompt that is too long for the model.
    """
    model = TextModel.of(model)
    if stop_token_ids is None:
        stop_token_ids = () if model.end_token is None else (model.end_token,)
    request = BeamRequest(
        prompt_ids=prompt_ids or tokenize_prompts(model, None)[0].prompt_ids, beam_width=beam_width,
        num_samples=beam_width if num_samples is None else num_samples, max_new_tokens=max_new_tokens,
        length_penalty=length_penalty, stop_token_ids=stop_token_ids,
    )  # fmt: skip
    best = search(model, request)
    if prompt is None and model.tokenizer is not None:
        prompt = model.tokenizer.decode(request.prompt_ids)
    answer = bool(model.config.decoder_layers)
    read = Completion(prompt_ids=list(request.prompt_ids), prompt=prompt, answer=answer)
    return completions_of(best, read, model, logprobs)


def search(model: TextModel, request: BeamRequest) -> tuple[Hypothesis, ...]:
    """The results of a search, from its first step to its last. Raises the errors of `beam_search`."""
    beams = BeamSearch(model, request)
    check_length(model.config, len(request.prompt_ids), request.max_new_tokens)
    with model.evaluating():
        while not beams.step():
            pass
    return beams.best


def completions_of(
    best: Sequence[Hypothesis], prompt: Completion, model: TextModel, logprobs: bool
) -> list[Completion]:  # fmt: skip
    """A Completion of each hypothesis. prompt: one without continuation."""
    completions, tokenizer = list[Completion](), model.tokenizer
    for each in best:
        completion = dataclasses.replace(
            prompt, ids=list(each.ids), score=each.score, finish=each.finish,
            logprobs=list(each.logprobs) if logprobs else None,
        )  # fmt: skip
        if tokenizer is not None:
            stream = completion.stream(tokenizer)
            text_ids = each.ids[:-1] if each.finish == "stop" else each.ids
            completion.continuation = "".join(map(stream.push, text_ids)) + stream.finish()
        completions.append(completion)
    return completions


def _likeliest(logits: Tensor | None, totals: Sequence[float], number: int) -> Tensor:
    """The likeliest continuations of beams: rows (total, beam x V + token, log-probability of the token), float64.

    logits [beams, V]; totals: log-probabilities of the beams. Raises CheckpointError where one is NaN.
    """
    assert logits is not None
    logprobs = logits.float().log_softmax(dim=-1)
    best = (logprobs + torch.tensor(totals, device=logits.device)[:, None]).flatten().topk(number)
    if best.values[0].isnan():  # the largest where one is NaN
        raise not_numbers()
    columns = best.values, best.indices, logprobs.flatten()[best.indices]
    return torch.stack([column.double() for column in columns], dim=1)
