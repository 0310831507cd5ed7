"""megalith serve: text out of a trained model over HTTP."""

from __future__ import annotations

import argparse
import sys

from megalith.cli.flags.load import WHAT_TO_LOAD, add_format_flags, add_load_flags, check_paths, load_model
from megalith.cli.flags.options import add_option_flags, given_options
from megalith.cli.flags.training import add_dtype_flags, add_training_flags, unused_flags
from megalith.common.errors import ConfigError, problem
from megalith.common.extras import require
from megalith.common.orphans import ends_with_launcher
from megalith.config import environment
from megalith.config.flags.text import Words
from megalith.generation.params import GenerationParams
from megalith.serving.options import ServeOptions, is_loopback

EXAMPLE = """\
examples:
  megalith serve runs/demo/run
  megalith serve Llama-3-8B --dtype bfloat16 --host 0.0.0.0 --token-file token.txt --max-length 8192
  torchrun --nproc-per-node 4 -m megalith serve Llama-3-8B --tensor-model-parallel-size 4
  curl localhost:5000/api -X PUT -H 'Content-Type: application/json' -d '{"prompts": ["Once"], "tokens_to_generate": 9}'
  megalith ask localhost:5000 --prompt 'Once upon a time'

A browser at the same address shows a page to try the model. /openapi.json describes every route, /health says whether
the model is well, /metrics is for Prometheus. SIGTERM lets running requests end. Flags of Megatron's text generation
server work as typed; those without a meaning here are named in a line.
"""
PACKAGES = ("fastapi", "uvicorn", "httptools", "prometheus_client", "jinja2")
# Flags of Megatron's server that pretrain does not have: how many values they take, and what to do instead.
OF_MEGATRONS_SERVER = {
    "--out-seq-length": (1, "each request says tokens_to_generate, which is 64 by default"),
    "--inference-batch-times-seqlen-threshold": (1, ""),
    "--max-tokens-to-oom": (1, "--max-length and --max-cache-bytes bound the memory"),
}
INSTEAD = {"--seed": "each request may say random_seed", "--seq-length": "--max-length bounds prompt and text"}


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="text out of a trained model over HTTP",
        usage="megalith serve PATH [--FLAG VALUE ...]",
        description="Text out of a trained model over HTTP: Megatron's PUT /api, OpenAI's completions and chat "
        "completions, and a page to try them.",
        epilog=EXAMPLE,
    )
    parser.add_argument("path", nargs="?", metavar="PATH", help=WHAT_TO_LOAD)
    parser.add_argument("--load", metavar="PATH", help="the same, as Megatron names it")
    add_load_flags(parser)
    add_dtype_flags(parser)
    add_option_flags(parser.add_argument_group("the server"), ServeOptions)
    add_format_flags(parser)
    add_training_flags(parser, {name: nargs for name, (nargs, _) in OF_MEGATRONS_SERVER.items()})
    parser.set_defaults(handler=serve)


def serve(args: argparse.Namespace) -> int:
    """Load a model and serve it; the exit status."""
    if None not in (args.path, args.load) and args.path != args.load:
        found = Words(f"{args.path} and {args.load}")
        raise ConfigError(problem("PATH and --load", found, "must be one path", "Leave one of them out"))
    args.load = args.load if args.path is None else args.path
    if args.load is None:
        cure = "Write megalith serve PATH: " + WHAT_TO_LOAD
        raise ConfigError(problem("PATH", Words("nothing"), "must name what is served", cure))
    options = ServeOptions(**given_options(args, ServeOptions))
    GenerationParams(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p)  # raises what is wrong
    check_paths(args, "--load" if args.path is None else "PATH")
    for package in PACKAGES:
        require(package, "megalith serve")
    if environment.rank() == 0:
        for line in _notices(args, options):
            print(f"megalith: {line}", file=sys.stderr, flush=True)
    with ends_with_launcher():
        from megalith.parallel.devices import pick_device  # here, because these import torch
        from megalith.serving.engine_thread import without_thread_pool
        from megalith.serving.server import bind, serve_model

        if environment.rank() == 0:
            bind(options.host, options.port).close()  # one that is taken is said now, not after minutes of loading
        model = without_thread_pool(lambda: load_model(args), pick_device(args.device))
        return serve_model(model, options.model_name or _name(args.load), options)


def _notices(args: argparse.Namespace, options: ServeOptions) -> list[str]:
    instead = {name: why for name, (_, why) in OF_MEGATRONS_SERVER.items()} | INSTEAD
    lines = unused_flags(args, "a server", instead)
    if options.token_file is None and not is_loopback(options.host):
        lines.append(
            f"everybody who reaches {options.host} may use this server: --token-file FILE asks for a token, and "
            "--host 127.0.0.1 is this machine alone"
        )
    return lines


def _name(path: str) -> str:
    """The last part of a path or URL that says something."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return parts[-1] if parts else "model"
