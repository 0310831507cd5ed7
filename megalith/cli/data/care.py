"""`megalith data merge|split|convert|inspect|weights|bpe`: work on datasets, and a vocabulary made from a corpus."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable

from megalith.cli.data.preprocess import add_limit, add_tokenizer_arguments, tokenizer_options
from megalith.workflows import datasets


def register(verbs) -> None:
    """Add the verbs."""
    _add_merge(verbs)
    _add_split(verbs)
    _add_convert(verbs)
    _add_inspect(verbs)
    _add_weights(verbs)
    _add_bpe(verbs)


def _add_merge(verbs) -> None:
    parser = verbs.add_parser(
        "merge",
        help="many datasets into one",
        epilog="example: megalith data merge --input data/ --output-prefix all_text_document",
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="prefixes, or directories of .bin/.idx pairs (sorted by name)",
    )
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    _add_overwrite(parser)
    parser.set_defaults(handler=merge)


def merge(args: argparse.Namespace) -> int:
    """Merge; prints what was written."""
    from megalith.common.outputs import writing
    from megalith.data.indexed.inspecting import describe
    from megalith.data.indexed.merge import merge_datasets

    prefixes = datasets.expand_prefixes(args.input, args.output_prefix)
    files = _files([datasets.check_output_prefix(args.output_prefix)])
    options = {"inputs": _files(prefixes), "overwrite": args.overwrite, "flag": "--output-prefix", "notice": _notice}
    with writing(args.output_prefix, files, **options) as still_held:
        merge_datasets(prefixes, args.output_prefix, still_held)
    facts = describe(args.output_prefix)
    counts = f"{facts['num_documents']} documents, {facts['total_num_tokens']} tokens"
    print(f"{args.output_prefix}: {len(prefixes)} datasets, {counts}")
    return 0


def _files(prefixes: Iterable[str]) -> list[str]:
    from megalith.data.indexed.format import dataset_files

    return dataset_files(prefixes)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what exists of that name")


def _notice(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _add_split(verbs) -> None:
    parser = verbs.add_parser(
        "split",
        help="datasets into files of N tokens, documents or bytes",
        epilog="example: megalith data split --input all_text_document --output-prefix piece --tokens 100000000",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="prefixes or directories; several are taken as one"
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="files are PREFIX-0000, PREFIX-0001, ..."
    )
    for unit in ("tokens", "documents", "bytes"):
        parser.add_argument(f"--{unit}", type=int, default=0, metavar="N", help=f"{unit} a file holds at most")
    _add_overwrite(parser)
    parser.set_defaults(handler=split)


def split(args: argparse.Namespace) -> int:
    """Split; prints the prefixes."""
    from megalith.common.outputs import check, writing
    from megalith.data.indexed.merge import split_datasets, split_files

    prefixes = datasets.expand_prefixes(args.input, args.output_prefix)
    limits = {"tokens": args.tokens, "documents": args.documents, "size": args.bytes}
    with writing(datasets.check_output_prefix(args.output_prefix), [], notice=_notice):
        check(
            split_files(args.output_prefix), inputs=_files(prefixes), overwrite=args.overwrite, flag="--output-prefix"
        )
        written = split_datasets(prefixes, args.output_prefix, **limits, overwrite=args.overwrite)
    print("\n".join(written))
    return 0


def _add_convert(verbs) -> None:
    parser = verbs.add_parser(
        "convert",
        help="a lazy or cached dataset into mmap",
        epilog="example: megalith data convert --input old --output-prefix new",
    )
    parser.add_argument("--input", required=True, metavar="PREFIX")
    parser.add_argument("--output-prefix", required=True, metavar="PREFIX")
    parser.add_argument("--vocab-size", type=int, help="choose uint16 or int32 by it (default: the dtype of the input)")
    _add_overwrite(parser)
    parser.set_defaults(handler=convert)


def convert(args: argparse.Namespace) -> int:
    """Convert; prints the prefix."""
    from megalith.common.outputs import writing
    from megalith.data.indexed import best_dtype, resolve_prefix
    from megalith.data.indexed.tntidx import convert as convert_dataset

    source, dtype = resolve_prefix(args.input), best_dtype(args.vocab_size) if args.vocab_size else None
    options = {"inputs": _files([source]), "overwrite": args.overwrite, "flag": "--output-prefix", "notice": _notice}
    with writing(
        args.output_prefix, _files([datasets.check_output_prefix(args.output_prefix)]), **options
    ) as still_held:
        convert_dataset(source, args.output_prefix, dtype, still_held)
    print(args.output_prefix)
    return 0


def _add_inspect(verbs) -> None:
    parser = verbs.add_parser(
        "inspect",
        help="what datasets hold, whether they are sound, documents as text",
        epilog="example: megalith data inspect corpus_text_document --verify --show 0 --tokenizer-model tokenizer.json",
    )
    parser.add_argument("path", nargs="+", help="prefixes, or directories")
    parser.add_argument("--json", action="store_true", help="print a JSON list of the metadata of all of them")
    parser.add_argument(
        "--verify", action="store_true", help="check every entry of the index and every token; print checksums"
    )
    parser.add_argument(
        "--show", type=int, nargs="+", default=[], metavar="N", help="print these documents (-1: the last)"
    )
    add_tokenizer_arguments(parser, required=False)
    parser.set_defaults(handler=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Print what datasets hold. Damaged datasets are a DataError, after the others were printed."""
    import json

    from megalith.common.errors import DataError
    from megalith.data.indexed.inspecting import document_text
    from megalith.data.tokenizers.tokenizer import build_tokenizer

    if args.tokenizer_type is None and args.tokenizer_model:
        args.tokenizer_type = "HuggingFaceTokenizer"
    tokenizer = build_tokenizer(**vars(tokenizer_options(args))) if args.tokenizer_type else None
    vocab_size = tokenizer.vocab_size if tokenizer else args.vocab_size
    found, damaged = [], list[str]()
    for prefix, facts in datasets.describe_datasets(args.path, damaged, args.verify, vocab_size):
        found.append(facts)
        if args.json:
            continue
        print("\n".join(datasets.page(facts, args.verify)))
        for number in args.show:
            print(f"--- document {number}\n{document_text(prefix, number, tokenizer)}")
    if args.json:
        print(json.dumps(found, indent=1))
    if damaged:
        raise DataError("\n".join(damaged))
    return 0


