"""Flags of training and of Megatron's programs, for verbs that open a trained model: a command works as typed.

Those of the model are kept, for files that lack them. Each of the others is told in a line, with what takes its place.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megalith.cli.flags.load import model_fields
from megalith.common.errors import ConfigError
from megalith.config.flags import flags


class ForTraining(argparse.Action):
    """A flag that pretrain or Megatron has: one of the model's is kept, another is remembered, to be named."""

    def __init__(self, *args: Any, config_flag: flags.Flag, **options: Any):
        super().__init__(*args, **options)
        self.config_flag = config_flag

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:  # fmt: skip
        known = self.config_flag
        if known.refused and values not in known.harmless:
            raise ConfigError(f"{option} cannot be used: {known.refused}")
        sets = known.by_value.get(str(values), known.sets)
        if sets and set(sets) <= set(model_fields()):
            for name, value in sets.items():
                setattr(namespace, name, values if value is flags.VALUE else str(value))
        else:
            namespace.unused = [*namespace.unused, option]


def add_dtype_flags(parser: argparse.ArgumentParser) -> None:
    """Megatron's spellings of --dtype."""
    for name, dtype in (("--fp16", "float16"), ("--bf16", "bfloat16")):
        parser.add_argument(name, action="store_const", dest="dtype", const=dtype, help=argparse.SUPPRESS)


def add_training_flags(parser: argparse.ArgumentParser, more: Mapping[str, int | str] | None = None) -> None:
    """Every flag of training that the parser lacks, and `more`: {flag: how many values it takes}."""
    known = {name: flags.Flag(name, {}, nargs) for name, nargs in (more or {}).items()}
    for name, each in {**flags.config_flags(), **known}.items():
        if name not in parser._option_string_actions:
            parser.add_argument(
                name, dest="unused", action=ForTraining, config_flag=each, default=argparse.SUPPRESS,
                nargs=None if each.nargs == 1 else each.nargs, help=argparse.SUPPRESS,
            )  # fmt: skip
    parser.set_defaults(unused=[])


def unused_flags(args: argparse.Namespace, verb: str, instead: Mapping[str, str]) -> list[str]:
    """A line on the flags that were typed and have no effect. verb: "a server"; instead: why, or what does it here."""
    unused = list(dict.fromkeys(args.unused))
    texts = [f"{name} ({instead[name]})" if instead.get(name) else name for name in unused]
    return [f"flags that have no meaning for {verb}, and no effect: {', '.join(texts)}"] if unused else []
