"""megalith evaluate nq: how often the passages that a bi-encoder finds in its index hold an answer."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.cli.evaluate_results import Results
from megalith.cli.flags.load import CONTEXT, LAYOUT, TOKENIZER, model_fields
from megalith.cli.flags.options import add_option_flags, given_options
from megalith.common.errors import ConfigError, problem
from megalith.config import environment
from megalith.config.flags.text import flag
from megalith.config.run import RunConfig
from megalith.evaluation.options import EvaluationOptions, OpenDomainOptions

FILES = ("valid_data", "qa_data_dev", "qa_data_test")


def add_nq_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of open-domain questions, in a group of their own."""
    group = parser.add_argument_group("open-domain questions (nq)")
    questions = "questions with answers: DPR's TSV or JSON, or JSON lines of NQ-open"
    for name, help in (("--qa-data-dev", questions), ("--qa-data-test", "more of them")):
        group.add_argument(name, nargs="+", default=[], metavar="FILE", help=help)
    add_option_flags(group, OpenDomainOptions)


def unused_nq_flags(args: argparse.Namespace, nq: bool) -> list[str]:
    """What was typed of the flags of the other kind of task: of a model that writes text, or of nq."""
    return [flag(name) for name in given_options(args, EvaluationOptions if nq else OpenDomainOptions)]


def evaluate_nq(args: argparse.Namespace, models: Sequence[str], results: Results) -> None:
    """Measure each model on each file of questions. models: that which made the index, where none is named."""
    options = OpenDomainOptions(**given_options(args, OpenDomainOptions))
    files = [path for name in FILES for path in getattr(args, name)]
    if options.index is None:
        rule, cure = "must name the folder of the index", "Write --index wiki.store, which megalith index build writes"
        raise ConfigError(problem("--index", None, rule, cure))
    if not files:
        rule, cure = "must name files of questions", "Write --qa-data-dev nq-dev.csv"
        raise ConfigError(problem("--qa-data-dev", None, rule, cure))
    from megalith.data.questions import read_questions  # here, because they are not needed for --help
    from megalith.data.tokenizers.given import TokenizerOverride
    from megalith.generation.load import torch_dtype
    from megalith.retrieval.embed import Embedder
    from megalith.retrieval.store import Store
    from megalith.runtime.build import process_group
    from megalith.runtime.load import format_options
    from megalith.workflows.open_domain import evaluate

    asked = {path: read_questions(path) for path in files}
    typed = {name: getattr(args, name) for name in model_fields() if hasattr(args, name)}
    layout = {name: getattr(args, name) or 1 for name in (*LAYOUT, CONTEXT)}
    options_of_format = format_options(args.qkv_layout, args.swiglu_order, args.replicas, typed)
    how: Mapping[str, Any] = {
        "parallel": RunConfig().replace(device=args.device, **layout).parallel,
        "dtype": torch_dtype(args.dtype), "iteration": args.ckpt_step,
        "tokenizer": TokenizerOverride(args.tokenizer, {name: getattr(args, name) for name in TOKENIZER}),
        "options": options_of_format | ({} if args.adapter is None else {"adapter": args.adapter}),
    }  # fmt: skip
    with process_group():
        for load in models or [Store(options.index).model]:
            started, embedder = time.monotonic(), Embedder.load(load, **how)
            for path, result in evaluate(embedder, options.index, asked, options, notice).items():
                results.keep(result, load, "nq", [path], {}, started)
            results.write()


def notice(line: str) -> None:
    """Print a line on the first process."""
    if environment.rank() == 0:
        print(f"megalith: {line}", file=sys.stderr, flush=True)
