"""Text out of a model: `generate` gives texts, `complete` all there is to know about them, `score` the chances of given ones."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from megalith.common.errors import CheckpointError, ConfigError, DataError, problem
from megalith.config.model import ModelConfig
from megalith.config.text import Words
from megalith.data.tokenizers import Tokenizer
from megalith.generation.cache import Decoder
from megalith.generation.pair import PairDecoder
from megalith.generation.sampling import Sampling, choose, row_keys
from megalith.generation.stream import TextStream

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | None
OnToken = Callable[[int, int, str], None]  # (which text, new token, text that became certain by it)


@dataclasses.dataclass(kw_only=True)
class Completion:
    """A prompt and what the model wrote after it.

    prompt_ids, ids: tokens read (with the end-of-document token that stands before an empty prompt) and tokens written
    (with the one that ended it). prompt, continuation: their texts, without such tokens; None without a tokenizer.
    answer: whether the continuation stands alone, as what an encoder-decoder writes does.
    logprobs: natural logarithms of the chances that the model gave the tokens of `ids`, before temperature and filters,
    where asked for. score: of beam search. finish: why it ended, "stop" or "length".
    """

    prompt_ids: list[int]
    ids: list[int] = dataclasses.field(default_factory=list)
    prompt: str | None = None
    continuation: str | None = None
    logprobs: list[float] | None = None
    score: float | None = None
    finish: str = "length"
    answer: bool = False

    @property
    def text(self) -> str:
        """Prompt and continuation, or the answer alone; needs a tokenizer."""
        if self.prompt is None or self.continuation is None:
            raise ConfigError("this model has no tokenizer, so there is no text: use the token numbers in `ids`.")
        return self.continuation if self.answer else self.prompt + self.continuation

    def stream(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> TextStream:
        """What turns the tokens written into text."""
        return TextStream(tokenizer, [] if self.answer else self.prompt_ids, stops)


def generate(
    model: nn.Module | Decoder, prompts: Prompts = None, *, max_new_tokens: int = 64, num_samples: int = 1, temperature: float = 1.0,
    top_k: int = 0, top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None,
    stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False, beam_width: int | None = None, length_penalty: float = 1.0,
    on_token: OnToken | None = None, batch_size: int = 32,
) -> list[str]:  # fmt: skip
    """Texts, each a prompt and what follows (or the answer alone, of a T5): num_samples for each prompt, in order.

    model: from `megalith.load`. prompts: a text, several, lists of token ids, or None for texts that start from nothing.
    max_new_tokens: most tokens written after a prompt. seed: the same seed gives the same texts; None draws one.
    temperature: below 1 likely tokens become likelier, above 1 less likely ones; 0 is greedy. top_k: among the k likeliest tokens
    (0: all). top_p: among the likeliest tokens of this probability together (0: all); top_p_decay, top_p_bound: it becomes
    max(p x decay, bound) after each token. stop: texts that end one and are left out of it. stop_at_eod: so does the
    end-of-document token. add_bos: put that token before every prompt. on_token, batch_size: see `complete`.
    beam_width: beam search with so many beams, the best num_samples given, ranked by log-probability / length ** length_penalty;
    nothing is drawn then, so a seed changes nothing, and options of sampling are refused.

    Raises ConfigError for options that cannot work and for prompts too long for the model, DataError for unknown tokens.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound)
    if beam_width is None:
        made = complete(
            model, prompts, **dataclasses.asdict(sampling), max_new_tokens=max_new_tokens, num_samples=num_samples, seed=seed, stop=stop,
            stop_at_eod=stop_at_eod, add_bos=add_bos, on_token=on_token, batch_size=batch_size,
        )  # fmt: skip
        return [each.text for each in made]
    from megalith.generation.beam import beam_search

    if sampling != Sampling() or stop or not stop_at_eod or on_token:
        rule = "beam search draws nothing, ends at the end of document, and knows its texts at the end alone"
        cure = "Leave out temperature, top_k, top_p, stop, stop_at_eod and on_token, or the beams"
        raise ConfigError(problem("beam_width", Words(f"{beam_width}, and options of sampling"), rule, cure))
    found = [
        beam_search(
            model, one.prompt_ids, prompt=one.prompt, beam_width=beam_width, max_new_tokens=max_new_tokens, length_penalty=length_penalty
        )
        for one in tokenized(model, prompts, add_bos)
    ]
    return [each.text for beams in found for each in beams[:num_samples]]


