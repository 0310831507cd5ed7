"""`megalith data`: corpora made, turned into indexed datasets, and the care of those."""

from __future__ import annotations

from megalith.cli import data_care, data_corpus, data_preprocess


def register(subparsers) -> None:
    """Add the verb and its own verbs."""
    parser = subparsers.add_parser(
        "data",
        help="raw text to indexed datasets, and what is done with those",
        description="Corpora to indexed datasets (Megatron's .bin/.idx), and the care of those.",
        epilog="example: megalith data preprocess --help",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    preprocess = verbs.add_parser("preprocess", help="raw files to .bin/.idx")
    data_preprocess.add_arguments(preprocess)
    preprocess.set_defaults(handler=data_preprocess.run)
    data_corpus.register(verbs)
    data_care.register(verbs)
