"""`megalith data wiki|warc|urls|clean|dedup|decontaminate|ids|shuffle|sample|stats`, and `pipeline`: corpus work."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from megalith.cli.data.preprocess import add_limit, add_tokenizer_arguments, tokenizer_options
from megalith.config.flags.text import flag, value_text
from megalith.curation.commands import EXAMPLES, HELP, SETTINGS

KINDS: dict[str, dict[str, Any]] = {  # how the flag of a field is read, by the type of the field
    "str": {"metavar": "TEXT"},
    "int": {"type": int, "metavar": "N"},
    "float": {"type": float, "metavar": "X"},
    "tuple[str, ...]": {"nargs": "+", "metavar": "NAME"},
}


def register(verbs) -> None:
    """Add the verbs."""
    for name in SETTINGS:
        parser = verbs.add_parser(
            name, help=HELP[name], epilog=f"example: megalith data {name} --input {EXAMPLES[name]}"
        )
        _add_run_flags(parser, name)
        add_command_flags(parser, SETTINGS.find(name))
        parser.set_defaults(handler=run, step=name)
    parser = verbs.add_parser(
        "pipeline",
        help="several of these steps, one after another, by a YAML file",
        epilog="example: megalith data pipeline steps.yaml",
    )
    parser.add_argument("file", metavar="YAML", help="input, output and steps: see docs/corpus.md")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and exit")
    _add_work_flags(parser)
    parser.set_defaults(handler=pipeline)


def _add_run_flags(parser: argparse.ArgumentParser, name: str) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs, directories, - (standard input); also in gzip, zstd, bzip2, xz",
    )
    group.add_argument(
        "--output", required=True, metavar="FILE", help="the result; .gz or .zst compresses it; - is standard output"
    )
    key = "url" if name == "urls" else "text"
    group.add_argument("--json-key", default=key, metavar="KEY", help="key of the text")
    group.add_argument("--dropped", metavar="FILE", help="write documents that are dropped there, with why")
    group.add_argument("--on-error", choices=("skip", "fail"), default="skip", help="on a line that is no document")
    add_limit(group)
    _add_work_flags(parser)


def _add_work_flags(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument("--workers", type=int, default=0, help="processes, or Ray actors (default: one a core)")
    work.add_argument("--partitions", type=int, default=1, help="cut the input into this many parts at least")
    work.add_argument(
        "--engine", default="processes", help="processes (this machine), inline (this process), ray, or module:name"
    )
    work.add_argument("--max-document-bytes", type=int, metavar="N", help="a longer line is unusable (default: 16 MiB)")
    work.add_argument("--overwrite", action="store_true", help="replace what exists of that name")


def add_command_flags(parser: argparse.ArgumentParser, cls: type) -> None:
    """A flag for each setting of a command."""
    group = parser.add_argument_group("settings")
    for each in dataclasses.fields(cls):
        if each.name == "tokenizer":
            add_tokenizer_arguments(parser, required=False)
            continue
        how: dict[str, Any] = dict(KINDS.get(str(each.type), {}))
        if str(each.type) == "bool":
            how = {"action": argparse.BooleanOptionalAction if each.default else "store_true"}
        if each.metadata["choices"]:
            how = {"choices": each.metadata["choices"]} | ({"type": int} if str(each.type) == "int" else {})
        text = each.metadata["help"].replace("%", "%%")
        if each.default not in ("", (), None, False) and "default" not in text:
            text += f" (default: {'on' if each.default is True else value_text(each.default)})"
        group.add_argument(flag(each.name), default=argparse.SUPPRESS, help=text, **how)


def run(args: argparse.Namespace) -> int:
    """Run one step; a summary on stderr, so that the documents may go to standard output."""
    from megalith.curation.pipeline import build_command
    from megalith.curation.progress import Progress
    from megalith.curation.run import execute

    names = {each.name for each in dataclasses.fields(SETTINGS.find(args.step))}
    settings = {name: value for name, value in vars(args).items() if name in names}
    if "tokenizer" in names and args.tokenizer_type:
        settings["tokenizer"] = tokenizer_options(args)
    command = build_command(args.step, settings)
    progress = Progress(args.step)
    try:
        report = execute(command, _run_options(args), notice=_notice, progress=progress)
    finally:
        progress.close()
    _print(report)
    return 0


def _run_options(args: argparse.Namespace):
    from megalith.curation.run import RunOptions
    from megalith.data.corpus.unusable import parse_limit

    names = [each.name for each in dataclasses.fields(RunOptions)]
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    return RunOptions(**given | {"max_unusable": parse_limit(args.max_unusable)})


def _notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _print(report: dict) -> None:
    for line in summary(report):
        _notice(line)


def summary(report: dict) -> list[str]:
    """What a step did, in a few lines."""
    from megalith.common import units

    seconds = report["seconds"]["all"]
    kept = f"{report['kept']:,} of {report['documents']:,} documents"
    sizes = f"{units.size(report['kept_bytes'])} of {units.size(report['bytes'])}"
    lines = [f"{report['step']}: {kept}, {sizes}, in {units.duration(seconds)}"]
    for rule, found in sorted(report["rules"].items(), key=lambda item: -item[1]["documents"]):
        lines.append(f"  {rule}: {found['documents']:,} {'changed' if found['changed'] else 'dropped'}")
    lines += [f"  {line}" for line in report.get("lines", ())]
    return [*lines, f"{report['output']}, {report['output']}.report.html"]


def pipeline(args: argparse.Namespace) -> int:
    """Run the steps of a YAML file."""
    from megalith.curation.pipeline import read_pipeline, run_pipeline
    from megalith.curation.progress import Progress

    steps = read_pipeline(args.file)
    if args.dry_run:
        print("\n".join(steps.plan()))
        return 0
    work = {
        name: value
        for name in ("workers", "partitions", "engine", "max_document_bytes", "overwrite")
        if (value := getattr(args, name)) is not None
    }
    for report in run_pipeline(steps, work, notice=_notice, progress=Progress):
        _print(report)
    return 0
