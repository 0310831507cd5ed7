"""megalith evaluate: perplexity, LAMBADA, open-domain questions, lm-evaluation-harness, of one or several models."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from megalith.cli.evaluate_nq import FILES, add_nq_flags, evaluate_nq, unused_nq_flags
from megalith.cli.evaluate_results import Results
from megalith.cli.flags.load import (
    CONTEXT,
    LAYOUT,
    WHAT_TO_LOAD,
    add_format_flags,
    add_load_flags,
    check_paths,
    load_model,
)
from megalith.cli.flags.options import add_option_flags, given_options
from megalith.cli.flags.retriever import add_retriever_flags, given_retriever_flags, set_retriever
from megalith.cli.flags.training import add_dtype_flags, add_training_flags, unused_flags
from megalith.common.errors import ConfigError, problem
from megalith.common.extras import require
from megalith.common.orphans import ends_with_launcher
from megalith.common.outputs import writing
from megalith.config import environment
from megalith.config.flags.text import Words, choose
from megalith.evaluation.options import OPEN_DOMAIN, TASKS, EvaluationOptions

EXAMPLE = """\
examples:
  megalith evaluate wikitext103 runs/first --valid-data wiki.test.tokens
  megalith evaluate lambada gpt2 runs/first --valid-data lambada_test.jsonl --strict-lambada --html lambada.html
  megalith evaluate ppl runs/first --valid-data law.txt news.jsonl --json ppl.json
  megalith evaluate --harness hellaswag,piqa runs/first
  megalith evaluate nq runs/ict --index wiki.store --qa-data-dev nq-dev.csv --faiss-match string
  torchrun --nproc-per-node 4 -m megalith evaluate lambada Llama-3-8B --tensor-model-parallel-size 2 --valid-data ...

