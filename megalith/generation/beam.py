"""Beam search: the likeliest continuations found by keeping several at a time. Nothing is drawn."""

from __future__ import annotations

import torch
from torch import nn

from megalith.common.errors import ConfigError, problem
from megalith.generation.cache import KVCache, Piece
from megalith.generation.model import TextModel, check_length
from megalith.generation.prompts import Completion, tokenized
from megalith.generation.runner import Runner


class Finished:
    """The best `size` hypotheses so far: (score, tokens, why it ended)."""

    def __init__(self, size: int, length_penalty: float):
        self.size, self.penalty = size, length_penalty
        self.best: list[tuple[float, list[int], str]] = []

    def add(self, tokens: list[int], total: float, length: int, finish: str) -> None:
        """Enter a hypothesis of log-probability `total` and `length` new tokens, if it is good enough."""
        self.best.append((total / length**self.penalty, tokens, finish))
        self.best.sort(key=lambda entry: -entry[0])
        del self.best[self.size :]

    def closed(self, total: float, length: int) -> bool:
        """Whether no continuation of a beam of log-probability `total` would enter any more, judged at its present
        length.
        """
        return len(self.best) == self.size and self.best[-1][0] >= total / length**self.penalty


def beam_search(
    model: TextModel | nn.Module, prompt_ids: list[int], *, prompt: str | None = None, beam_width: int = 4,
    max_new_tokens: int = 64, length_penalty: float = 1.0, stop_token: int | None = None,
) -> list[Completion]:  # fmt: skip
    """beam_width continuations of one prompt, best first, as Megatron finds them.

    A hypothesis ends at stop_token (default: the tokenizer's end of document), which its ids leave out; its score is
    the sum of its log-probabilities over length ** length_penalty, the length counted with the stop token. Of the 2 x
    beam_width likeliest continuations of a step those that stop are finished if they are among the first beam_width,
    the others go on. The search ends when the worst finished hypothesis is no worse than the step's likeliest continuation, which may be
    one that stops.
    """
    if beam_width < 1:
        raise ConfigError(problem("--beam-width", beam_width, "it must be at least 1", "Try 4"))
    if max_new_tokens < 1:
        raise ConfigError(problem("--max-new-tokens", max_new_tokens, "beam search needs at least 1", "Ask for more"))
    model = TextModel.of(model)
    if not prompt_ids:
        prompt_ids = tokenized(model, None)[0].prompt_ids
    check_length(model.config, len(prompt_ids), max_new_tokens)
    tokenizer, pair = model.tokenizer, bool(model.config.decoder_layers)
    stop_token = model.end if stop_token is None else stop_token
    finished = Finished(beam_width, length_penalty)
    length, source = (max_new_tokens + 1, len(prompt_ids)) if pair else (len(prompt_ids) + max_new_tokens, 0)
    runner = Runner(model.model, KVCache(model.model, beam_width, length, source), exact=False)  # there are no others
    first = Piece(0, [model.decoder_start], source=prompt_ids) if pair else Piece(0, prompt_ids)
    _search(runner, first, finished, max_new_tokens, stop_token)
    made = []
    if prompt is None and tokenizer is not None:
        prompt = tokenizer.decode(prompt_ids)
    for value, ids, finish in finished.best:
        one = Completion(prompt_ids=prompt_ids, ids=ids, prompt=prompt, score=value, finish=finish, answer=pair)
        if tokenizer is not None:
            stream = one.stream(tokenizer)
            one.continuation = "".join(map(stream.push, ids)) + stream.finish()
        made.append(one)
    return made


@torch.no_grad()
def _search(runner: Runner, first: Piece, finished: Finished, count: int, stop_token: int | None) -> None:
    width = finished.size
    beams: list[list[int]] = [[]]
    logits, totals = runner.read([first]), torch.zeros(1, 1)
    for length in range(1, count + 1):
        logprobs = totals.to(logits.device) + logits.float().log_softmax(dim=-1)
        found = logprobs.flatten().topk(min(2 * width, logprobs.numel()))
        going: list[tuple[float, int, int]] = []  # log-probability, beam, token
        for rank, (total, at) in enumerate(zip(found.values.tolist(), found.indices.tolist())):
            beam, token = divmod(at, logits.shape[-1])
            if token != stop_token:
                going.append((total, beam, token))
            elif rank < width:
                finished.add(beams[beam], total, length, "stop")
            if len(going) == width:
                break
        beams = [beams[beam] + [token] for _, beam, token in going]
        if finished.closed(found.values[0].item(), length):
            return
        if length == count:
            for (total, _, _), tokens in zip(going, beams):
                finished.add(tokens, total, length, "length")
            return
        totals = torch.tensor([[total] for total, _, _ in going])
        place = len(first.ids) + length - 1  # of the beams' newest tokens
        runner.cache.select(torch.tensor([beam for _, beam, _ in going], device=logits.device), place)
        sources = [len(first.source)] * len(going) if first.source else []
        logits = runner.step([token for _, _, token in going], [place] * len(going), sources)
