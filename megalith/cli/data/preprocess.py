"""The flags of `megalith data preprocess`, and what they become."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from megalith.common.encodings import conversion_advice

EXAMPLE = """example:
  megalith data preprocess --input corpus.jsonl --output-prefix my-gpt2 --tokenizer-type GPT2BPETokenizer \\
      --vocab-file vocab.json --merge-file merges.txt --append-eod --workers 8
  writes my-gpt2_text_document.bin and my-gpt2_text_document.idx"""

# Flags of Megatron's tool that have nothing to do here: (spelling, values, why).
NOT_NEEDED = (
    ("--dataset-impl", 1, "every dataset is written as mmap, which all readers open"),
    ("--chunk-size", 1, "work is divided into parts of equal size"),
    ("--log-interval", 1, "progress is shown every few seconds"),
    ("--keep-sequential-samples", 0, "documents always keep the order of the input"),
    ("--find-optimal-num-workers", 0, "workers do not wait for each other; one a core is best, and the default"),
    ("--workers-to-check", "+", "workers do not wait for each other; one a core is best, and the default"),
    ("--max-documents", 1, "there is no search for the best number of workers that it could bound"),
    ("--seq-length", 1, "documents are stored whole; samples are cut when training"),
    ("--trust-remote-code", 0, "tokenizers are read from tokenizer.json, no code is run"),
    ("--make-vocab-size-divisible-by", 1, "token ids do not depend on padding"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.epilog = EXAMPLE
    add_tokenizer_arguments(parser)
    inputs = parser.add_argument_group("input and output")
    inputs.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, globs, directories, - (standard input), FIFOs: JSON lines, parquet, text; "
        "also in gzip, zstd, bzip2, xz",
    )
    inputs.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="datasets are PREFIX_{key}_{document|sentence}.bin and .idx",
    )
    inputs.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (columns) to encode, a dataset each"
    )
    inputs.add_argument("--json-key", nargs="+", help=argparse.SUPPRESS)
    inputs.add_argument("--overwrite", action="store_true", help="replace datasets that exist")
    text = parser.add_argument_group("documents")
    text.add_argument("--split-sentences", action="store_true", help="a sequence for each sentence (BERT, T5, ICT)")
    text.add_argument(
        "--lang", default="english", help="language of the sentences, by name or ISO code (default: english)"
    )
    text.add_argument(
        "--keep-newlines", action="store_true", help="white space between sentences stays with the sentence before it"
    )
    text.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    text.add_argument("--prepend-bos", action="store_true", help="begin every document with the BOS token")
    text.add_argument(
        "--on-error",
        choices=("skip", "fail"),
        default="skip",
        help="what to do with unusable documents (default: skip and list them)",
    )
    text.add_argument(
        "--on-empty",
        choices=("skip", "keep"),
        default="skip",
        help="what to do with documents that have no text in one of the keys: leave them out in all, or keep them "
        "(default: skip)",
    )
    add_limit(text)
    work = parser.add_argument_group("work")
    work.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, and exit")
    work.add_argument("--workers", type=int, default=0, help="processes, or Ray actors (default: one a core)")
    work.add_argument(
        "--partitions", type=int, default=1, help="cut the input into this many parts at least; the result is the same"
    )
    work.add_argument(
        "--engine",
        default="processes",
        help="processes (this machine), ray (a cluster, by RAY_ADDRESS), or module:name",
    )
    work.add_argument(
        "--plain-encoder",
        action="store_true",
        help="do not use a faster encoder, even one that agrees with `tokenizers`",
    )
    for spelling, values, _ in NOT_NEEDED:
        kind = {"action": "store_const", "const": True} if values == 0 else {"nargs": values, "type": int}
        if spelling == "--dataset-impl":
            kind |= {"type": str, "choices": ("lazy", "cached", "mmap")}
        parser.add_argument(spelling, help=argparse.SUPPRESS, **kind)


def add_tokenizer_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Declare the flags that a tokenizer is made from."""
    group = parser.add_argument_group("tokenizer")
    names = (
        "GPT2BPETokenizer, BertWordPieceLowerCase, HuggingFaceTokenizer, SentencePieceTokenizer, Llama2Tokenizer, ... "
        "or module:name"
    )
    group.add_argument("--tokenizer-type", required=required, metavar="NAME", help=names)
    group.add_argument("--vocab-file", metavar="FILE", help="vocab.json of GPT-2, vocab.txt of BERT")
    group.add_argument("--merge-file", metavar="FILE", help="merges.txt of GPT-2")
    group.add_argument(
        "--tokenizer-model",
        "--tokenizer-name-or-path",
        metavar="PATH",
        help="tokenizer.json, its folder, or a sentencepiece .model",
    )
    group.add_argument("--vocab-size", type=int, help="for NullTokenizer and TikTokenizer")
    group.add_argument(
        "--vocab-extra-ids", type=int, default=0, help="sentinel tokens <extra_id_i> appended to the vocabulary"
    )
    group.add_argument("--tiktoken-pattern", default="v2", help="v1 or v2")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tiktoken-special-tokens", nargs="+")


