"""megalith index build|search|evaluate|verify|import: block embeddings, and which of them are nearest to a text."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from megalith.common.errors import ConfigError, DataError, problem
from megalith.config.flags import flags
from megalith.config.flags.loading import typed_config
from megalith.config.flags.text import fail, flag, value_text

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
    _option("--retriever-seq-length", "seq_length", "as --seq-length", number=True),
    _option("--shard-rows", "shard_rows", "vectors of a file (default: 65536)", number=True),
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
    evaluate = verbs.add_parser("evaluate", help="top-k recall of answers to questions", epilog=EXAMPLE)
    evaluate.add_argument("index", metavar="FOLDER", help="what `megalith index build` wrote")
    evaluate.add_argument(
        "--qa-data-dev", nargs="+", default=[], metavar="FILE", help="questions: TSV, JSON lines, DPR"
    )
    evaluate.add_argument("--qa-data-test", nargs="+", default=[], metavar="FILE", help="more questions")
    evaluate.add_argument("--faiss-match", default="string", metavar="HOW", help="string or regex")
    evaluate.add_argument("--faiss-topk-retrievals", type=int, default=100, metavar="K", help="passages of a question")
    evaluate.add_argument("--faiss-use-gpu", action="store_true", help="accepted: exact search is on the CPU's cores")
    evaluate.add_argument("--index-string", metavar="NAME", help="search this index of FAISS (default: exactly)")
    evaluate.add_argument("--load", metavar="PATH", help=f"{MODEL} (default: that which made the index)")
    evaluate.add_argument("--device", default="auto", help="auto, cpu, cuda or xpu")
    evaluate.set_defaults(handler=run_evaluate)
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
    numbers = {name: flags.whole_number(reading, name) for name in ("batch_size", "shard_rows", "train_rows")}
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
    missing += [f"unexpected {word!r}: a value follows its flag" for word in reading.words]
    fail(missing)
    return _build(config, given, output, evidence, reading.values.get("index_string"), numbers, reading.notices)


def _build(
    config: Any, given: dict[str, Any], output: str, evidence: str | None, index_string: str | None,
    numbers: dict[str, int | None], notices: Sequence[str],
) -> int:  # fmt: skip
    import torch  # here, because they import torch
    import torch.distributed as dist

    from megalith.common.extras import require
    from megalith.data.tokenizers.tokenizer import tokenizer_from_config
    from megalith.retrieval.embed import Embedder, build
    from megalith.retrieval.sources import Blocks, Passages, Source

    def notice(line: str) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"megalith: {line}", file=sys.stderr, flush=True)

    if index_string:
        require("faiss", f"--index-string {index_string}")
    tokenizer = None
    if config.data.vocab_file and not config.data.tokenizer_type:
        config = config.replace(tokenizer_type="BertWordPieceLowerCase")
        notices = [*notices, "--tokenizer-type is not given: the file is of a BertWordPieceLowerCase"]
    if config.data.tokenizer_type:
        tokenizer = tokenizer_from_config(config.data)
    owns_group, c = not dist.is_initialized(), config.checkpoint
    dtype = getattr(torch, config.precision.compute_dtype)
    try:
        embedder = Embedder.load(c.load, config.parallel, dtype=dtype, iteration=c.ckpt_step, tokenizer=tokenizer)
        for line in notices:
            notice(line)
        check_model(c.load, embedder.model, given)
        length = config.data.seq_length or embedder.config.data.seq_length or embedder.model.max_position_embeddings
        if length > embedder.model.max_position_embeddings:
            rule = f"must be at most the model's --max-position-embeddings, {embedder.model.max_position_embeddings}"
            raise ConfigError(problem("--seq-length", length, rule, "Write a smaller number, or leave it out"))
        if evidence:
            source: Source = Passages(evidence, embedder.tokenizer, length)
        else:
            source = Blocks(
                config.data.data_path[0], config.data.titles_data_path, embedder.tokenizer, length,
                one_sentence=config.data.use_one_sent_docs, seed=config.batch.seed,
            )  # fmt: skip
        options: dict[str, Any] = {name: numbers[name] for name in ("batch_size", "shard_rows") if numbers[name]}
        plan = build(embedder, source, output, notice=notice, **options)
        if embedder.runtime.mesh.is_main_process:
            print(f"{output}: {plan.rows} vectors of {plan.width} in {plan.shards} shards", flush=True)
            if index_string:
                _build_faiss(output, index_string, numbers["train_rows"], notice)
    finally:
        if owns_group and dist.is_initialized():
            dist.destroy_process_group()
    return 0


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
    with _opened(args, cache=len(args.text) > 1) as (store, index, embedder, source):
        vectors = embedder.queries(args.text)
        assert vectors is not None  # one process has the whole model
        for text, scores, rows in zip(args.text, *index.search(vectors, args.top_k)):
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


@contextlib.contextmanager
def _opened(args: argparse.Namespace, cache: bool) -> Iterator[tuple[Any, Any, Any, Any]]:
    """(store, index, embedder, source) of a folder and the flags of a search."""
    import torch.distributed as dist  # here, because they import torch

    from megalith.config.run import RunConfig
    from megalith.retrieval.embed import Embedder
    from megalith.retrieval.search import ExactIndex, FaissIndex
    from megalith.retrieval.sources import open_source
    from megalith.retrieval.store import Store, check_probe

    store = Store(args.index)
    load = args.load or store.plan.model
    if not load:
        rule = f"must be named, as {args.index} does not say which model made it"
        raise ConfigError(problem("--load", None, rule, "Write --load RUN"))
    index = FaissIndex(store, args.index_string) if args.index_string else ExactIndex(store, cache=cache)
    owns_group = not dist.is_initialized()
    try:
        embedder = Embedder.load(load, RunConfig().replace(device=args.device).parallel)
        check_probe(store, embedder.probe(), load)
        yield store, index, embedder, open_source(store.plan.source, embedder.tokenizer)
    finally:
        if owns_group and dist.is_initialized():
            dist.destroy_process_group()


def run_evaluate(args: argparse.Namespace) -> int:
    """Print for each file of questions how often the best k passages hold an answer."""
    from megalith.data.questions import Matcher, read_questions

    if args.faiss_topk_retrievals < 1:
        rule = "must be above 0"
        raise ConfigError(problem("--faiss-topk-retrievals", args.faiss_topk_retrievals, rule, "Write 100"))
    Matcher(args.faiss_match)  # a mistake is found before anything slow begins
    files = [*args.qa_data_dev, *args.qa_data_test]
    if not files:
        raise ConfigError(
            problem("--qa-data-dev", None, "must name files of questions", "Write --qa-data-dev nq-dev.csv")
        )
    questions = {path: read_questions(path) for path in files}
    from megalith.retrieval.recall import measure, retrieve

    with _opened(args, cache=True) as (store, index, embedder, source):
        for path, asked in questions.items():
            found = retrieve(embedder, index, asked, args.faiss_topk_retrievals)
            assert found is not None  # one process has the whole model
            recall = measure(asked, found[1], lambda row: source.text(store.row(row))[1], args.faiss_match)
            print("\n".join([f"{path}, match by {args.faiss_match}:", *(f"  {line}" for line in recall.lines())]))
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
