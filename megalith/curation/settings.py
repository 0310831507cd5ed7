"""The settings of each step of corpus work, which are its flags; without the work, so that `--help` imports little."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megalith.config.options import option, section

if TYPE_CHECKING:
    from megalith.data.tokenizers.tokenizer import TokenizerOptions

DEFAULT_RULES = ("ftfy", "unicode", "newlines", "min_characters")


@section
class WikiSettings:
    """Settings of `megalith data wiki`."""

    namespaces: tuple[str, ...] = option(("0",), "numbers of the namespaces whose pages are read; 0: articles")
    headings: bool = option(True, "keep headings, a line each")
    lists: bool = option(True, "keep lists, a line that begins with a dash for each item")
    tables: bool = option(False, "keep the cells of tables, a line for each row")
    formulas: bool = option(False, "keep formulas, as LaTeX between dollar signs")


@section
class WarcSettings:
    """Settings of `megalith data warc`."""

    html: bool = option(False, "keep the HTML of pages; the rule html of `data clean` extracts its text")


@section
class UrlsSettings:
    """Settings of `megalith data urls`."""

    domains: str = option("", "file of domains that are left out, in place of megalith's list")
    extensions: str = option("", "file of ends of paths that are left out, in place of megalith's list")
    min_length: int = option(9, "fewest characters of a URL", minimum=1)


@section
class CleanSettings:
    """Settings of `megalith data clean`."""

    rules: tuple[str, ...] = option(
        (), f"rules and groups of rules, in the order in which they are applied (default: {' '.join(DEFAULT_RULES)})"
    )
    language: str = option("", "language that documents must be in, by ISO 639 code: en")
    min_language_score: float = option(0.5, "least probability of that language")
    min_characters: int = option(512, "fewest characters of a document, for the rule min_characters", minimum=0)
    max_characters: int = option(1_000_000, "most characters, for the rule max_characters", minimum=1)
    min_tokens: int = option(128, "fewest tokens, for the rule min_tokens; needs --tokenizer-type", minimum=0)
    max_tokens: int = option(100_000, "most tokens, for the rule max_tokens; needs --tokenizer-type", minimum=1)
    bad_words: str = option("", "file of words, one a line, that no document may have (rule bad_words)")
    tokenizer: TokenizerOptions | None = None


@section
class DedupSettings:
    """Settings of `megalith data dedup`."""

    by: str = option(
        "near",
        "near: similar texts, and equal ones; exact: equal words; paragraph; url",
        choices=("near", "exact", "paragraph", "url"),
    )
    threshold: float = option(0.7, "similarity of near-duplicates, 0 to 1", minimum=0.0)
    jaccard: str = option(
        "union",
        "common shingles over those of the union, the smaller or the larger text",
        choices=("union", "min", "max"),
    )
    ngram_size: int = option(5, "words (or characters) of a shingle", minimum=1)
    ngram_unit: str = option("word", "what a shingle is made of", choices=("word", "character"))
    bands: int = option(32, "bands of a signature: more find more candidates", minimum=1)
    rows: int = option(4, "values of a band: more find fewer candidates", minimum=1)
    seed: int = option(1234, "of the hash functions", minimum=0)
    keep: str = option("first", "which document of a group stays", choices=("first", "longest", "source"))
    best_sources: tuple[str, ...] = option((), "for --keep source: sources, the best first; others come behind")
    source_key: str = option("", "key that says which source a document is of (default: its file)")
    id_key: str = option("id", "key of what evidence names a document by, beside its file and line")
    source_budget: float = option(0.95, "share of its documents (or paragraphs) that a source may lose", minimum=0.0)
    budget_documents: int = option(100, "documents (or paragraphs) that a source needs to have a budget", minimum=1)
    over_budget: str = option("stop", "what happens where a source loses more", choices=("stop", "warn"))
    direct: bool = option(False, "remove only what is itself similar to the document that stays")
    url_key: str = option("url", "key of the URL, for --by url")
    min_paragraph_words: int = option(3, "shorter paragraphs are no repetition", minimum=1)
    index: str = option("", "folder of signatures of earlier output: compare with them, and add these")


@section
class DecontaminateSettings:
    """Settings of `megalith data decontaminate`."""

    tasks: tuple[str, ...] = option((), "NAME=PATH of task files, or NAME=PATH:KEY for any JSON lines")
    max_ngram: int = option(13, "words of an n-gram", minimum=1)
    min_ngram: int = option(8, "fewest words of a task text that is searched for as a whole", minimum=1)
    max_frequency: int = option(10, "an n-gram that occurs more often is no leak; 0: every one is", minimum=0)
    margin: int = option(
        200, "characters removed on each side of an n-gram, then to the end of the sentence", minimum=0
    )
    min_piece: int = option(200, "fewest characters of a piece that stays", minimum=0)
    max_pieces: int = option(10, "a document that falls into more pieces is dropped", minimum=1)


@section
class IdsSettings:
    """Settings of `megalith data ids`."""

    id_key: str = option("adlr_id", "key under which the id is written")
    id_prefix: str = option("", "what ids begin with: PREFIX-0000000001")
    first: int = option(1, "the first number", minimum=0)
    replace: bool = option(False, "replace ids that documents have under that key")


@section
class ShuffleSettings:
    """Settings of `megalith data shuffle`."""

    seed: int = option(1234, "of the order", minimum=0)


@section
class SampleSettings:
    """Settings of `megalith data sample`."""

    rate: float = option(0.0, "share of the documents of each stratum, rounded up", minimum=0.0)
    documents: int = option(0, "documents of each stratum, or all that it has", minimum=0)
    by: str = option("", "key whose values are the strata (default: all documents are one)")
    seed: int = option(1234, "of the choice", minimum=0)


@section
class StatsSettings:
    """Settings of `megalith data stats`."""

    languages: bool = option(False, "identify the language of each document")
    source_key: str = option("", "key whose values are counted as sources")
    tokenizer: TokenizerOptions | None = None
