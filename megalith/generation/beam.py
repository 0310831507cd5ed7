"""Beam search: the likeliest continuations, found by keeping several at a time. Nothing is random."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from megalith.common.errors import ConfigError, problem
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.model import TextModel, check_length
from megalith.generation.parallel.runner import runner_of
from megalith.generation.prompts import Completion, tokenize_prompts
from megalith.generation.runner import ModelRunner
from megalith.runtime.build import Runtime


class BeamHypotheses:
    """The best `size` finished hypotheses so far: (score, tokens, why it ended); as in Megatron's beam_utils.py."""

    def __init__(self, size: int, length_penalty: float):
        self.size, self.penalty = size, length_penalty
        self.best: list[tuple[float, list[int], str]] = []

    def add(self, tokens: list[int], total: float, length: int, finish: str) -> None:
        """Add a hypothesis of log-probability `total` and `length` new tokens, if it is among the best."""
        self.best.append((total / length**self.penalty, tokens, finish))
        self.best.sort(key=lambda entry: -entry[0])
        del self.best[self.size :]

    def is_done(self, total: float, length: int) -> bool:
        """Whether no continuation of a beam of log-probability `total` could still be added, judged at its present
        length.
        """
        return len(self.best) == self.size and self.best[-1][0] >= total / length**self.penalty


def beam_search(
    model: TextModel | Runtime | nn.Module, prompt_ids: list[int], *, prompt: str | None = None, beam_width: int = 4,
    max_new_tokens: int = 64, length_penalty: float = 1.0, stop_token: int | None = None,
) -> list[Completion]:  # fmt: skip
    """beam_width continuations of one prompt, best first, as Megatron finds them.

    A hypothesis ends at stop_token (default: the tokenizer's end of document), which is not in its ids; its score is
    the sum of its log-probabilities over length ** length_penalty, the length counted with the stop token. Of the 2 x
    beam_width likeliest continuations of a step those that stop are finished if they are among the first beam_width;
    the others are continued. The search ends when the worst finished hypothesis is no worse than the step's likeliest
    continuation, which may be one that stops.
    """
    if beam_width < 1:
        raise ConfigError(problem("--beam-width", beam_width, "must be at least 1", "Try 4"))
    if max_new_tokens < 1:
        rule = "must be at least 1 for beam search"
        raise ConfigError(problem("--max-new-tokens", max_new_tokens, rule, "Ask for more"))
    model = TextModel.of(model)
    if not prompt_ids:
        prompt_ids = tokenize_prompts(model, None)[0].prompt_ids
    check_length(model.config, len(prompt_ids), max_new_tokens)
    tokenizer, encoder_decoder = model.tokenizer, bool(model.config.decoder_layers)
    stop_token = model.end_token if stop_token is None else stop_token
    finished = BeamHypotheses(beam_width, length_penalty)
    if encoder_decoder:
        lengths = max_new_tokens + 1, len(prompt_ids)
        first = PrefillChunk(0, [model.decoder_start], source=prompt_ids)
    else:
        lengths = len(prompt_ids) + max_new_tokens, 0
        first = PrefillChunk(0, prompt_ids)
    runner = runner_of(model, beam_width, *lengths, batch_invariant=False)  # no other requests share the cache
    with model.evaluating():
        _search(runner, first, finished, max_new_tokens, stop_token)
    completions = []
    if prompt is None and tokenizer is not None:
        prompt = tokenizer.decode(prompt_ids)
    for score, ids, finish in finished.best:
        completion = Completion(
            prompt_ids=prompt_ids, ids=ids, prompt=prompt, score=score, finish=finish, answer=encoder_decoder
        )
        if tokenizer is not None:
            stream = completion.stream(tokenizer)
            completion.continuation = "".join(map(stream.push, ids)) + stream.finish()
        completions.append(completion)
    return completions


@torch.no_grad()
def _search(
    runner: ModelRunner, first: PrefillChunk, finished: BeamHypotheses, count: int, stop_token: int | None
) -> None:
    width, device, vocabulary = finished.size, runner.cache.device, runner.model.config.vocab_size
    beams: list[list[int]] = [[]]
    logits, totals = runner.prefill([first]), torch.zeros(1, 1)
    for length in range(1, count + 1):
        number = min(2 * width, len(beams) * vocabulary)
        compute = functools.partial(_likeliest, logits, totals, number)
        best = [(total, int(index)) for total, index in runner.broadcast(compute, (number, 2)).tolist()]
        continued: list[tuple[float, int, int]] = []  # log-probability, beam, token
        for rank, (total, index) in enumerate(best):
            beam, token = divmod(index, vocabulary)
            if token != stop_token:
                continued.append((total, beam, token))
            elif rank < width:
                finished.add(beams[beam], total, length, "stop")
            if len(continued) == width:
                break
        beams = [beams[beam] + [token] for _, beam, token in continued]
        if finished.is_done(best[0][0], length):
            return
        if length == count:
            for (total, _, _), tokens in zip(continued, beams):
                finished.add(tokens, total, length, "length")
            return
        totals = torch.tensor([[total] for total, _, _ in continued])
        position = len(first.ids) + length - 1  # of the beams' newest tokens
        runner.cache.select(torch.tensor([beam for _, beam, _ in continued], device=device), position)
        source_lengths = [len(first.source)] * len(continued) if first.source else []
        logits = runner.decode(
            range(len(continued)), [token for _, _, token in continued], [position] * len(continued), source_lengths
        )


def _likeliest(logits: Tensor | None, totals: Tensor, number: int) -> Tensor:
    """Rows (log-probability, beam x V + token) of the likeliest continuations, float64 [number, 2]; logits [beams, V],
    totals [beams, 1] of the beams.
    """
    assert logits is not None
    logprobs = totals.to(logits.device) + logits.float().log_softmax(dim=-1)
    return torch.stack([each.double() for each in logprobs.flatten().topk(number)], dim=1)