def _add_weights(verbs) -> None:
    parser = verbs.add_parser(
        "weights",
        help="write the `weight path corpus` list of a directory",
        epilog="example: megalith data weights --input data/ --epochs epochs.yaml --output list.txt",
    )
    parser.add_argument(
        "--input",
        required=True,
        metavar="DIR",
        help="directory of datasets; corpus-0000_text_document belongs to `corpus`",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="the list, for --data-file-list; its paths are relative to it"
    )
    parser.add_argument(
        "--epochs",
        metavar="YAML",
        help="`corpus: epochs`, a line each, and `default: epochs` (default: proportional to size)",
    )
    parser.add_argument(
        "--by-directory", action="store_true", help="a corpus is a subdirectory, not the beginning of a name"
    )
    _add_overwrite(parser)
    parser.set_defaults(handler=weights)


def weights(args: argparse.Namespace) -> int:
    """Write the list; prints the table of corpora."""
    from megalith.common import units
    from megalith.common.outputs import writing
    from megalith.data.indexed.inspecting import prefixes_below
    from megalith.data.weights import write_weights

    epochs = datasets.read_epochs(args.epochs) if args.epochs else None
    inputs = [*_files(prefixes_below(args.input)), *([args.epochs] if args.epochs else [])]
    with writing(args.output, inputs=inputs, overwrite=args.overwrite, notice=_notice):
        entries = write_weights(args.input, args.output, epochs, args.by_directory)
    width = max(6, *(len(entry.corpus) for entry in entries))
    print(f"{'corpus':{width}} {'files':>6} {'tokens':>12} {'epochs':>7} {'share':>8}")
    for entry in entries:
        size = f"{entry.files:6} {units.count(entry.tokens):>12}"
        print(f"{entry.corpus:{width}} {size} {entry.epochs:7.3g} {entry.proportion:8.2%}")
    print(f"{args.output}: {sum(entry.files for entry in entries)} datasets")
    return 0


def _add_bpe(verbs) -> None:
    parser = verbs.add_parser(
        "bpe",
        help="train a byte-level BPE vocabulary",
        epilog="example: megalith data bpe --input corpus.jsonl --vocab-size 32000 --output tokenizer.json",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, globs, directories, as preprocess reads them"
    )
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (columns) whose texts are read"
    )
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens, the 256 bytes and special tokens among them"
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="a tokenizer.json, for --tokenizer-type HuggingFaceTokenizer"
    )
    parser.add_argument(
        "--special-tokens", nargs="+", default=["<|endoftext|>"], metavar="TOKEN", help="tokens of no text"
    )
    _add_overwrite(parser)
    add_limit(parser)
    parser.set_defaults(handler=bpe)


def bpe(args: argparse.Namespace) -> int:
    """Train; prints the size of the vocabulary."""
    from megalith.common.outputs import writing
    from megalith.data.corpus.bpe import train_bpe
    from megalith.data.corpus.inputs import find_inputs
    from megalith.data.corpus.readers import corpus_texts
    from megalith.data.corpus.unusable import parse_limit

    texts = corpus_texts(args.input, args.json_keys, _notice, parse_limit(args.max_unusable))
    with writing(args.output, inputs=find_inputs(args.input), overwrite=args.overwrite, notice=_notice):
        size = train_bpe(texts, args.vocab_size, args.output, special_tokens=tuple(args.special_tokens))
    print(f"{args.output}: {size} tokens")
    return 0
