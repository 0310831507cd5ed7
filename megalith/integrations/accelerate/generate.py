"""`model.megatron_generate`: what a prepared model writes, in its layout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words, fail, unknown
from megalith.generation.engine import Engine
from megalith.generation.model import TextModel, check_length
from megalith.generation.tensors import generate_tokens, new_tokens, unpad
from megalith.integrations.accelerate.session import Session

ROWS = 32  # that are decoded at one time
OPTIONS: dict[str, Any] = {  # with their defaults
    "top_p_decay": 0.0, "top_p_bound": 0.0, "add_BOS": False, "stop_token": None, "random_seed": 0,
}  # fmt: skip


@dataclasses.dataclass(eq=False)
class PreparedTextModel(TextModel):
    """A prepared model inside Runtime.evaluating(), without a tokenizer.

    start: the token with which a decoder starts.
    """

    start: int | None = None

    @property
    def decoder_start(self) -> int:
        """See TextModel; raises ConfigError where the model's config does not say."""
        if self.start is None:
            cure = "Set model.config.decoder_start_token_id before accelerator.prepare"
            raise ConfigError(problem("decoder_start_token_id", None, "must be in the model's config", cure))
        return self.start

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Nothing: `megatron_generate` does it once, as replicas may differ in how many prompts they have."""
        yield


def megatron_generate(
    session: Session, inputs: Tensor, attention_mask: Tensor | None = None, max_length: int | None = None,
    max_new_tokens: int | None = None, num_beams: int | None = None, temperature: float | None = None,
    top_k: int | None = None, top_p: float | None = None, length_penalty: float | None = None, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Prompts with what the model writes after them, int64 [b, t]; of a T5 the answer, after the decoder's start token.

    Every process calls it. Each data-parallel replica generates for the inputs that it was given, the same on all of
    its processes, which all get its result; replicas may have other inputs, and other numbers of them. A model in
    training is put back into training afterwards.

    inputs: int64 [b, s]. attention_mask: [b, s], 0 where padding is, on the right or on the left. max_length: of prompt
    and new tokens together, where max_new_tokens is not given. Tokens are drawn; the likeliest are taken with top_k=1.
    num_beams: beam search instead, for several prompts too, the best of each. kwargs: top_p_decay, top_p_bound, add_BOS
    (the config's bos_token_id before each prompt), stop_token (default: the config's eos_token_id), random_seed
    (default 0). Each row of the result is a prompt without padding, its new tokens up to the stop token, and
    pad_token_id, or the stop token, to the longest row.

    Raises ConfigError with every option that cannot work, and for models that write no text.
    """
    model, options = session.config.model, {**OPTIONS, **kwargs}
    if not model.causal and not model.decoder_layers:
        rule = "must write text: the generate method is not implemented for this model"
        raise ConfigError(problem("The model", model.model_type, rule, "Prepare a causal language model, or a T5"))
    lengths = {"max_length": max_length, "max_new_tokens": max_new_tokens}
    given = {"num_beams": num_beams, "temperature": temperature, "top_k": top_k, "top_p": top_p, **lengths, **options}
    fail(_problems(given))
    prompts, answers = unpad(inputs, attention_mask), bool(model.decoder_layers)
    bos = _token(session, "bos_token_id")
    if options["add_BOS"] and bos is None:
        cure = "Set model.config.bos_token_id before accelerator.prepare, or leave it out"
        raise ConfigError(problem("add_BOS", True, "needs a bos_token_id in the model's config", cure))
    new = new_tokens(max_length, 1 if answers else inputs.shape[-1]) if max_new_tokens is None else max_new_tokens
    longest = max(map(len, prompts), default=0) + (bos is not None)
    check_length(model, longest, new)
    stops = [options["stop_token"]] if options["stop_token"] is not None else _stop_tokens(session)
    runtime = session.runtime
    text = PreparedTextModel(
        runtime.stages[0].model, run_config=session.config, runtime=runtime,
        start=_token(session, "decoder_start_token_id"),
    )  # fmt: skip
    with runtime.evaluating():
        engine = None
        if prompts and num_beams is None:
            length = max(longest, new + 1) if answers else longest + new
            engine = Engine(text, max_batch_size=min(len(prompts), ROWS), max_length=length)
        return generate_tokens(
            engine or text, inputs, attention_mask, max_new_tokens=new, num_beams=num_beams, temperature=temperature,
            top_k=top_k, top_p=top_p, length_penalty=length_penalty, top_p_decay=options["top_p_decay"],
            top_p_bound=options["top_p_bound"], add_BOS=options["add_BOS"], stop_token=stops,
            random_seed=options["random_seed"], bos_token=bos, pad_token=_token(session, "pad_token_id"),
        )  # fmt: skip


