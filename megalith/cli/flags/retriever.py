"""Flags of the verbs that read texts with a Retro: where its neighbours are looked up."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words, flag

if TYPE_CHECKING:
    from megalith.generation.model import TextModel

NAMES = ("retro_workdir", "retro_bert_load", "retro_index_str")


def add_retriever_flags(parser: argparse.ArgumentParser) -> None:
    """In a group of their own."""
    retro = parser.add_argument_group("what a Retro retrieves")
    retro.add_argument("--retro-workdir", metavar="FOLDER", help="database and index, as `megalith retro` makes them")
    retro.add_argument("--retro-bert-load", metavar="PATH", help="the BERT that the index was made by")
    retro.add_argument("--retro-index-str", metavar="INDEX", help="an index of FAISS (default: exact search)")


def given_retriever_flags(args: argparse.Namespace) -> list[str]:
    """Those that were typed."""
    return [flag(name) for name in NAMES if getattr(args, name)]


def set_retriever(model: TextModel, args: argparse.Namespace) -> None:
    """Give a Retro what --retro-workdir names."""
    named = given_retriever_flags(args)
    if not named:
        return
    rule, what = "is for a Retro", named[0]
    if not model.config.retrieval_layers:
        raise ConfigError(problem(what, Words(f"it with {model.config.model_type}"), rule, "Leave it out"))
    for name in map(flag, NAMES[:2]):
        if name not in named:
            raise ConfigError(problem(name, None, f"must be given with {what}", "Name it too"))
    if model.tokenizer is None:
        rule = "must be known to retrieve, because the BERT reads text"
        raise ConfigError(problem("The tokenizer of the model", None, rule, "Name it with --tokenizer FOLDER"))
    from megalith.retrieval.retro.retriever import DatabaseRetriever  # here, because it imports torch

    model.retriever = DatabaseRetriever(
        args.retro_workdir, args.retro_bert_load, model.config, model.tokenizer, index_string=args.retro_index_str,
        device=args.device,
    )  # fmt: skip
