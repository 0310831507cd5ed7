"""`megalith checkpoint`: look into checkpoints, prove them whole, make changed copies, convert them."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
from typing import Any

from megalith.checkpoint.store import fit, folder, manifest
from megalith.checkpoint.store.facts import describe, part_of, read_config, read_train_state
from megalith.cli import checkpoint_convert
from megalith.common import units
from megalith.common.errors import CheckpointError, ConfigError

EXAMPLES = """\
examples:
  megalith checkpoint inspect runs/gpt
  megalith checkpoint inspect runs/gpt/checkpoints/iter_0000100 --with other.yaml
  megalith checkpoint verify runs/gpt
  megalith checkpoint edit runs/gpt weights --drop optimizer
  megalith checkpoint import Llama-3-8B runs/llama
  megalith checkpoint export runs/gpt gpt-hf --to huggingface
"""
PATH = "a checkpoint, a folder of them, or a run's folder"


def register(subparsers: Any) -> None:
    """Add the verb and its own verbs."""
    about = "look into checkpoints"
    description = "Look into checkpoints, prove them whole, make changed copies, convert them."
    parser = subparsers.add_parser("checkpoint", help=about, description=description, epilog=EXAMPLES)
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    one = verbs.add_parser("inspect", help="what is in a checkpoint, and what it fits", epilog=EXAMPLES)
    one.add_argument("path", metavar="PATH", help=f"{PATH}; or weights of Megatron or Hugging Face")
    one.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the one that `latest` names)")
    one.add_argument(
        "--with", dest="other", metavar="OTHER", help="compare with another checkpoint, or with a config file (YAML)"
    )
    one.add_argument("--json", action="store_true", help="everything as one JSON object")
    one.set_defaults(handler=inspect)

    one = verbs.add_parser("verify", help="read every file and compare its checksum", epilog=EXAMPLES)
    one.add_argument("path", metavar="PATH", help=f"{PATH}; every checkpoint of a folder is read")
    one.add_argument("--json", action="store_true", help="{path: [problems]} as JSON")
    one.set_defaults(handler=verify)

    one = verbs.add_parser("edit", help="write a changed copy into a new folder", epilog=EXAMPLES)
    one.add_argument("path", metavar="PATH", help=PATH)
    one.add_argument("target", metavar="FOLDER", help="new folder of checkpoints for the copy")
    one.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration to copy (default: the one that `latest` names)"
    )
    one.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PART",
        help="leave out a part (optimizer) or names by pattern ('*/head.*')",
    )
    one.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="parameter, or the beginning of its name up to a dot",
    )
    one.add_argument("--iteration", type=int, metavar="N", help="iteration of the copy")
    one.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows of embedding and head; new rows are the mean of the old ones"
    )
    one.add_argument(
        "--max-position-embeddings", type=int, metavar="N", help="rows of the position embedding; new rows as above"
    )
    one.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote into FOLDER")
    one.set_defaults(handler=edit)
    checkpoint_convert.register(verbs)


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds; 1 where it is compared with something that does not fit."""
    if not folder.is_ours(args.path) and folder.strange(args.path) and not args.other:
        facts = _of_another_program(args.path, args.ckpt_step)
        print(json.dumps(facts, indent=1) if args.json else "\n".join(_page(facts)))
        return 0
    path = folder.find(args.path, args.ckpt_step)
    facts = describe(path) | {"config": read_config(path), "train_state": read_train_state(path)}
    if args.other:
        facts["differences"] = _compare(path, pathlib.Path(args.other))
    print(json.dumps(facts, indent=1) if args.json else "\n".join(_page(facts)))
    return 1 if facts.get("differences") else 0


def _of_another_program(path: str, iteration: int | None) -> dict[str, Any]:
    """The facts of weights in another format, as they are read here: the model's tensors by our names, whole, and a config."""
    from megalith.checkpoint import formats  # here, because these import torch
    from megalith.checkpoint.formats import sources
    from megalith.checkpoint.formats.megatron.source import layout
    from megalith.config.flags.loading import to_yaml

    source = sources.local(path)
    format = formats.recognise(source)
    weights = formats.read(source, format, formats.Options(iteration=iteration, replicas="first"))
    tensors: dict[str, dict[str, Any]] = {
        name: {"shape": list(each.shape), "dtype": str(each.dtype).removeprefix("torch.")}
        for name, each in weights.tensors.items()
    }
    parameters: dict[str, int] = {}
    for name, each in tensors.items():
        parameters[part_of(name)] = parameters.get(part_of(name), 0) + math.prod(each["shape"])
    return {
        "path": str(path), "iteration": weights.iteration, "format": format, "layout": layout(source) if format == "megatron" else "",
        "parameters": parameters, "tensors": tensors, "train_state": dict(weights.train_state),
        "config": to_yaml(weights.config, changed_only=True), "notes": list(weights.notes),
    }  # fmt: skip


