"""`megalith data`: corpora to indexed datasets, and the care of those."""

from __future__ import annotations

import argparse

from megalith.cli import data_preprocess


def register(subparsers) -> None:
    """Add the verb and its own verbs."""
    parser = subparsers.add_parser(
        "data",
        help="corpora to indexed datasets: preprocess",
        description="Corpora to indexed datasets (Megatron's .bin/.idx), and the care of those.",
        epilog="example: megalith data preprocess --help",
    )
    verbs = parser.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    preprocess = verbs.add_parser("preprocess", help="raw files to .bin/.idx", allow_abbrev=False)
    data_preprocess.add_arguments(preprocess)
    preprocess.set_defaults(data_run=data_preprocess.run)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen verb."""
    return args.data_run(args)
