"""megalith demo: corpus to trained model to text, on what every machine has."""

from __future__ import annotations

import argparse


def register(subparsers) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="corpus to trained model to text, on what every machine has",
        description="Makes a corpus from Python's own sources, trains a tokenizer and a small GPT, stops and resumes "
        "it, draws the loss, generates text.",
        epilog="example: megalith demo --steps 100",
    )
    parser.add_argument("--folder", default="runs/demo", help="where everything goes (default: runs/demo)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default: 200)")
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of the corpus in MB (default: 8)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens of the vocabulary (default: 4096)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and exit")
    parser.set_defaults(handler=demo)


def demo(args: argparse.Namespace) -> int:
    """Run the demo; the exit status."""
    if args.dry_run:
        print(
            f"would train {args.steps} steps on {args.megabytes:g} MB with {args.vocab_size} tokens, in {args.folder}"
        )
        return 0
    from megalith.workflows.demo import run_demo

    return run_demo(args.folder, args.steps, args.megabytes, args.vocab_size)
