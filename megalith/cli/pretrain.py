"""megalith pretrain: recipe, YAML and flags to one checked config, and that to the training loop."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from megalith import recipes
from megalith.config import flags, launched, megatron_counts
from megalith.config.batch_math import check_length, data_parallel_size, global_batch, total_steps
from megalith.config.loading import from_yaml, resolve, to_yaml
from megalith.config.loading_values import fields
from megalith.config.parameters import parameter_count
from megalith.config.run import RunConfig
from megalith.config.text import Problem, unknown
from megalith.models import MODELS

EXAMPLE = """\
examples:
  megalith pretrain gpt --recipe cpu-tiny --data-path corpus_text_document --tokenizer-model tokenizer.json --dry-run
  torchrun --nproc-per-node 2 -m megalith pretrain gpt --config run.yaml --train-iters 1000

Precedence: recipe, then --config, then flags; `none` unsets an optional value. Flags of Megatron's commands work as typed: the
old spellings and those not needed here are accepted with a line that says so. --dry-run needs no corpus and no accelerator.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a model",
        usage="megalith pretrain [MODEL] [--recipe NAME] [--config FILE] [--FIELD VALUE ...]",
        description="Train a model from the start, or go on with one.",
        epilog=EXAMPLE + "\nrecipes: " + ", ".join(recipes.names()),
    )
    parser.add_argument("model", nargs="?", metavar="MODEL", help=f"{', '.join(MODELS)} (default gpt), or module:name of your own")
    flags.add_help(parser)
    parser.set_defaults(handler=pretrain, reads=flags.read)


def pretrain(args: argparse.Namespace) -> int:
    """Resolve and check the config, show it, and train unless --dry-run is given; the exit status."""
    reading, world_size = args.reading, launched.world_size()
    for name in reading.words[:1]:
        if name not in MODELS and ":" not in name:
            otherwise = f"there are {', '.join(MODELS)}, and your own goes by module:name"
            every = tuple(fields())  # what the model would have brought along is not missing as well
            reading.problems.append(Problem(every, unknown("model", name, MODELS, otherwise)))
    config, notices = resolve(
        reading, read_recipe=recipes.text, read_checkpoint=checkpoint_config, read_tokenizer=checkpoint_tokenizer, world_size=world_size
    )
    check_length(config, data_parallel_size(config, world_size))
    if launched.rank() == 0:
        for notice in notices:
            print(f"megalith: {notice}", file=sys.stderr)
        print(shown(config, world_size, reading.values.get("print_config", "changed")), end="", flush=True)
    if not reading.values.get("dry_run"):
        from megalith.training.pretrain import train  # here, because it imports torch

        train(config)
    return 0


def checkpoint_config(folder: str, iteration: int | None) -> str:
    """The YAML text of the config in a checkpoint (the latest one where no iteration is given)."""
    from megalith.checkpoint import facts  # here, because few runs need them
    from megalith.checkpoint import folder as folders

    return facts.read_config(folders.find(folder, iteration))


def checkpoint_tokenizer(folder: str, iteration: int | None) -> dict[str, Any]:
    """What the tokenizer in a checkpoint is made from: the files in it, or at least its type; {} where it says nothing."""
    from megalith.checkpoint import folder as folders  # here, because few runs need them
    from megalith.data.tokenizers import saved_options

    place = folders.find(folder, iteration)
    data = from_yaml(checkpoint_config(folder, iteration)).data
    if (place / "tokenizer").is_dir():
        return saved_options(place / "tokenizer", data)
    return {"tokenizer_type": data.tokenizer_type} if data.tokenizer_type else {}


def shown(config: RunConfig, world_size: int, how_much: str) -> str:
    """The resolved config as YAML, under comment lines with what follows from it; '' for how_much 'none'."""
    if how_much == "none":
        return ""
    dp = data_parallel_size(config, world_size)
    lines = [f"{world_size} processes, {dp} data-parallel; {total_steps(config, dp)} steps, each of {global_batch(config, dp)} samples"]
    if config.model.vocab_size and config.model.model_type in ("gpt", "bert", "t5"):
        whole = config.replace(vocab_size=megatron_counts.rows_asked(config.model.vocab_size, config.data.tokenizer_type))
        lines += [f"{parameter_count(whole.model):,} parameters, activation {config.model.activation}", *megatron_counts.report(whole)]
    return "".join(f"# {line}\n" for line in lines) + to_yaml(config, changed_only=how_much == "changed")
