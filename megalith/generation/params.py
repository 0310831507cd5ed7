"""Every option of a generated text, each with its help: SamplingParams are the engine's, GenerationParams add a text's.

Nothing here imports torch, so that `megalith generate --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.foreign_names import megalith_name
from megalith.config.flags.text import Words, below_minimum, fail, flag, unknown
from megalith.config.options import option

SMALLEST = 2.0**-126  # the smallest normal number of float32
LARGEST_PENALTY = 30.0  # the power of a length of up to 10^10 that a double holds, and so does its reciprocal
EXPECTED = {  # type of a field -> what its values must be
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "tuple[str, ...]": "a text or a list of texts",
    "tuple[int, ...]": "a list of token numbers",
    "Mapping[int, float]": "numbers by token number",
}
BEAM_OPTIONS = {
    "max_new_tokens", "stop_token_ids", "stop_at_eod", "add_bos", "echo", "seed", "num_samples", "logprobs",
    "beam_width", "length_penalty",
}  # fmt: skip


def lists_its_fields(cls: type) -> type:
    """Add the help of each field to the docstring of a class, for `help` and editors."""
    lines = [f"{each.name}: {each.metadata['help']}." for each in dataclasses.fields(cls)]
    cls.__doc__ = "\n    ".join([f"{cls.__doc__}\n", *lines])
    return cls


@lists_its_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request's tokens are chosen, and when they end.

    Penalties and biases change the logits first; then apply temperature, top_k, top_p and min_p, in this order. Raises
    ConfigError for values that cannot work.
    """

    temperature: float = option(
        1.0, "logits are divided by it: below 1 likely tokens become likelier; 0: greedy, the likeliest", minimum=0.0
    )
    top_k: int = option(
        0, "choose among the k likeliest tokens, and those tied with the k-th; 0: all, 1: greedy", minimum=0
    )
    top_p: float = option(
        0.0, "choose among the likeliest tokens, up to the one with which they reach this probability; 0: all"
    )
    top_p_decay: float = option(0.0, "top_p is multiplied by this after each new token; 0: it stays")
    top_p_bound: float = option(0.0, "where top_p_decay ends")
    min_p: float = option(
        0.0, "choose among the tokens that are at least this times as probable as the likeliest; 0: all"
    )
    repetition_penalty: float = option(
        1.0, "above 1 tokens of prompt and text become less likely (Keskar et al., 2019); 1: off"
    )
    presence_penalty: float = option(0.0, "subtracted from the logits of tokens that the new text has; 0: off")
    frequency_penalty: float = option(0.0, "the same, times how often the new text has them; 0: off")
    logit_bias: Mapping[int, float] = option({}, "added to the logits of these tokens; -inf bans one")
    max_new_tokens: int = option(64, "most tokens that are generated; 0: none", minimum=0)
    min_new_tokens: int = option(0, "nothing ends the text before it has so many tokens", minimum=0)
    stop_token_ids: tuple[int, ...] = option((), "tokens that end the text, and are no part of it")
    seed: int | None = option(None, "the same seed gives the same texts (default: another each time)")
    logprobs: bool = option(False, "return the natural log-probability that the model gave each new token")
    top_logprobs: int = option(0, "return the so many likeliest tokens of each position too, with theirs", minimum=0)
    prompt_logprobs: bool = option(False, "return both for the tokens of the prompt after its first")

    def __post_init__(self):
        problems, fields = dict[str, str](), dataclasses.fields(self)  # one of each field
        for each in fields:
            value, kind = getattr(self, each.name), str(each.type)
            try:
                object.__setattr__(
                    self, each.name, _convert(kind.removesuffix(" | None"), value, kind.endswith(" | None"))
                )
            except (TypeError, ValueError):
                rule = f"must be {EXPECTED[kind.removesuffix(' | None')]}"
                problems[each.name] = problem(flag(each.name), value, rule, f"It is: {each.metadata['help']}")
        fail(problems.values())  # values of other types cannot be compared
        for each in fields:
            for text in below_minimum(each.name, getattr(self, each.name), each.metadata["minimum"]):
                problems[each.name] = text
        defaults = {each.name: each.default for each in fields}
        for name, holds, rule, cure in self._rules():
            value = getattr(self, name)
            if not holds and value != defaults[name]:  # a default is wrong only beside another value that is
                problems.setdefault(name, problem(flag(name), value, rule, cure))
        fail(problems.values())

    def _rules(self) -> list[tuple[str, bool, str, str]]:
        """(field, whether it is right, rule, cure)."""
        fraction, signed = "must lie between 0 (off) and 1", "must lie between -2 and 2"
        biases = all(bias == -math.inf or abs(bias) <= 1e6 for bias in self.logit_bias.values())
        return [
            ("temperature", self.temperature <= 1e6, "must be at most 1e6", "Try 0.8"),
            ("top_p", 0.0 <= self.top_p <= 1.0, fraction, "Try 0.9"),
            ("top_p_decay", 0.0 <= self.top_p_decay <= 1.0, fraction, "Try 0.99"),
            ("top_p_bound", 0.0 <= self.top_p_bound <= self.top_p, "must lie between 0 and top_p",
             "Lower it, or raise --top-p"),
            ("min_p", 0.0 <= self.min_p <= 1.0, fraction, "Try 0.05"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100.0, "must lie between 0.01 and 100",
             "Try 1.2"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, signed, "Try 0.5"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, signed, "Try 0.5"),
            ("logit_bias", biases, "must have numbers between -1e6 and 1e6, or -inf",
             "Try numbers between -100 and 100"),
            ("min_new_tokens", self.min_new_tokens <= self.max_new_tokens,
             f"must be at most max_new_tokens, {self.max_new_tokens}", "Lower it, or raise --max-new-tokens"),
        ]  # fmt: skip

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken and nothing is drawn."""
        return self.top_k == 1 or self.temperature < SMALLEST

    def top_p_at(self, nth: int) -> float:
        """top_p for the nth new token, counted from 0; 1 where it is off, 0 only where it has decayed to nothing."""
        if not self.top_p or not self.top_p_decay:
            return self.top_p or 1.0
        return max(self.top_p * self.top_p_decay**nth, self.top_p_bound)


@lists_its_fields
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationParams(SamplingParams):
    """All options of a prompt: those of SamplingParams, and those that are about its text.

    `megalith generate` has a flag for each, and a line of its .jsonl prompt file may have a key for each. Raises
    ConfigError for values that cannot work.
    """

    num_samples: int = option(1, "texts for each prompt, each with its own random numbers", minimum=1)
    stop: tuple[str, ...] = option((), "texts that end the text, and are no part of it")
    stop_at_eod: bool = option(True, "the end-of-document token ends the text")
    stop_on_eol: bool = option(False, "end after the first newline, by the tokenizer's own tokens")
    stop_on_double_eol: bool = option(False, "end after the first empty line")
    prevent_newline_after_colon: bool = option(False, "no newline follows a colon")
    add_bos: bool = option(False, "put the end-of-document token before the prompt, as Megatron does")
    echo: bool = option(True, "texts begin with their prompt, except those of an encoder-decoder")
    beam_width: int | None = option(
        None, "beam search with so many beams, instead of sampling; the best num_samples are the texts", minimum=1
    )
    length_penalty: float = option(1.0, "beams are ranked by log-probability / length^length_penalty")

    def _rules(self) -> list[tuple[str, bool, str, str]]:
        limits = f"must lie between -{LARGEST_PENALTY:g} and {LARGEST_PENALTY:g}"
        rules = [
            *super()._rules(),
            ("stop", all(self.stop), "must be texts of at least one character", "Leave out the empty one"),
            ("length_penalty", abs(self.length_penalty) <= LARGEST_PENALTY, limits, "Try 1"),
        ]
        if self.beam_width is not None:
            default = GenerationParams()
            names = (each.name for each in dataclasses.fields(self) if each.name not in BEAM_OPTIONS)
            if given := [name for name in names if getattr(self, name) != getattr(default, name)]:
                found, rule = ", ".join(given), "must be given without options of sampling: beam search draws nothing"
                cure = "Leave out the one or the others"
                raise ConfigError(problem("--beam-width", Words(f"{self.beam_width} and {found}"), rule, cure))
        return rules

    def replace(self, **options: Any) -> GenerationParams:
        """These options, with other values for some; greedy=True is temperature=0.

        Raises ConfigError for unknown names, with the nearest, and for values that cannot work.
        """
        known = [each.name for each in dataclasses.fields(self)]
        if options.pop("greedy", False):
            options["temperature"] = 0.0
        fail(unknown_option(name, known) for name in options if name not in known)
        return dataclasses.replace(self, **options)


def unknown_option(name: str, known: list[str]) -> str:
    """What is wrong with the name of an option: what it is called here, or the nearest."""
    called = flag(name) if megalith_name(flag(name)) else name
    return unknown("option", called, known, f"the options are {', '.join(known)}")


def _convert(kind: str, value: Any, optional: bool) -> Any:
    """A field's value from what Python and JSON give; raises TypeError or ValueError where it cannot be one."""
    if value is None and optional:
        return None
    if kind == "tuple[str, ...]":
        texts = (value,) if isinstance(value, str) else tuple(value)
        return texts if all(isinstance(text, str) for text in texts) else _refuse(value)
    if kind == "tuple[int, ...]":
        return tuple(map(operator.index, [value] if isinstance(value, int) else value))
    if kind == "Mapping[int, float]":
        return {int(token): float(bias) for token, bias in dict(value).items()}
    if isinstance(value, bool) or kind == "bool":
        return value if isinstance(value, bool) and kind == "bool" else _refuse(value)
    if kind == "int":
        return operator.index(value)
    return float(value) if isinstance(value, numbers.Real) else _refuse(value)


def _refuse(value: Any) -> Any:
    raise TypeError(value)