wikitext103 is any WikiText file, as Megatron measures it. lambada is JSON lines of passages. ppl is any text:
plain-text files, each one text, and JSON lines (.jsonl, .json), each line one. nq is questions to a bi-encoder and its
index (docs/retrieval.md). The flags of Megatron's tasks/main.py work as typed; those without a meaning here are named
in a line.
"""
EXAMPLE_CURE = "Write megalith evaluate wikitext103 MODEL --valid-data FILE"
RECOMPUTED = "nothing is recomputed where there is no backward pass"
WEIGHTS = "the weights alone are read"
INSTEAD = {
    "--activations-checkpoint-method": RECOMPUTED, "--recompute-activations": RECOMPUTED,
    "--recompute-granularity": RECOMPUTED, "--recompute-method": RECOMPUTED, "--checkpoint-activations": RECOMPUTED,
    "--no-load-optim": WEIGHTS, "--no-load-rng": WEIGHTS, "--log-interval": "a bar shows every batch on a terminal",
    "--global-batch-size": "--micro-batch-size is what a process reads at a time", "--seed": "nothing is drawn",
    "--num-workers": "the files are read as a whole",
}  # fmt: skip


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "evaluate",
        help="perplexity, LAMBADA, tasks of lm-evaluation-harness",
        usage="megalith evaluate TASK MODEL [MODEL ...] --valid-data FILE [--FLAG VALUE ...]",
        description="How well trained models predict text. MODEL is " + WHAT_TO_LOAD + "; several are compared.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="TASK MODEL", help="wikitext103, lambada, ppl, nq or module:name; then the models")
    add("--task", metavar="NAME", help="the task, as Megatron names it (WIKITEXT103, LAMBADA)")
    add("--harness", metavar="TASKS", help="instead of a task: names of lm-evaluation-harness, with commas between")
    add("--load", metavar="PATH", help="the model, as Megatron names it")
    add("--valid-data", nargs="+", default=[], metavar="FILE", help="what is read")
    add_load_flags(parser, (*LAYOUT, CONTEXT))
    add_dtype_flags(parser)
    add_option_flags(parser.add_argument_group("what is measured"), EvaluationOptions)
    add_nq_flags(parser)
    add_retriever_flags(parser)
    add("--batch-size", dest="micro_batch_size", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    harness = parser.add_argument_group("lm-evaluation-harness").add_argument
    harness("--include-path", metavar="FOLDER", help="a folder of tasks of your own, in YAML")
    harness("--num-fewshot", type=int, metavar="N", help="examples before each question (default: as the task says)")
    harness("--limit", type=float, metavar="N", help="questions of each task; below 1 a share (default: all)")
    output = parser.add_argument_group("what is written").add_argument
    output("--json", metavar="FILE", help="the numbers, their definitions and the settings")
    output("--html", metavar="FILE", help="a page that compares the models")
    output("--examples", metavar="FILE", help="each window, text, passage or question, a JSON line each")
    output("--compare", nargs="+", default=[], metavar="FILE", help="results of earlier --json to show beside these")
    output("--overwrite", action="store_true", help="replace these files if they exist")
    add_format_flags(parser)
    add_training_flags(parser)
    parser.set_defaults(handler=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """Measure each model, and show and write what was found; the exit status."""
    task, models = _words(args)
    options = EvaluationOptions(**given_options(args, EvaluationOptions))
    for args.load in models:
        check_paths(args, "MODEL" if args.words else "--load")
    if args.harness:
        require("lm_eval", "--harness")
    args.unused += unused_nq_flags(args, nq=task in OPEN_DOMAIN)
    if task in OPEN_DOMAIN:
        args.unused += given_retriever_flags(args)
    if environment.rank() == 0:
        for line in unused_flags(args, "an evaluation", INSTEAD):
            print(f"megalith: {line}", file=sys.stderr, flush=True)
    with ends_with_launcher(), _files(args):
        return _evaluate(args, task, models, options)


def _words(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """The task (None: those of --harness) and the models."""
    words, task = list(args.words), args.task
    if task and args.harness:
        found = Words(f"--task {task} and --harness {args.harness}")
        raise ConfigError(problem("The task", found, "must be one", "Leave one of them out"))
    if not task and not args.harness:
        if not words:
            raise ConfigError(problem("TASK", Words("nothing"), f"must be one of {', '.join(TASKS)}, nq", EXAMPLE_CURE))
        task = words.pop(0)
    if args.load is not None:
        words.append(args.load)
    if task and ":" not in task:
        task = choose("task", task.lower(), (*TASKS, *OPEN_DOMAIN))
    if not words and task not in OPEN_DOMAIN:
        cure = "Add its path after the task"
        raise ConfigError(problem("MODEL", Words("nothing"), f"must name {WHAT_TO_LOAD}", cure))
    return task, list(dict.fromkeys(words))


@contextlib.contextmanager
def _files(args: argparse.Namespace) -> Iterator[None]:
    """Hold the locks of the files that are written, on the process that writes them."""
    notice = functools.partial(print, file=sys.stderr, flush=True)
    with contextlib.ExitStack() as stack:
        for name in ("json", "html", "examples") if environment.rank() == 0 else ():
            if path := getattr(args, name):
                inputs = [path for files in (*FILES, "compare") for path in getattr(args, files)]
                held = writing(path, inputs=inputs, overwrite=args.overwrite, flag=f"--{name}", notice=notice)
                stack.enter_context(held)
        yield


def _evaluate(args: argparse.Namespace, task: str | None, models: Sequence[str], options: EvaluationOptions) -> int:
    results = Results(args)
    if task in OPEN_DOMAIN:
        evaluate_nq(args, models, results)
        return results.show()
    made = None if task is None else TASKS.find(task)(args.valid_data, options)  # what is wrong is found before loading
    from megalith.runtime.build import process_group  # here, because it imports torch

    with process_group():
        for args.load in models:
            started = time.monotonic()
            model = load_model(args)
            if model.config.retrieval_layers or len(models) == 1:
                set_retriever(model, args)
            settings = {name: value for name, value in dataclasses.asdict(options).items() if value is not None}
            named = ("ckpt_step", "adapter")
            settings |= {each: getattr(args, each) for each in named if getattr(args, each) is not None}
            for shown in shown_as(model, args):
                for name, result in measured(model, task, made, options, args).items():
                    results.keep(result, shown, name, args.valid_data, settings, started)
                started = time.monotonic()
            results.write()
            del model  # its memory is the next one's
    return results.show()


def shown_as(model: Any, args: argparse.Namespace) -> Iterator[str]:
    """What records call the model. A Retro with a database comes twice, the second time finding no neighbours."""
    yield (name := model_name(args)) + (", with neighbours" if model.retriever else "")
    if model.retriever:
        model.retriever = lambda chunk: ()
        yield name + ", without neighbours"


def model_name(args: argparse.Namespace) -> str:
    """What records call the model: its path, with what else says which weights these are."""
    parts = [args.load]
    if args.ckpt_step is not None:
        parts.append(f"step {args.ckpt_step}")
    if args.adapter is not None:
        parts.append(f"adapter {args.adapter}")
    return ", ".join(parts)


def measured(
    model: Any, task: str | None, made: Any, options: EvaluationOptions, args: argparse.Namespace
) -> dict[str, Any]:
    """The Result of each task, by its name."""
    show = environment.rank() == 0
    if task is not None:
        from megalith.evaluation.evaluate import measure

        return {task: measure(model, made, options, f"{task}, {args.load}", show)}
    from megalith.evaluation.harness import run_tasks

    return run_tasks(
        model, args.harness.split(","), include_path=args.include_path, num_fewshot=args.num_fewshot,
        limit=args.limit, batch_size=options.micro_batch_size, max_length=options.seq_length, show=show,
    )  # fmt: skip
