"""`megalith checkpoint`: inspect checkpoints, verify their files, write edited copies, convert them."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megalith.checkpoint.store import folder
from megalith.cli import checkpoint_convert
from megalith.workflows import checkpoint_report

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
    about = "inspect, verify, edit and convert checkpoints"
    description = "Inspect checkpoints, verify their files, write edited copies, convert them."
    group = subparsers.add_parser("checkpoint", help=about, description=description, epilog=EXAMPLES)
    verbs = group.add_subparsers(title="verbs", metavar="VERB", required=True)

    parser = verbs.add_parser("inspect", help="what is in a checkpoint, and what it fits", epilog=EXAMPLES)
    parser.add_argument("path", metavar="PATH", help=f"{PATH}; or weights of Megatron or Hugging Face")
    parser.add_argument("--ckpt-step", type=int, metavar="N", help="iteration (default: the one that `latest` names)")
    parser.add_argument(
        "--with", dest="other", metavar="OTHER", help="compare with another checkpoint, or with a config file (YAML)"
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.set_defaults(handler=inspect)

    parser = verbs.add_parser("verify", help="read every file and compare its checksum", epilog=EXAMPLES)
    parser.add_argument("path", metavar="PATH", help=f"{PATH}; every checkpoint of a folder is read")
    parser.add_argument("--json", action="store_true", help="{path: [problems]} as JSON")
    parser.set_defaults(handler=verify)

    parser = verbs.add_parser("edit", help="write a changed copy into a new folder", epilog=EXAMPLES)
    parser.add_argument("path", metavar="PATH", help=PATH)
    parser.add_argument("target", metavar="FOLDER", help="new folder of checkpoints for the copy")
    parser.add_argument(
        "--ckpt-step", type=int, metavar="N", help="iteration to copy (default: the one that `latest` names)"
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="PART",
        help="leave out a part (optimizer) or names by pattern ('*/head.*')",
    )
    parser.add_argument(
        "--rename",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="parameter, or the beginning of its name up to a dot",
    )
    parser.add_argument("--iteration", type=int, metavar="N", help="iteration of the copy")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="rows of embedding and head; new rows are the mean of the old ones"
    )
    parser.add_argument(
        "--max-position-embeddings", type=int, metavar="N", help="rows of the position embedding; new rows as above"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote into FOLDER")
    parser.set_defaults(handler=edit)
    checkpoint_convert.register(verbs)


def inspect(args: argparse.Namespace) -> int:
    """Print what a checkpoint holds; 1 where it is compared with something that does not fit."""
    facts = checkpoint_report.inspect(args.path, args.ckpt_step, args.other)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(checkpoint_report.page(facts)))
    return 1 if facts.get("differences") else 0


def verify(args: argparse.Namespace) -> int:
    """Read every file of one checkpoint or of all in a folder; 1 where something is damaged."""
    found = checkpoint_report.verify(args.path)
    for line in [json.dumps(found, indent=1)] if args.json else checkpoint_report.verification_lines(found):
        print(line)
    return 1 if any(found.values()) else 0


def edit(args: argparse.Namespace) -> int:
    """Write the edited copy and print where it is."""
    from megalith.checkpoint.store.editing import RNG
    from megalith.checkpoint.store.editing import edit as write_edited

    rename = checkpoint_report.parse_renames(args.rename)
    if RNG in args.drop:
        print(
            f"--drop {RNG} changes nothing: no random state is kept, everything random is a function of seed and step"
        )
    copy = write_edited(
        folder.find(args.path, args.ckpt_step),
        args.target,
        rename=rename,
        drop=args.drop,
        iteration=args.iteration,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.max_position_embeddings,
        overwrite=args.overwrite,
        notice=print,
    )
    print(copy)
    return 0