def add_limit(parser) -> None:
    """Declare --max-unusable; `parse_limit` reads what is given."""
    from megalith.data.corpus.unusable import LIMIT_FORMS, MAX_UNUSABLE

    rule = f"{LIMIT_FORMS} (default: {MAX_UNUSABLE})".replace("%", "%%")
    parser.add_argument(
        "--max-unusable",
        default=str(MAX_UNUSABLE),
        metavar="N",
        help=f"documents (malformed, without the key, ...) that may be left out before it is an error: {rule}",
    )


def tokenizer_options(args: argparse.Namespace):
    """The TokenizerOptions that the flags describe."""
    from megalith.data.tokenizers.tokenizer import TokenizerOptions

    names = [field.name for field in dataclasses.fields(TokenizerOptions)]
    given = {name: getattr(args, name) for name in names}
    return TokenizerOptions(**given | {"tiktoken_special_tokens": tuple(args.tiktoken_special_tokens or ()) or None})


def run(args: argparse.Namespace) -> int:
    """Preprocess; a summary on stdout, progress and notices on stderr."""
    from megalith.common import units
    from megalith.data.corpus.preprocess import PreprocessOptions, plan, preprocess
    from megalith.data.corpus.preprocess_progress import Progress
    from megalith.data.corpus.unusable import parse_limit

    def notice(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    for spelling, _, why in NOT_NEEDED:
        if getattr(args, spelling[2:].replace("-", "_")) is not None:
            notice(f"{spelling} is not needed: {why}")
    if args.json_key:
        notice("--json-key is now --json-keys")
    args.max_unusable = parse_limit(args.max_unusable)
    # Every field of the options is a flag of the same name, except these.
    other = {
        "tokenizer": tokenizer_options(args),
        "fast": not args.plain_encoder,
        "json_keys": args.json_key or args.json_keys,
    }
    same = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(PreprocessOptions)
        if field.name not in other
    }
    options = PreprocessOptions(**same, **other)
    if args.dry_run:
        print(plan(options))
        return 0
    progress = Progress()
    try:
        result = preprocess(options, notice=notice, progress=progress)
    finally:
        progress.close()
    rate = f"{result.bytes / max(result.elapsed, 1e-9) / 1e6:.1f} MB/s"
    print(
        f"{result.documents} documents, {result.sequences} sequences, {result.tokens} tokens "
        f"from {units.size(result.bytes)} in {units.duration(result.elapsed)} ({rate})"
    )
    for key, prefix in result.prefixes.items():
        print(f"{key}: {prefix}.bin, {prefix}.idx", flush=True)
    for line in result.problems[:10]:
        notice(f"skipped {line}")
    if result.num_problems:
        notice(skipped(result, args.max_unusable))
    return 0


def skipped(result, limit: float) -> str:
    """The line about documents that were left out: how many of how many, and the limit."""
    unusable, total = result.num_problems - result.num_empty, result.documents + result.num_problems
    kinds = [f"{unusable} unusable documents ({unusable / total:.2%}; --max-unusable {limit})"] * (unusable > 0)
    kinds += [f"{result.num_empty} without text (--on-empty keep keeps them)"] * (result.num_empty > 0)
    lists = f"{result.report} lists {len(result.problems)} of them"
    return f"skipped {' and '.join(kinds)} of {total} documents; {lists}. {conversion_advice(result.problems)}".rstrip(
        ". "
    )