def complete(
    model: nn.Module | Decoder, prompts: Prompts = None, *, max_new_tokens: int = 64, temperature: float = 1.0, top_k: int = 0,
    top_p: float = 0.0, top_p_decay: float = 0.0, top_p_bound: float = 0.0, seed: int | None = None, num_samples: int = 1,
    stop: Sequence[str] = (), stop_at_eod: bool = True, add_bos: bool = False, logprobs: bool = False, on_token: OnToken | None = None,
    batch_size: int = 32,
) -> list[Completion]:  # fmt: skip
    """What the model writes after each prompt, or in answer to it, num_samples completions for each, in order.

    model: from `load`, or any model in evaluation mode that has `.tokenizer` (or None) and `.config`; or a Decoder of one,
        to keep its memory and its compiled step for the next call.
    prompts: texts, or lists of token ids, or None; an empty one starts from the end-of-document token.
    temperature, top_k, top_p, top_p_decay, top_p_bound: see Sampling. temperature=0 or top_k=1 is greedy.
    seed: completion number i of a call draws its random numbers from (seed, i, place); None draws a seed.
    stop: texts that end a completion and are left out of it. stop_at_eod: the end-of-document token ends it.
    add_bos: put the end-of-document token before every prompt, as Megatron does.
    on_token: called for each new token; the pieces of text of one completion add up to its continuation.
    batch_size: rows that are worked on at one time; results do not depend on it.

    Raises ConfigError for options that cannot work and for prompts too long for the model, DataError for unknown tokens.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, top_p_decay=top_p_decay, top_p_bound=top_p_bound)
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("num_samples", num_samples, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigError(problem(name, value, f"it must be at least {least}", f"Give {least} or more"))
    made = [
        dataclasses.replace(one, ids=[], logprobs=[] if logprobs else None)
        for one in tokenized(model, prompts, add_bos)
        for _ in range(num_samples)
    ]
    check_length(model, max((len(one.prompt_ids) for one in made), default=0), max_new_tokens)
    seed = secrets.randbits(63) if seed is None else seed
    tokenizer = tokenizer_of(model)
    eod = end_of(model) if stop_at_eod else None
    for start in range(0, len(made) if max_new_tokens else 0, batch_size):
        rows = [Row(number, made[number], tokenizer, eod, stop, on_token) for number in range(start, min(start + batch_size, len(made)))]
        with decoder_for(model, max(len(row.made.prompt_ids) for row in rows) + max_new_tokens) as decoder:
            _write(decoder, rows, sampling, seed, max_new_tokens)
    return made


class Row:
    """One completion in the making."""

    def __init__(
        self, number: int, made: Completion, tokenizer: Tokenizer | None, eod: int | None, stop: Sequence[str], on_token: OnToken | None
    ):
        self.number, self.made, self.eod, self.on_token = number, made, eod, on_token
        self.stream = made.stream(tokenizer, stop) if tokenizer is not None else None
        self.done = False

    def push(self, token: int, logprob: float | None, last: bool) -> None:
        """Take a new token; `last` when no more may follow."""
        self.made.ids.append(token)
        if self.made.logprobs is not None and logprob is not None:
            self.made.logprobs.append(logprob)
        piece, stopped = "", token == self.eod
        if self.stream is not None:
            if not stopped:
                piece = self.stream.push(token)
                stopped = self.stream.stopped
            if stopped or last:
                piece += self.stream.finish()
            self.made.continuation = self.stream.text
        self.done, self.made.finish = stopped or last, "stop" if stopped else "length"
        if self.on_token is not None:
            self.on_token(self.number, token, piece)


def _write(decoder: Decoder, rows: list[Row], sampling: Sampling, seed: int, count: int) -> None:
    """Read the prompts of `rows` and write up to `count` tokens after each."""
    logits = decoder.read([row.made.prompt_ids for row in rows])
    if logits.isnan().any():
        raise CheckpointError("the model's logits are not numbers (NaN): its weights are damaged, or its training had diverged.")
    keys = row_keys(seed, [row.number for row in rows], logits.device)
    for nth in range(count):
        tokens = choose(logits, sampling, keys, decoder.places, nth)
        chances = [None] * len(rows) if rows[0].made.logprobs is None else logprobs_of(logits, tokens).tolist()
        for row, token, chance in zip(rows, tokens.tolist(), chances):
            if not row.done:
                row.push(token, chance, last=nth + 1 == count)
        living = [at for at, row in enumerate(rows) if not row.done]
        if not living:
            return
        if not decoder.fixed and len(living) <= len(rows) // 2:  # the finished ones cost more than moving the others together
            where = torch.tensor(living, device=logits.device)
            decoder.select(where)
            rows, tokens, keys = [rows[at] for at in living], tokens[where], keys[where]
        logits = decoder.step(tokens)


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log chances of `tokens` [b] under logits [b, V], float32."""
    return logits.float().log_softmax(dim=-1).gather(-1, tokens[:, None])[:, 0]


@torch.no_grad()
def score(model: nn.Module | Decoder, texts: Prompts, *, add_bos: bool = False, batch_size: int = 8) -> list[list[float]]:
    """Log chances of each token of each text after the first: len(tokens) - 1 numbers, natural logarithms.

    texts: as the prompts of `complete`. The sum of a list is the text's log likelihood given its first token; add_bos counts
    the first token too.
    """
    if config_of(model).decoder_layers:
        raise ConfigError(problem("model", "t5", "the texts scored are those of models of one stack", "Load a GPT"))
    made, model = tokenized(model, texts, add_bos), model.model if isinstance(model, Decoder) else model
    check_length(model, max((len(one.prompt_ids) for one in made), default=0), 0)
    device, loss = next(model.parameters()).device, model.token_loss
    results: list[list[float]] = []
    weight, loss.z_loss = loss.z_loss, 0.0  # the loss is the log chance only without it
    try:
        for start in range(0, len(made), batch_size):
            rows = [one.prompt_ids for one in made[start : start + batch_size]]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            labels = torch.tensor([row[1:] + [-1] * (longest - len(row) + 1) for row in rows], device=device)
            losses = model(ids, labels=labels).tolist()
            results += [[-value for value in losses[i][: len(row) - 1]] for i, row in enumerate(rows)]
    finally:
        loss.z_loss = weight
    return results


