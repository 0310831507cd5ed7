"""megalith retro db|index|neighbors|build|verify: what Retro retrieves in training, made before it."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable
from typing import Any

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags import flags
from megalith.config.flags.loading import typed_config
from megalith.config.flags.text import fail, flag, value_text

EXAMPLE = """\
examples:
  megalith retro build --retro-workdir retro --load runs/bert --data-path my-gpt2_text_document \\
      --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --seq-length 1024 \\
      --global-batch-size 256 --train-samples 100000 --retro-index-str IVF256,Flat
  torchrun --nproc-per-node 8 -m megalith retro index --retro-workdir retro --load runs/bert ...
  megalith retro verify retro

The flags of Megatron's tools/retro work as typed: those that begin with --retro-gpt say the same as the flag without.
"""
STEPS = {
    "db": "cut the documents of the training data into chunks",
    "index": "embed the chunks by a BERT, and build an index of FAISS",
    "neighbors": "find the neighbours of the chunks of all samples",
}
TASKS = {  # --retro-tasks -> steps
    "build": ("db", "index", "neighbors"),
    "db-build": ("db",),
    "index-build": ("index",),
    "index-train": ("index",),
    "index-add": ("index",),
    "query-pretraining-neighbors": ("neighbors",),
    "pretraining-query-neighbors": ("neighbors",),
}
OF_GPT = {  # what follows --retro-gpt-: the field that it sets
    "data-path": "data_path", "split": "split", "seed": "seed", "seq-length": "seq_length",
    "eval-interval": "eval_interval", "eval-iters": "eval_iters", "global-batch-size": "global_batch_size",
    "train-samples": "train_samples", "tokenizer-type": "tokenizer_type", "vocab-file": "vocab_file",
    "merge-file": "merge_file", "tokenizer-model": "tokenizer_model",
}  # fmt: skip
OF_BERT = ("tokenizer_type", "vocab_file")  # what follows --retro-bert-: fields of the BERT's tokenizer
NUMBERS: dict[str, tuple[tuple[str, ...], str]] = {  # flag -> (its other names, what it says); whole numbers above 0
    "--retro-gpt-chunk-length": ((), "GPT tokens of a chunk (default: 64)"),
    "--retro-doc-block-size": ((), "documents of a file of the database (default: 100000)"),
    "--workers": ((), "db: processes (default: 1)"),
    "--retro-bert-batch-size": ((), "chunks that are embedded at one time (default: 128)"),
    "--retro-bert-max-chunk-length": ((), "tokens that the BERT reads of a chunk (default: 256)"),
    "--retro-index-ntrain": (
        ("--retro-nchunks-sampled", "--train-rows"), "vectors that the index is trained on (default: 100000)",
    ),
    "--retro-index-nfeats": ((), "must be the width of the BERT, if it is given"),
    "--shard-rows": ((), "vectors of a file of the index (default: 65536)"),
    "--retro-query-ef-search": (("--retro-ef-search",), "FAISS's efSearch, of HNSW (default: 256)"),
    "--retro-query-nprobe": (("--retro-nprobe",), "FAISS's nprobe, of IVF (default: 65536)"),
    "--retro-query-num-neighbors-query": (
        ("--retro-num-neighbors-query", "--retro-nnbrs-query", "--retro-nnbrs"),
        "neighbours that are found before those of the sample's own documents are left out (default: 200)",
    ),
    "--retro-query-num-neighbors-save": (
        ("--retro-num-neighbors-target", "--retro-nnbrs-target"), "neighbours that are kept (default: 20)",
    ),
    "--retro-block-size": (("--retro-chunk-block-size",), "chunks of samples in a file (default: 100000)"),
}  # fmt: skip
NOT_NEEDED: dict[str, dict[int, tuple[str, ...]]] = {  # reason -> how many values -> flags
    "chunks are added by FAISS's own threads, with the same result": {1: ("--retro-index-type", "--retro-index-ty")},
    "vectors are kept, and an index is one file": {
        0: ("--retro-index-no-delete-training-embeddings", "--retro-index-no-delete-added-codes"),
    },
    "the checkpoint says what it is": {1: ("--bert-embedder-type",)},
    "it is what this command does": {
        0: ("--output-bert-embeddings", "--retro-return-doc-ids", "--retro-precompute-bert-lengths"),
    },
    "each process reads its own samples": {0: ("--no-data-sharding",)},
    "training says how many of the neighbours it reads": {1: ("--retro-nnbrs-pretraining",)},
}
FRACTIONS = {
    "--retro-index-train-load-fraction": "--retro-index-ntrain says how many vectors the index is trained on; lower it",
    "--retro-index-add-load-fraction": "an index holds all chunks of its database; name less data in --data-path",
}


def _option(name: str, sets: str, help: str = "", **options: Any) -> flags.Flag:
    return flags.Flag(name, {sets: flags.VALUE}, help=help, **options)


def _flags() -> Iterable[flags.Flag]:
    yield _option("--retro-workdir", "retro_workdir", "the folder of it all: db/, index/, neighbors/")
    yield _option("--retro-project-dir", "retro_workdir", "as --retro-workdir")
    yield _option("--retro-tasks", "tasks", f"build: steps, of {', '.join(TASKS)}, with commas")
    yield _option("--retro-index-str", "index_string", "an index of FAISS: Flat, IVF256,Flat, HNSW32 (default: none)")
    yield _option("--index-string", "index_string", "as --retro-index-str")
    yield _option("--retro-bert-vocab-file", "bert_vocab_file", "the vocabulary of the BERT (default: in --load)")
    yield _option("--retro-bert-tokenizer-type", "bert_tokenizer_type", "of that file: BertWordPieceLowerCase, ...")
    for name, (others, help) in NUMBERS.items():
        for each in (name, *others):
            yield _option(each, _key(name), help if each == name else f"as {name}", number=True)
    for name, field in OF_GPT.items():
        nargs: Any = "+" if field == "data_path" else 1
        yield _option(f"--retro-gpt-{name}", f"gpt_{field}", f"as {flag(field)}", nargs=nargs)
    for reason, groups in NOT_NEEDED.items():
        for count, names in groups.items():
            for name in names:
                yield flags.Flag(name, {}, count, help=f"accepted: {reason}", notice=f"{name} is not needed: {reason}")
    for name, reason in FRACTIONS.items():
        notice = f"{name} {flags.VALUE} changes nothing here"
        yield flags.Flag(name, {}, refused=reason, harmless=("1", "1.", "1.0"), notice=notice, help="must be 1")


def _key(name: str) -> str:
    return name.removeprefix("--").replace("-", "_")


RETRO_FLAGS = tuple(_flags())


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb and its own verbs."""
    parser = subparsers.add_parser(
        "retro",
        help="the chunks that Retro retrieves, and the neighbours of its samples",
        description="What `megalith pretrain retro` reads beside its data, in three steps.",
        epilog=EXAMPLE,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    usage = "megalith retro {} --retro-workdir FOLDER ..."
    for name, help in {**STEPS, "build": "all of these steps"}.items():
        step = verbs.add_parser(name, help=help, epilog=EXAMPLE, usage=usage.format(name))
        flags.add_help(step, RETRO_FLAGS)
        steps = (name,) if name in STEPS else ()
        reads = functools.partial(flags.read, command_flags=RETRO_FLAGS)
        step.set_defaults(handler=functools.partial(run_steps, steps=steps), reads=reads)
    example = "example: megalith retro verify retro"
    verify = verbs.add_parser("verify", help="read every byte and compare checksums", epilog=example)
    verify.add_argument("workdir", metavar="FOLDER", help="what --retro-workdir names")
    verify.set_defaults(handler=run_verify)


def run_steps(args: argparse.Namespace, steps: tuple[str, ...]) -> int:
    """Run steps, or those that --retro-tasks says."""
    reading = args.reading
    numbers = {name: flags.whole_number(reading, _key(name)) for name in NUMBERS}
    found = reading.values
    tasks = found.get("tasks", "build").split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        fail([problem("--retro-tasks", unknown[0], f"must be of {', '.join(TASKS)}", "Write --retro-tasks build")])
    if steps and "tasks" in found:
        reading.notices.append(
            f"--retro-tasks {found['tasks']} is not looked at: megalith retro {steps[0]} is one step"
        )
    steps = steps or tuple(dict.fromkeys(step for task in tasks for step in TASKS[task]))
    for field in OF_GPT.values():
        if (value := found.pop(f"gpt_{field}", None)) is not None:
            if found.get(field, value) != value:
                used = f"{flag(f'retro_gpt_{field}')} {value_text(value)} is the GPT's"
                reading.notices.append(f"{flag(field)} {value_text(found[field])} is not looked at: {used}")
            found[field] = value
    config, given = typed_config(reading)
    data = config.data.data_path or config.data.train_data_path or config.data.data_file_list
    samples = config.schedule.train_samples or config.schedule.train_iters
    needed = (
        (steps, "--retro-workdir", found.get("retro_workdir"), "must name the folder that is written", "retro"),
        ({"db", "neighbors"}, "--data-path", data, "must name the data of the training", "PREFIX"),
        ({"index", "neighbors"}, "--load", config.checkpoint.load, "must name a BERT, in any format", "runs/bert"),
        ({"neighbors"}, "--seq-length", config.data.seq_length, "must be that of the training", "1024"),
        ({"neighbors"}, "--train-samples", samples, "must be that of the training", "100000"),
    )
    missing = [
        problem(name, None, rule, f"Write {name} {example}")
        for readers, name, value, rule, example in needed
        if not value and set(readers).intersection(steps)
    ]
    missing += [f"unexpected {word!r}: a value follows its flag" for word in reading.words]
    if config.data.dataloader_type != "single" and "neighbors" in steps:
        rule = "must be single, because neighbours are found for the samples in the order of the dataset"
        missing.append(problem("--dataloader-type", config.data.dataloader_type, rule, "Leave it out"))
    fail(missing)
    return _run(config, given, found, {name: value for name, value in numbers.items() if value}, steps, reading.notices)


def _run(
    config: Any, given: dict[str, Any], found: dict[str, Any], numbers: dict[str, int], steps: tuple[str, ...],
    notices: Iterable[str],
) -> int:  # fmt: skip
    import torch.distributed as dist  # here, because it imports torch

    from megalith.cli.index import check_model
    from megalith.common.extras import require
    from megalith.retrieval.retro.neighbors import Query
    from megalith.retrieval.retro.steps import RetroOptions, Steps
    from megalith.runtime.build import process_group

    def notice(line: str) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"megalith: {line}", file=sys.stderr, flush=True)

    def named(**fields: str) -> dict[str, int]:
        return {field: numbers[name] for field, name in fields.items() if name in numbers}

    if found.get("index_string"):
        require("faiss", f"--retro-index-str {found['index_string']}")
    options = RetroOptions(
        workdir=found["retro_workdir"], load=config.checkpoint.load, iteration=config.checkpoint.ckpt_step,
        index_string=found.get("index_string"),
        bert_tokenizer={name: found[f"bert_{name}"] for name in OF_BERT if f"bert_{name}" in found},
        query=Query(**named(
            num_query="--retro-query-num-neighbors-query", num_target="--retro-query-num-neighbors-save",
            batch_size="--retro-bert-batch-size", block_chunks="--retro-block-size",
            max_length="--retro-bert-max-chunk-length",
        )),
        **named(
            chunk_length="--retro-gpt-chunk-length", doc_block_size="--retro-doc-block-size", workers="--workers",
            train_rows="--retro-index-ntrain", shard_rows="--shard-rows", ef_search="--retro-query-ef-search",
            nprobe="--retro-query-nprobe",
        ),
    )  # fmt: skip
    with process_group():
        for line in notices:
            notice(line)
        running = Steps(config, options, notice)
        for step in steps:
            if step != "db":
                # others are the GPT's
                of_model = {name: given[name] for name in given if not name.startswith(("retro_", "vocab_size"))}
                check_model(str(config.checkpoint.load), running.embedder.model, of_model)
                width = numbers.get("--retro-index-nfeats", running.embedder.width)
                if width != running.embedder.width:
                    rule = f"must be the width of the BERT, {running.embedder.width}"
                    raise ConfigError(problem("--retro-index-nfeats", width, rule, "Leave it out"))
            line = getattr(running, step)()
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(line, flush=True)
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Print what is damaged; a DataError where anything is."""
    from megalith.retrieval.retro.verifying import verify

    damaged, found = [], False
    for what, parts, lines in verify(args.workdir):
        found = True
        if not lines:
            print(f"{args.workdir}/{what}: {parts} parts, undamaged")
        damaged += lines
    if not found:
        rule = "must be a folder that megalith retro wrote"
        raise DataError(problem("FOLDER", args.workdir, rule, "Name what --retro-workdir named"))
    if damaged:
        cure = "Give the same megalith retro db, index or neighbors command again: these parts alone are written again"
        raise DataError("\n".join([*damaged, f"{cure}."]))
    return 0