def _problems(given: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the options, in the words of Accelerate's integration where it had the rule."""
    for name in [name for name in given if name not in (*PARAMETERS, *OPTIONS)]:
        known = (*PARAMETERS, "length_penalty", *OPTIONS)
        yield unknown("option of megatron_generate", name, known, f"the options are {', '.join(known)}")
    if given["max_length"] is None and given["max_new_tokens"] is None:
        rule = "are required for inference"
        yield problem("`max_length` or `max_new_tokens`", Words("neither"), rule, "Give max_new_tokens")
    for name, holds, rule, cure in RULES:
        if given[name] is not None and not holds(given[name]):
            yield problem("beam_width" if name == "num_beams" else name, given[name], rule, cure)
    if given["top_k"] and given["top_p"]:
        found = Words(f"top_p {given['top_p']} and top_k {given['top_k']}")
        yield problem("top_p and top_k sampling", found, "cannot be set together", "Leave one out")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _within(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (int, float)) and least <= value <= most


SMALLEST = 1e-30  # temperature
PARAMETERS = ("max_length", "max_new_tokens", "num_beams", "temperature", "top_k", "top_p")
RULES: tuple[tuple[str, Callable[[Any], bool], str, str], ...] = (  # (option, whether a value is right, rule, cure)
    ("temperature", _within(SMALLEST, 100.0), "must be a positive number less than or equal to 100.0",
     "Try 0.8, or take the likeliest token with top_k=1"),
    ("top_k", _within(0, 1000), "must be a positive number less than or equal to 1000", "Try 50"),
    ("top_p", _within(0.0, 1.0), "must be less than or equal to 1.0, and at least 0", "Try 0.9"),
    ("top_p_decay", _within(0.0, 1.0), "must be less than or equal to 1.0, and at least 0", "Try 0.99"),
    ("top_p_bound", _within(0.0, 1.0), "must be less than or equal to 1.0, and at least 0", "Try 0.1"),
    ("add_BOS", lambda value: isinstance(value, bool), "must be a boolean", "Give True or False"),
    ("num_beams", _is_integer, "must be an integer", "Try 4"),
    ("num_beams", lambda value: not _is_integer(value) or value > 0, "must be greater than 0", "Try 4"),
    ("stop_token", _is_integer, "must be an integer", "Give the number of a token"),
    ("max_new_tokens", lambda value: _is_integer(value) and value > 0, "must be greater than 0", "Give 1 or more"),
)  # fmt: skip


def _token(session: Session, name: str) -> Any:
    """A special token of transformers' configs, the one for generation first; None where neither has it."""
    values = (getattr(each, name, None) for each in (session.generation_config, session.hf_config))
    return next((value for value in values if value is not None), None)


def _stop_tokens(session: Session) -> list[int]:
    """The tokens that end a text, of which configs may name several; none beyond the vocabulary."""
    found = _token(session, "eos_token_id")
    tokens = found if isinstance(found, list) else [] if found is None else [found]
    return [token for token in tokens if token < (session.config.model.vocab_size or 0)]
