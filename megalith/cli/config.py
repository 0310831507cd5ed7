"""megalith config: a few questions, and a YAML file for `megalith pretrain --config`."""

from __future__ import annotations

import argparse
import pathlib

from megalith import recipes
from megalith.common.errors import ConfigError
from megalith.common.files import write_text
from megalith.common.outputs import check as check_output
from megalith.common.outputs import writing
from megalith.config.checks import check
from megalith.config.loading import complete, from_yaml, to_yaml
from megalith.config.loading_values import convert, fields
from megalith.config.run import RunConfig
from megalith.config.text import flag, value_text

EXAMPLE = """\
examples:
  megalith config --output run.yaml
  printf 'cpu-tiny\\ncorpus_text_document\\ntokenizer.json\\n' | megalith config --output run.yaml --force

An empty answer, or the end of the input, takes the default shown in brackets.
"""


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "config",
        help="answer a few questions, get a YAML file for pretrain",
        description="Ask a few questions and write a YAML file for `megalith pretrain --config`.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--output", default="run.yaml", metavar="FILE", help="file to write (default run.yaml)")
    parser.add_argument("--force", "--overwrite", action="store_true", help="replace the file if it exists")
    parser.set_defaults(handler=ask_and_write)


def ask_and_write(args: argparse.Namespace) -> int:
    """Ask, check, write, and say what to do next; the exit status. Nothing is written where the answers cannot work."""
    output = pathlib.Path(args.output)
    if output.exists() and not args.force:
        raise ConfigError(f"--output: {output} exists already. Name another file, or add --force to replace it.")
    check_output([output], overwrite=True)
    name = _recipe()
    text = recipes.text(name)
    config = from_yaml(text, f"recipe {name}")
    config = config.replace(data_path=_answer(config, "data_path", "dataset prefix, as `megalith data preprocess` names it").split())
    files = _ask("tokenizer.json, or vocabulary and merges: vocab.json merges.txt").split()
    config = config.replace(**dict(zip(("tokenizer_model",) if len(files) == 1 else ("vocab_file", "merge_file"), files, strict=False)))
    for field in ("name", "train_iters" if config.schedule.train_samples is None else "train_samples", "micro_batch_size"):
        config = config.replace(**{field: convert(fields()[field], _answer(config, field), flag(field))[0]})
    processes = int(_answer_number("processes", recipes.about(text).get("processes", 1)))
    values = {field: value for field, value in config.flat().items() if value != fields()[field].default}
    config = complete(values, [])
    check(config, processes)
    with writing(output, overwrite=args.force):
        write_text(output, to_yaml(config, changed_only=True))
    start = "megalith" if processes == 1 else f"torchrun --nproc-per-node {processes} -m megalith"
    print(f"\nwrote {output}; next:\n  {start} pretrain gpt --config {output}")
    return 0


def _recipe() -> str:
    print("recipes to start from:")
    for name in recipes.names():
        print(f"  {name:18} {recipes.about(recipes.text(name))['summary']}")
    while True:
        name = _ask("recipe", "cpu-tiny")
        if name in recipes.names():
            return name
        print(f"  there is no recipe {name!r}")


def _answer(config: RunConfig, field: str, what: str = "") -> str:
    """An answer that has the field's type; asked again until it has."""
    known = config.flat()[field]
    while True:
        text = _ask(f"{flag(field)}: {what or fields()[field].metadata['help']}", value_text(known) if known not in (None, []) else "")
        _, trouble = convert(fields()[field], text, flag(field))
        if trouble is None:
            return text
        print(f"  {trouble.text}")


def _answer_number(what: str, known: int) -> str:
    while True:
        text = _ask(what, str(known))
        if text.isdecimal() and int(text) > 0:
            return text
        print(f"  {what}: found {text!r}; it is a whole number, 1 or more")


def _ask(question: str, default: str = "") -> str:
    """One line from standard input; the default for an empty one or at the end of the input."""
    try:
        return input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
    except EOFError:
        print()
        return default
