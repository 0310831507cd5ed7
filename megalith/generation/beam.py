"""Beam search: the likeliest continuations, found by keeping several at a time. Nothing is random."""

from __future__ import annotations

import functools
from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.model import TextModel, check_length
from megalith.generation.parallel.runner import runner_of
from megalith.generation.prompts import Completion, tokenize_prompts
from megalith.generation.runner import ModelRunner
from megalith.generation.sampling import not_numbers
from megalith.runtime.build import Runtime


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
    num_samples = beam_width if num_samples is None else num_samples
    for name, value, holds, rule, cure in (
        ("beam_width", beam_width, beam_width >= 1, "must be at least 1", "Try 4"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "must be at least 1 for beam search", "Ask for more"),
        ("num_samples", num_samples, 1 <= num_samples <= beam_width,
         f"must lie between 1 and {beam_width}, the number of beams", "Ask for fewer, or for more beams"),
    ):  # fmt: skip
        if not holds:
            raise ConfigError(problem(f"--{name.replace('_', '-')}", value, rule, cure))
    model = TextModel.of(model)
    if not prompt_ids:
        prompt_ids = tokenize_prompts(model, None)[0].prompt_ids
    check_length(model.config, len(prompt_ids), max_new_tokens)
    tokenizer, encoder_decoder = model.tokenizer, bool(model.config.decoder_layers)
    if stop_token_ids is None:
        stop_token_ids = () if model.end_token is None else (model.end_token,)
    if encoder_decoder:
        lengths = max_new_tokens + 1, len(prompt_ids)
        first = PrefillChunk(0, [model.decoder_start], source=prompt_ids)
    else:
        lengths = len(prompt_ids) + max_new_tokens, 0
        first = PrefillChunk(0, prompt_ids)
    runner = runner_of(model, beam_width, *lengths, batch_invariant=False)  # no other requests share the cache
    finished = BeamHypotheses(beam_width, length_penalty)
    with model.evaluating():
        _search(runner, first, finished, max_new_tokens, set(stop_token_ids))
    completions = []
    if prompt is None and tokenizer is not None:
        prompt = tokenizer.decode(prompt_ids)
    for score, beam, finish in finished.best[:num_samples]:
        completion = Completion(
            prompt_ids=prompt_ids, ids=list(beam.ids), prompt=prompt, score=score, finish=finish,
            logprobs=list(beam.logprobs) if logprobs else None, answer=encoder_decoder,
        )  # fmt: skip
        if tokenizer is not None:
            stream = completion.stream(tokenizer)
            text_ids = beam.ids[:-1] if finish == "stop" else beam.ids
            completion.continuation = "".join(map(stream.push, text_ids)) + stream.finish()
        completions.append(completion)
    return completions


@torch.no_grad()
def _search(
    runner: ModelRunner, first: PrefillChunk, finished: BeamHypotheses, max_new_tokens: int, stops: Set[int]
) -> None:
    width, prompt_length, vocabulary = finished.size, len(first.ids), runner.model.config.vocab_size
    source_lengths = [len(first.source)] * width if first.source else []
    beams, logits = [Beam()], runner.prefill([first])  # read once; the rows of the other beams are copies
    for length in range(1, max_new_tokens + 1):
        # A beam has len(stops) continuations that stop: among so many at least `width` go on.
        number = min((1 + max(1, len(stops))) * width, len(beams) * vocabulary)
        compute = functools.partial(_likeliest, logits, [beam.total for beam in beams], number)
        best = runner.broadcast(compute, (number, 3)).tolist()
        continued, parents = list[Beam](), list[int]()
        for rank, (total, index, logprob) in enumerate(best):
            parent, token = divmod(int(index), vocabulary)
            beam = Beam(total, (*beams[parent].ids, token), (*beams[parent].logprobs, logprob))
            if token not in stops:
                continued.append(beam)
                parents.append(parent)
            elif rank < width:
                finished.add(beam, "stop")
            if len(continued) == width:
                break
        if finished.is_done(best[0][0], length):
            return
        kept = prompt_length if len(continued) <= len(beams) else 0  # rows that are new need the prompt's keys too
        beams = continued
        if length == max_new_tokens:
            break
        position = prompt_length + length - 1  # of the beams' newest tokens
        runner.cache.select(torch.tensor(parents, device=runner.cache.device), position, start=kept)
        tokens = [beam.ids[-1] for beam in beams]
        logits = runner.decode(range(len(beams)), tokens, [position] * len(beams), source_lengths[: len(beams)])
    for beam in beams:
        finished.add(beam, "length")


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
