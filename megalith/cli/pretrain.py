"""megalith pretrain: recipe, YAML and flags to one checked config, and that to the training loop."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from typing import Any

from megalith import recipes
from megalith.config import launched
from megalith.config.architectures import ARCHITECTURES
from megalith.config.batch_math import check_length, data_parallel_size, told
from megalith.config.flags import flags
from megalith.config.flags.loading import TOKENIZER, from_yaml, resolve, source_texts, to_yaml
from megalith.config.flags.text import Problem, unknown
from megalith.config.flags.values import fields
from megalith.config.megatron import counts as megatron_counts
from megalith.config.parameters import parameter_count
from megalith.config.run import RunConfig
from megalith.workflows import dry_run

EXAMPLE = """\
examples:
  megalith pretrain gpt --recipe cpu-tiny --data-path corpus_text_document --tokenizer-model tokenizer.json --dry-run
  torchrun --nproc-per-node 2 -m megalith pretrain gpt --config run.yaml --train-iters 1000
  torchrun --nproc-per-node 2 -m megalith pretrain gpt --load Llama-3-8B --use-checkpoint-args --config run.yaml

Precedence: recipe, then --config, then flags; `none` unsets an optional value. Flags of Megatron's commands work as typed: the
old spellings and those not needed here are accepted with a line that says so.

--dry-run needs no corpus, no accelerator and no launcher: it checks for --world-size N processes, else for the number that the
config or recipe is for (its about: processes), else for the fewest that the layout allows. It lists the files that are missing,
and ends with status 1 where one that is named is not there or cannot be used.
"""
OWN = (
    *flags.RUN_FLAGS,
    flags.Flag(
        "--world-size", {"world_size": flags.VALUE}, help="with --dry-run: number of processes to check the config for"
    ),
)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a model",
        usage="megalith pretrain [MODEL] [--recipe NAME] [--config FILE] [--FIELD VALUE ...]",
        description="Train a model from the start, or go on with one.",
        epilog=EXAMPLE + "\nrecipes: " + ", ".join(recipes.names()),
    )
    models = f"{', '.join(ARCHITECTURES)} (default gpt), or module:name of your own"
    parser.add_argument("model", nargs="?", metavar="MODEL", help=models)
    flags.add_help(parser, OWN)
    parser.set_defaults(handler=pretrain, reads=functools.partial(flags.read, own=OWN))


def pretrain(args: argparse.Namespace) -> int:
    """Resolve and check the config, show it, and train unless --dry-run is given; the exit status."""
    reading, tell = args.reading, _tell if launched.rank() == 0 else lambda line: None
    dry = bool(reading.values.get("dry_run"))
    for line in launched.notices() if not dry else ():
        tell(line)
    texts = source_texts(
        reading.values.get("recipe"), reading.values.get("config"), recipes.text, []
    )  # resolve tells what is wrong
    meant = dry_run.number_of_processes(reading, texts)
    for name in reading.words[:1]:
        if name not in ARCHITECTURES and ":" not in name:
            otherwise = f"there are {', '.join(ARCHITECTURES)}, and your own goes by module:name"
            every = tuple(fields())  # what the model would have brought along is not missing as well
            reading.problems.append(Problem(every, unknown("model", name, ARCHITECTURES, otherwise)))

    def world_size(config: RunConfig) -> int:
        number, whence = meant(config)
        if whence:
            tell(whence)  # before the problems, which speak of a number that nobody typed
        return number

    config, notices = resolve(
        reading, read_recipe=recipes.text, read_checkpoint=checkpoint_config, read_tokenizer=checkpoint_tokenizer,
        world_size=world_size, corpus=not dry, paths=lambda config: () if dry else dry_run.wrong_paths(config),
    )  # fmt: skip
    for notice in notices:
        tell(notice)
    check_length(config, data_parallel_size(config, meant(config)[0]))
    if launched.rank() == 0:
        print(shown(config, meant(config)[0], reading.values.get("print_config", "changed")), end="", flush=True)
    if dry:
        faults, unnamed = dry_run.faults(config), list(dry_run.unnamed(config.data))
        if faults or unnamed:
            tell(
                "the config can work; what a run of it would not find here:"
                + "".join(f"\n  {line}" for line in [*faults, *unnamed])
            )
        return 1 if faults else 0
    from megalith.training.pretrain import train  # here, because it imports torch

    train(config)
    return 0


def _tell(line: str) -> None:
    print(f"megalith: {line}", file=sys.stderr)


def checkpoint_config(values: Mapping[str, Any]) -> str:
    """The YAML text of the config of what --load names, in whatever format."""
    from megalith.checkpoint.store import facts  # here, because few runs need them
    from megalith.checkpoint.store import folder as folders

    if folders.is_ours(values["load"]):
        return facts.read_config(folders.find(values["load"], values.get("ckpt_step")))
    return to_yaml(_foreign(values).config)


def checkpoint_tokenizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the tokenizer of --load is made from: its files, or at least its type; {} where nothing says it."""
    from megalith.checkpoint.store import folder as folders  # here, because few runs need them
    from megalith.data.tokenizers.tokenizer import saved_options

    if folders.is_ours(values["load"]):
        place = folders.find(values["load"], values.get("ckpt_step")) / "tokenizer"
        data, folder = from_yaml(checkpoint_config(values)).data, place if place.is_dir() else None
    else:
        weights = _foreign(values)
        data, folder = weights.config.data, weights.tokenizer
    if folder is not None:
        return saved_options(folder, data)
    return {"tokenizer_type": data.tokenizer_type} if data.tokenizer_type else {}


def _foreign(values: Mapping[str, Any]) -> Any:
    """The Weights of another program's checkpoint; what the command says counts where its files say nothing."""
    from megalith.checkpoint.formats import foreign  # here, because it imports torch
    from megalith.data.tokenizers.given import GivenTokenizer

    said = {name: value for name, value in values.items() if name in fields()}
    given = GivenTokenizer(None, {name: said[name] for name in TOKENIZER if said.get(name) is not None})
    asked, kind = said.get("vocab_size"), said.get("tokenizer_type")
    rows = megatron_counts.rows_asked(asked, kind) if asked else None
    model = {name: value for name, value in said.items() if fields()[name].section == "model"}
    config = RunConfig().replace(**said)
    return foreign.read(
        values["load"],
        foreign.options_of(config, words=lambda data: rows or given.words(data), assumed=model, replicas="first"),
    )


def shown(config: RunConfig, world_size: int, how_much: str) -> str:
    """The resolved config as YAML, under comment lines with what follows from it; '' for how_much 'none'."""
    if how_much == "none":
        return ""
    lines = [told(config, world_size)]
    if config.model.vocab_size:
        whole = config.replace(
            vocab_size=megatron_counts.rows_asked(config.model.vocab_size, config.data.tokenizer_type)
        )
        lines += [
            f"{parameter_count(whole.model):,} parameters, activation {config.model.activation}",
            *megatron_counts.report(whole),
        ]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(config, changed_only=how_much == "changed")
