"""`megalith data`: corpora made, turned into indexed datasets, and the care of those."""

from __future__ import annotations

from megalith.cli.data import care, corpus, preprocess


def register(subparsers) -> None:
    """Add the verb and its own verbs."""
    parser = subparsers.add_parser(
        "data",
        help="raw text to indexed datasets, and what is done with those",
        description="Corpora to indexed datasets (Megatron's .bin/.idx), and the care of those.",
        epilog="example: megalith data preprocess --help",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    parser = verbs.add_parser("preprocess", help="raw files to .bin/.idx")
    preprocess.add_arguments(parser)
    parser.set_defaults(handler=preprocess.run)
    corpus.register(verbs)
    care.register(verbs)