def verify(args: argparse.Namespace) -> int:
    """Read every file of one checkpoint or of all in a folder; 1 where something is damaged."""
    place = pathlib.Path(args.path)
    paths = [place] if (place / manifest.NAME).exists() else folder.paths(place)
    if not paths:
        none = f"{place}: no checkpoint found; it would be a folder such as {folder.folder_name(100)} in it. Check the path."
        raise CheckpointError(folder.strange(place) or folder.runs_in(place) or none)
    found = {str(path): manifest.verify(path) for path in paths}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        for path, problems in found.items():
            if problems:
                print("\n".join(problems))
            else:
                facts = describe(path)
                print(f"{path}: whole ({len(facts['files'])} files, {units.size(facts['bytes'])})")
    return 1 if any(found.values()) else 0


def edit(args: argparse.Namespace) -> int:
    """Write the changed copy and say where it is."""
    from megalith.checkpoint.store.editing import RNG
    from megalith.checkpoint.store.editing import edit as write_edited

    pairs = [text.partition("=") for text in args.rename]
    wrong = [old for old, equals, new in pairs if not (old and equals and new)]
    if wrong:
        raise ConfigError(f"--rename: found {wrong[0]!r}; it takes OLD=NEW, such as head=output")
    if RNG in args.drop:
        print(
            f"--drop {RNG} changes nothing: no random state is kept, everything random is a function of seed and step"
        )
    path = folder.find(args.path, args.ckpt_step)
    copy = write_edited(
        path, args.target, rename={old: new for old, _, new in pairs}, drop=args.drop, iteration=args.iteration,
        vocab_size=args.vocab_size, max_position_embeddings=args.max_position_embeddings, overwrite=args.overwrite, notice=print,
    )  # fmt: skip
    print(copy)
    return 0


def _compare(path: pathlib.Path, other: pathlib.Path) -> list[str]:
    """What keeps a run of `other` (a checkpoint, or a config file) from using `path`, and the flags that would cure it."""
    mine = fit.model_section(read_config(path))
    if other.is_file():
        theirs = fit.model_section(other.read_text(encoding="utf-8"), typed=not (other.parent / manifest.NAME).exists())
        if not theirs:
            raise ConfigError(f"--with: {other} cannot be read as a config; `megalith config` writes one")
        lines = []
    else:
        second = folder.find(other)
        theirs = fit.model_section(read_config(second))
        shapes, others = (
            {name: facts["shape"] for name, facts in manifest.read(each)["tensors"].items()} for each in (path, second)
        )
        lines = fit.differences(others, shapes, mine)
    settings = [
        f"{field}: {one} here, {two} there -> {fit.cure(field, mine)}"
        for field, one, two in fit.config_differences(mine, theirs)
    ]
    return settings + lines


def _page(facts: dict[str, Any]) -> list[str]:
    """The facts as lines of text."""
    if "format" in facts:
        kind = [f"format      {facts['format']}" + f", {facts['layout']}" * bool(facts["layout"])]
        kind += [f"note        {note}" for note in facts["notes"]]
    else:
        by = facts["written_by"]
        kind = [
            f"written by  megalith {by['megalith']}, torch {by['torch']}, ranks: {by['ranks']}; schema {facts['schema']}",
            f"size        {units.size(facts['bytes'])} in {len(facts['files'])} files",
        ]
    lines = [
        f"checkpoint  {facts['path']}",
        f"iteration   {facts['iteration']}",
        *kind,
        "parameters",
        *(f"  {part:<28} {number:>16,}  ({units.count(number)})" for part, number in facts["parameters"].items()),
        f"tensors     {len(facts['tensors'])}",
        *_tree(facts["tensors"]),
        "train state",
        *(f"  {line}" for line in json.dumps(facts["train_state"], indent=1).splitlines()[1:-1]),
        "config",
        *(f"  {line}" for line in facts["config"].splitlines()),
    ]
    if "differences" in facts:
        lines += [
            "differences" if facts["differences"] else "differences: none",
            *(f"  {line}" for line in facts["differences"]),
        ]
    return lines


def _tree(tensors: dict[str, dict]) -> list[str]:
    """Names by part; layers that are alike share a line."""
    lines: dict[tuple[str, str, str], list[int]] = {}
    for name, facts in tensors.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        pattern = name.replace(layer[0], "layers.*.", 1) if layer else name
        lines.setdefault((part_of(name), pattern, f"{facts['shape']} {facts['dtype']}"), []).append(
            int(layer[1]) if layer else -1
        )
    text, shown = [], None
    for (part, pattern, kind), numbers in lines.items():
        text += [f"  {part}"] if part != shown else []
        shown = part
        label = pattern.removeprefix(f"{part}/").replace(".*.", f".{_span(numbers)}.")
        text.append(f"    {label:<44} {kind}")
    return text


def _span(numbers: list[int]) -> str:
    """[0, 1, 2] -> 0-2; [0, 2] -> 0,2; [1] -> 1."""
    whole = len(numbers) > 1 and sorted(numbers) == list(range(min(numbers), max(numbers) + 1))
    return f"{min(numbers)}-{max(numbers)}" if whole else ",".join(map(str, sorted(numbers)))
