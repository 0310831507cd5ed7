"""Arguments under Megatron's names, as `other_megatron_args` and a user's parser of a model's config give them.

Each of them acts, has a line that says why it does nothing here, or is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from megalith.common.errors import problem
from megalith.config.checks.checks import violated_limit
from megalith.config.flags import flags
from megalith.config.flags.text import flag
from megalith.config.flags.values import convert, fields
from megalith.config.megatron import flags as megatron_flags
from megalith.config.sections.data import TOKENIZER_FILES

STATE = "accelerator.save_state(FOLDER) and load_state(FOLDER) decide what is saved and loaded"
WANDB = "Accelerator(log_with='wandb') and init_trackers(..., init_kwargs={'wandb': {...}}) say it"
TRACKERS = "Accelerator(log_with=..., project_dir=...) records what accelerator.log is given"
LOOP = "the script's own loop decides it"
OPTIMIZER = "the optimizer given to accelerator.prepare has its own"
LOADERS = "data loaders give batches of their own size, num_micro_batches times in each call of the model"
PROCESSES = "the Accelerator has found the device and connected the processes"
BY_CLASS = "the class of the model given to accelerator.prepare decides it"
BY_MODEL = "the model given to accelerator.prepare decides what is trained"
NO_EFFECT: dict[str, str] = {  # section or field of RunConfig -> why an argument of it does nothing here
    "optimizer": OPTIMIZER, "batch": LOADERS, "checkpoint": STATE, "logging": TRACKERS, "validation": LOOP,
    "resilience": LOOP, "lora": BY_MODEL,
    **dict.fromkeys(("device", "distributed_backend", "distributed_timeout_minutes"), PROCESSES),
    **dict.fromkeys(("dataset", "loss", "model_type"), BY_CLASS),
    **dict.fromkeys(("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler"), STATE),
}  # fmt: skip
ACTIVE = (  # fields of those sections that act
    "min_lr", "start_weight_decay", "end_weight_decay", "weight_decay_incr_style", "clip_grad", "seed",
    "no_load_optim", "no_save_optim", "eval_iters", "eval_interval",
)  # fmt: skip
# Why a flag of Megatron does nothing in a run of `pretrain`, and why here.
OTHER_REASONS = {megatron_flags.METRICS: TRACKERS, megatron_flags.SIGTERM: LOOP}
FOR_TOKENIZER = ("tokenizer_type", *TOKENIZER_FILES, "vocab_extra_ids")  # text is generated with it too
NOT_OF_INDEXED = (*FOR_TOKENIZER, "seq_length", "decoder_seq_length", "dataset", "loss")
FLAG = re.compile(r"--[A-Za-z][\w-]*")


class MegatronArgs(NamedTuple):
    """What arguments say: values by field of RunConfig (also of fields that do nothing here), problems, lines."""

    values: dict[str, Any]
    problems: list[str]
    notices: list[str]

    @property
    def active(self) -> dict[str, Any]:
        """The values that act."""
        return {name: value for name, value in self.values.items() if reason(name) is None}


def read(args: Mapping[str, Any], where: str = "other_megatron_args") -> MegatronArgs:
    """Read arguments by Megatron's names, with dashes or underscores. where: what to call the dict in messages."""
    wandb = [str(name) for name in args if str(name).startswith("wandb")]
    words = [word for name, value in args.items() if name not in wandb for word in _as_flag(str(name), value)]
    reading = flags.read(words, ())
    problems, values = [each.text for each in reading.problems], dict[str, Any]()
    for name, raw in reading.values.items():
        if name not in fields():  # a number of tokens
            cure = f"Write {name.replace('_tokens', '_samples')}, the tokens divided by seq_length"
            problems.append(problem(name, raw, "must be given in samples here", cure))
            continue
        value, mistake = convert(fields()[name], raw, flag(name))
        wrong = None if mistake else violated_limit(name, value)
        if mistake or wrong:
            problems.append(mistake.text if mistake else problem(flag(name), value, *wrong))
        else:
            values[name] = value
    idle = dict.fromkeys(wandb, WANDB) | {name: why for name in values if (why := reason(name))}
    notices = [_replaced(line, OTHER_REASONS) for line in reading.notices]
    notices += [f"{name} has no effect: {why}" for name, why in idle.items()]
    problems, notices = ([f"{where}: {without_dashes(line)}" for line in lines] for lines in (problems, notices))
    return MegatronArgs(values, problems, notices)


def _replaced(text: str, parts: Mapping[str, str]) -> str:
    for old, new in parts.items():
        text = text.replace(old, new)
    return text


def reason(name: str) -> str | None:
    """Why a field of RunConfig does nothing here; None where it acts."""
    return None if name in ACTIVE else NO_EFFECT.get(name, NO_EFFECT.get(fields()[name].section))


def for_indexed_alone(names: Iterable[str]) -> list[str]:
    """Those of the fields that only datasets of indexed files read."""
    return [name for name in names if fields()[name].section == "data" and name not in NOT_OF_INDEXED]


def without_dashes(text: str, names: Mapping[str, str] | None = None) -> str:
    """A message on flags as one on arguments: --num-layers becomes num_layers.

    names: other names of fields of RunConfig, such as the plugin's.
    """

    def renamed(match: re.Match[str]) -> str:
        if match[0] not in flags.config_flags() and f"unknown flag {match[0]}" not in text:
            return match[0]  # a flag of another command, such as --help
        name = match[0][2:].replace("-", "_")
        return (names or {}).get(name, name)

    return FLAG.sub(renamed, text).replace("unknown flag", "unknown name")


def _as_flag(name: str, value: Any) -> list[str]:
    """An argument as one would type it after a command; nothing where it is off, or not set."""
    name = flag(name.lstrip("-"))
    known, field = flags.config_flags(), fields().get(name[2:].replace("-", "_"))
    if value is None:
        return [f"{name}=none"] if field is not None and field.optional else []
    if isinstance(value, bool):
        opposite = next((each for each in (f"--no-{name[2:]}", f"--disable-{name[2:]}") if each in known), None)
        if name not in known and opposite:
            return [] if value else [opposite]
        acts = name not in known or bool(known[name].sets)
        return [f"{name}={str(value).lower()}"] if value or acts else []
    if isinstance(value, str) and field is not None and field.kind is list:
        value = value.split()
    if isinstance(value, (list, tuple)):
        return [name, *(map(str, value) if value else ["none"])]
    return [f"{name}={value}"]
