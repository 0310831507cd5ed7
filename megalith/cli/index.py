"""megalith index build|search|verify|import: block embeddings, and which of them are nearest to a text."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config import environment
from megalith.config.flags import flags
from megalith.config.flags.loading import typed_config
from megalith.config.flags.text import fail, flag, value_text
from megalith.config.run import RunConfig
from megalith.config.sections.data import TOKENIZER_FILES

EXAMPLE = """\
examples:
  megalith index build --load runs/ict --data-path wiki_text_sentence --titles-data-path wiki_title_sentence \\
      --output wiki.store --index-string HNSW32
  torchrun --nproc-per-node 8 -m megalith index build --load runs/ict --evidence psgs_w100.tsv --output nq.store --bf16
  megalith index search wiki.store "who wrote war and peace" --top-k 5

The flags of Megatron's create_doc_index.py work as typed: those of the model must be what --load holds.
"""
MODEL = "the bi-encoder: a run of megalith pretrain ict, or a checkpoint"
NO_INTERVAL = "progress is shown every few seconds"


def _option(name: str, sets: str, help: str, number: bool = False) -> flags.Flag:
    return flags.Flag(name, {sets: flags.VALUE}, help=help, number=number)


BUILD_FLAGS = (
    _option("--output", "output", "the folder of embeddings, new or to be resumed"),
    _option("--block-data-path", "output", "as --output"),
    _option("--embedding-path", "output", "as --output"),
    _option("--evidence", "evidence", "passages instead of blocks: TSV (id, text, title) or JSON lines"),
    _option("--evidence-data-path", "evidence", "as --evidence"),
    _option("--indexer-batch-size", "batch_size", "texts of a batch (default: 128)", number=True),
    _option("--shard-rows", "shard_rows", "vectors of a file (default: 65536)", number=True),
    _option(
        "--engine",
        "engine",
        "embed by workers instead of this process: ray (a cluster, by RAY_ADDRESS, whose machines see the same files), "
        "processes (this machine), or module:name",
    ),
    _option("--workers", "workers", "of --engine (default: one for each core, or GPU of Ray's)", number=True),
    _option("--train-rows", "train_rows", "vectors that --index-string is trained on (default: 100000)", number=True),
    _option(
        "--index-string",
        "index_string",
        "also build this index of FAISS (Flat, IVF256,Flat, HNSW32, IVF1024,PQ32), and print its recall",
    ),
    flags.Flag(
        "--indexer-log-interval",
        {},
        help=f"accepted: {NO_INTERVAL}",
        notice=f"--indexer-log-interval is not needed: {NO_INTERVAL}",
        number=True,
    ),
)


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb and its own verbs."""
    parser = subparsers.add_parser(
        "index",
        help="an index of block embeddings: build, search, verify",
        description="Blocks of text as vectors of a bi-encoder, and which of them are nearest to a question.",
        epilog=EXAMPLE,
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    usage = "megalith index build --load RUN --output FOLDER ..."
    build = verbs.add_parser("build", help="embed blocks or passages", epilog=EXAMPLE, usage=usage)
    flags.add_help(build, BUILD_FLAGS)
    build.set_defaults(handler=run_build, reads=functools.partial(flags.read, command_flags=BUILD_FLAGS))
    search = verbs.add_parser("search", help="show the blocks that are nearest to a text", epilog=EXAMPLE)
    search.add_argument("index", metavar="FOLDER", help="what `megalith index build` wrote")
    search.add_argument("text", nargs="+", metavar="TEXT", help="a question; each argument is one")
    search.add_argument("--top-k", type=int, default=5, metavar="N", help="blocks to show")
    search.add_argument("--index-string", metavar="NAME", help="search this index of FAISS (default: exactly)")
    search.add_argument("--load", metavar="PATH", help=f"{MODEL} (default: that which made the index)")
    search.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    search.add_argument("--json", action="store_true", help="print a JSON line for each question")
    search.set_defaults(handler=run_search)
    example = "example: megalith index verify wiki.store"
    verify = verbs.add_parser("verify", help="read every byte and compare checksums", epilog=example)
    verify.add_argument("index", nargs="+", metavar="FOLDER")
    verify.set_defaults(handler=run_verify)
    example = "example: megalith index import embedded_blocks.pkl blocks.store"
    imported = verbs.add_parser("import", help="a store of Megatron's pickle of embeddings", epilog=example)
    imported.add_argument("pickle", metavar="PICKLE", help="read without running what it may contain")
    imported.add_argument("output", metavar="FOLDER")
    imported.set_defaults(handler=run_import)


def run_build(args: argparse.Namespace) -> int:
    """Embed, and build the approximate index that is asked for."""
    reading = args.reading
    numbers = {
        name: flags.whole_number(reading, name) for name in ("batch_size", "shard_rows", "train_rows", "workers")
    }
    config, given = typed_config(reading)
    output, evidence = (reading.values.get(name) for name in ("output", "evidence"))
    embedded, named = config.data.data_path or evidence, "Write --data-path PREFIX, or --evidence FILE"
    needed = (
        ("--load", config.checkpoint.load, f"must name {MODEL}", "Write --load runs/ict"),
        ("--output", output, "must name the folder that is written", "Write --output blocks.store"),
        ("--data-path", embedded, "must name what is embedded", named),
    )
    missing = [problem(name, None, rule, cure) for name, value, rule, cure in needed if not value]
    if config.data.data_path and evidence:
        missing.append(problem("--evidence", evidence, "must not be given beside --data-path", "Leave one of them out"))
    if len(config.data.data_path) > 1:
        rule = "must name one dataset, as an index is of one"
        missing.append(problem("--data-path", " ".join(config.data.data_path), rule, "Build one index for each"))
    engine = reading.values.get("engine")
    if numbers["workers"] and not engine:
        rule, cure = "is of --engine, which is not given", "Write --engine ray, or start processes by torchrun"
        missing.append(problem("--workers", numbers["workers"], rule, cure))
    missing += [f"unexpected {word!r}: a value follows its flag" for word in reading.words]
    fail(missing)
    return _build(config, given, output, evidence, reading.values, numbers, reading.notices)


def _build(
    config: Any, given: dict[str, Any], output: str, evidence: str | None, values: Mapping[str, Any],
    numbers: dict[str, int | None], notices: Sequence[str],
) -> int:  # fmt: skip
    import torch  # here, because they import torch

    from megalith.common.extras import require
    from megalith.data.tokenizers.given import TokenizerOverride
    from megalith.retrieval.embed import Embedder, Workers, build
    from megalith.retrieval.sources import Blocks, Passages, Source
    from megalith.runtime.build import process_group

    def notice(line: str) -> None:
        if environment.rank() == 0:
            print(f"megalith: {line}", file=sys.stderr, flush=True)

    index_string, engine, workers = values.get("index_string"), values.get("engine"), None
    if index_string:
        require("faiss", f"--index-string {index_string}")
    if engine:
        check_engine(engine, config)
    c, data, dtype = config.checkpoint, config.data, getattr(torch, config.precision.compute_dtype)
    for line in notices:
        notice(line)
    if config.parallel.sharding != "none":
        notice("--data-parallel-sharding has no effect: every data-parallel process has a whole model")
    named = {"dtype": dtype, "iteration": c.ckpt_step}
    with process_group():
        embedder = Embedder.load(c.load, config.parallel, tokenizer=TokenizerOverride(None, vars(data)), **named)
        check_model(c.load, embedder.model, given)
        length = embedder.length(config.retriever.retriever_seq_length or data.seq_length)
        if evidence:
            source: Source = Passages(evidence, embedder.tokenizer, length)
        else:
            source = Blocks(
                data.data_path[0], data.titles_data_path, embedder.tokenizer, length, data.block_samples_mapping,
                one_sentence=data.use_one_sent_docs, seed=config.batch.seed,
            )  # fmt: skip
        options: dict[str, Any] = {name: numbers[name] for name in ("batch_size", "shard_rows") if numbers[name]}
        if engine:
            files = {name: os.path.abspath(value) for name in TOKENIZER_FILES if (value := getattr(data, name))}
            tokenizer = TokenizerOverride(None, vars(data) | files)  # another: one that was used is not to be pickled
            path = os.path.abspath(c.load) if os.path.exists(c.load) else c.load
            load = functools.partial(Embedder.load, path, config.parallel, tokenizer=tokenizer, **named)
            workers = Workers(engine, load, numbers["workers"] or 0, gpus=config.parallel.device != "cpu")
        plan = build(embedder, source, output, workers=workers, notice=notice, **options)
        if embedder.runtime.mesh.is_main_process:
            print(f"{output}: {plan.rows} vectors of {plan.width} in {plan.shards} shards", flush=True)
            if index_string:
                _build_faiss(output, index_string, numbers["train_rows"], notice)
    return 0


def check_engine(engine: str, config: RunConfig) -> None:
    """Raise ConfigError for an engine that is not there, or that cannot split the work as `config` says."""
    from megalith.common.extras import require
    from megalith.data.corpus.preprocess_pool import ENGINES

    ENGINES.find(engine)
    if engine == "ray":
        require("ray", "--engine ray")
    p = config.parallel
    split = {
        "--tensor-model-parallel-size": p.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": p.pipeline_model_parallel_size,
        "The number of processes": environment.world_size(),
    }
    rule, cure = "must be 1 with --engine, each of whose workers has a whole model", "Leave --engine out, or this"
    fail(problem(name, size, rule, cure) for name, size in split.items() if size > 1)


def _build_faiss(folder: str, index_string: str, train_rows: int | None, notice: Any) -> None:
    from megalith.retrieval.search import build_faiss, measure_recall
    from megalith.retrieval.store import Store

    store = Store(folder)
    options = {"train_rows": train_rows} if train_rows else {}
    index = build_faiss(store, index_string, notice=notice, **options)
    found = measure_recall(store, index)
    print(f"{index.path}: recall of the 20 nearest {found:.3f}, against an exact search", flush=True)


def check_model(load: str, model: Any, given: dict[str, Any]) -> None:
    """Raise ConfigError where flags of the model are not what the checkpoint holds."""
    known = vars(model)
    differing = [name for name in given if name in known and given[name] != known[name] and name != "model_type"]
    fail(
        problem(flag(name), given[name], f"must be {value_text(known[name])}, that of {load}", "Leave it out")
        for name in differing
    )


def run_search(args: argparse.Namespace) -> int:
    """Print the nearest blocks of each text, with their scores."""
    if args.top_k < 1:
        raise ConfigError(problem("--top-k", args.top_k, "must be above 0", "Write --top-k 5"))
    from megalith.config.run import RunConfig  # here, because they import torch
    from megalith.retrieval.embed import Embedder
    from megalith.retrieval.search import open_index
    from megalith.retrieval.sources import open_source
    from megalith.retrieval.store import Store, check_probe
    from megalith.runtime.build import process_group

    store = Store(args.index)
    index = open_index(store, args.index_string, cache=len(args.text) > 1)
    with process_group():
        embedder = Embedder.load(args.load or store.model, RunConfig().replace(device=args.device).parallel)
        check_probe(store, embedder.probe(), embedder.name)
        source = open_source(store.plan.source, embedder.tokenizer)
        results = zip(args.text, *index.search(embedder.shared_queries(args.text), args.top_k))
    for text, scores, rows in results:
        found = []
        for score, row in zip(scores.tolist(), rows.tolist()):
            if row >= 0:
                title, body = source.text(store.row(row))
                found.append({"score": round(score, 4), "row": row, "title": title, "text": body})
        if args.json:
            print(json.dumps({"query": text, "results": found}, ensure_ascii=False))
            continue
        print(text)
        for place, each in enumerate(found, 1):
            heading = f"{each['title']}: " if each["title"] else ""
            print(f"{place:3}. {each['score']:9.4f}  {heading}{each['text'][:300]}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Print what is damaged; a DataError where anything is."""
    from megalith.retrieval.store import read_plan, verify

    damaged = []
    for folder in args.index:
        wrong = [f"{folder}/{name} {what}" for name, what in verify(folder)]
        plan = read_plan(folder)
        if not wrong:
            print(f"{folder}: {plan.rows} vectors of {plan.width} in {plan.shards} shards, undamaged")
        damaged += wrong
    if damaged:
        cure = "Delete these files and the .json of their shards, and give the same megalith index build command again"
        raise DataError("\n".join([*damaged, f"{cure}."]))
    return 0


def run_import(args: argparse.Namespace) -> int:
    """Make a store of Megatron's pickle."""
    from megalith.retrieval.megatron import import_pickle

    plan = import_pickle(args.pickle, args.output)
    print(f"{args.output}: {plan.rows} vectors of {plan.width} in {plan.shards} shards")
    return 0