def tokenizer_of(model: nn.Module | Decoder) -> Tokenizer | None:
    """The tokenizer that `load` attached, or None."""
    return getattr(model.model if isinstance(model, Decoder) else model, "tokenizer", None)


def config_of(model: nn.Module | Decoder) -> ModelConfig:
    """The config of a model, or of that of a Decoder."""
    return (model.model if isinstance(model, Decoder) else model).config


def end_of(model: nn.Module | Decoder) -> int | None:
    """The token that ends a text: of a document, or of what a decoder beside an encoder says."""
    tokenizer = tokenizer_of(model)
    return None if tokenizer is None else tokenizer.eos if config_of(model).decoder_layers else tokenizer.eod


def decoder_for(model: nn.Module | Decoder, capacity: int) -> Decoder:
    """The decoder itself, if it is one and large enough, or a new one."""
    if not isinstance(model, Decoder) and model.config.decoder_layers:
        tokenizer = tokenizer_of(model)
        if tokenizer is None:
            raise ConfigError("this model has no tokenizer, which alone knows with what token its decoder starts: set model.tokenizer.")
        return PairDecoder(model, capacity, tokenizer.decoder_start)
    if not isinstance(model, Decoder):
        return Decoder(model, capacity)
    if capacity > model.reading.capacity:
        raise ConfigError(
            f"prompt and new tokens together: found {capacity}; this decoder was made for {model.reading.capacity}. "
            f"Ask for fewer, or make one with Decoder(model, {capacity})."
        )
    return model


def check_length(model: nn.Module | Decoder, prompt: int, new: int) -> None:
    """Raise ConfigError where a sequence would be longer than the model's positions; ALiBi and relative ones have no such limit."""
    config = config_of(model)
    limit = config.max_position_embeddings
    if config.positions in ("alibi", "relative") or limit is None:
        return
    which = f"the model's limit (max_position_embeddings) is {limit}"
    if config.decoder_layers:
        if prompt > limit:
            raise ConfigError(f"too long: the longest prompt has {prompt} tokens; {which}. Shorten it to {limit} tokens.")
        if new >= limit:
            told = f"an answer of {new} new tokens after its start token has {new + 1}"
            raise ConfigError(f"too long: {told}; {which}. Ask for at most {limit - 1} new tokens.")
    elif prompt + new > limit:
        if prompt < limit:
            cure = f"Shorten the prompt or ask for at most {limit - prompt} new tokens"
        elif new < limit:
            cure = f"Shorten the prompt to at most {limit - new} tokens"
        else:
            cure = f"Shorten the prompt, and ask for fewer new tokens, so that they are at most {limit} together"
        told = f"the longest prompt has {prompt} tokens" + (f" and {new} new ones are asked for, together {prompt + new}" if new else "")
        raise ConfigError(f"too long: {told}; {which}. {cure}.")


def tokenized(model: nn.Module | Decoder, prompts: Prompts, add_bos: bool = False) -> list[Completion]:
    """A Completion without continuation for each prompt."""
    config = config_of(model)
    if not config.decoder_layers and not config.causal:
        rule = "text is written, and scored, by models that read from left to right"
        raise ConfigError(problem("model", config.model_type, rule, "Load a GPT or a T5"))
    tokenizer, vocabulary, made = tokenizer_of(model), config.vocab_size, []
    given: Sequence[str | Sequence[int]] = [""] if prompts is None else [prompts] if isinstance(prompts, str) else prompts
    for number, prompt in enumerate(given):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise ConfigError("this model has no tokenizer: give prompts as lists of token numbers, or set model.tokenizer.")
            ids, text = list(map(int, tokenizer.encode(prompt))) if prompt else [], prompt
        else:
            ids, text = [int(i) for i in prompt], None if tokenizer is None else tokenizer.decode(prompt)
        if add_bos or not ids:
            if tokenizer is None:
                raise ConfigError(
                    "an empty prompt starts from the end-of-document token, which only a tokenizer knows: give at least one token."
                )
            ids = [tokenizer.require("eod"), *ids]
        wrong = [i for i in ids if not 0 <= i < vocabulary]
        if wrong:
            rule = f"the model's vocabulary has {vocabulary} tokens, numbered from 0"
            raise DataError(problem(f"prompt {number}, token", wrong[0], rule, "Use the tokenizer that it was trained with"))
        begun = None if text is None else ""
        made.append(Completion(prompt_ids=ids, prompt=text, continuation=begun, answer=bool(config.decoder_layers)))
    return made
