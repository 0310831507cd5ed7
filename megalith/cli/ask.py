"""megalith ask: write to a text server and read what it answers, once or in a conversation."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from megalith.cli.flags.options import add_sampling_flags, given_sampling
from megalith.common.errors import ConfigError, problem
from megalith.config.flags.text import Words, flag
from megalith.generation.params import GenerationParams
from megalith.serving.client import OPENAI_NAMES, Client, ServerError
from megalith.workflows.text_output import SEPARATOR

EXAMPLE = """\
examples:
  megalith ask localhost:5000                                  # prompts one after the other, each continued
  megalith ask localhost:5000 --chat                           # a conversation, where the model has a chat template
  megalith ask localhost:5000 --prompt 'Once upon' --max-new-tokens 100 --temperature 0.8 --top-k 40
  echo 'Once upon a time' | megalith ask localhost:5000
  printf 'Once upon a time\\n20\\n' | megalith ask localhost:5000 --megatron

Standard input, where it is not a terminal, is one prompt. At a terminal the arrow keys bring back earlier prompts,
Ctrl-C stops a text, Ctrl-D ends. Of a completion the new text alone is shown. temperature, top-k and top-p are the
server's where they are not given.

--megatron is Megatron's tools/text_generation_cli.py: it asks for a prompt and for a number of tokens, again and again
until its input ends, and prints what PUT /api answers.
"""
NOT_SHOWN = ("logprobs", "top_logprobs", "prompt_logprobs", "echo")  # options for whose results there is no place here


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the verb to the command line."""
    parser = subparsers.add_parser(
        "ask",
        help="write to a text server and read what it answers",
        usage="megalith ask [HOST] [--FLAG VALUE ...]",
        description="Write to a text server (megalith serve) and read what it answers.",
        epilog=EXAMPLE,
    )
    add = parser.add_argument
    add("host", nargs="?", default="localhost:5000", metavar="HOST", help="host, host:port or URL of the server")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--chat", action="store_true", help="a conversation: prompts are messages, and the model answers")
    how.add_argument("--megatron", action="store_true", help="ask and print as Megatron's text_generation_cli.py")
    add("--prompt", metavar="TEXT", help="ask once, for this")
    add("--system", metavar="TEXT", help="with --chat: the message that tells the model how to answer")
    add("--token-file", metavar="FILE", help="file with the server's token")
    add("--timeout", type=float, default=600.0, metavar="X", help="seconds to wait for a sign of the server")
    add_sampling_flags(parser.add_argument_group("how texts are written"), NOT_SHOWN)
    parser.set_defaults(handler=ask)


def ask(args: argparse.Namespace) -> int:
    """Ask a server, once or until the input ends; the exit status."""
    options = given_sampling(args)
    if args.system is not None and not args.chat:
        raise ConfigError(problem("--system", args.system, "must be given with --chat", "Add --chat"))
    if args.megatron and args.prompt is not None:
        rule, cure = "must be left out with --megatron, which asks for prompts", "Leave one of them out"
        raise ConfigError(problem("--prompt", args.prompt, rule, cure))
    if not args.timeout > 0:
        raise ConfigError(problem("--timeout", args.timeout, "must be above 0 seconds", "Try 600"))
    client = Client(args.host, _token(args.token_file), args.timeout)
    if args.megatron:
        return _ask_as_megatron(client, options)
    talk = Conversation(client, args.chat, args.system, options)
    if args.prompt is None and sys.stdin is not None and sys.stdin.isatty():
        return _ask_at_terminal(client, talk)
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt is None and sys.stdin is not None else args.prompt
    talk.say(prompt or "")
    return 0


class Conversation:
    """Prompts to one server, and its texts, printed as they come. In a chat each message has those before it."""

    def __init__(self, client: Client, chat: bool, system: str | None, options: dict[str, Any]):
        """options: of GenerationParams. Raises ConfigError for those that a chat cannot have."""
        self.client, self.chat, self.options = client, chat, options
        self.messages = [{"role": "system", "content": system}] if system is not None else []
        self.streams = options.keys() <= OPENAI_NAMES.keys()
        if chat and not self.streams:
            name = min(options.keys() - OPENAI_NAMES.keys())
            raise ConfigError(
                problem(flag(name), options[name], "must be left out with --chat", "Leave out one of both")
            )

    def say(self, prompt: str) -> None:
        """Send a prompt, print the answer. What was printed before an interruption stays part of a chat."""
        if not self.streams:
            texts = self.client.texts(prompt, {"num_samples": 1, **self.options, "echo": False})
            print(f"\n{SEPARATOR}\n".join(texts), flush=True)
            return
        pieces = list[str]()
        if self.chat:
            self.messages.append({"role": "user", "content": prompt})
            stream = self.client.chat(self.messages, self.options)
        else:
            default = {"max_new_tokens": GenerationParams().max_new_tokens}  # the server has OpenAI's, which is small
            stream = self.client.complete(prompt, default | self.options)
        try:
            with contextlib.closing(stream):
                for piece in stream:
                    pieces.append(piece)
                    print(piece, end="", flush=True)
        finally:
            if pieces:
                print(flush=True)
            if self.chat:
                self._remember("".join(pieces))

    def _remember(self, answer: str) -> None:
        if answer:
            self.messages.append({"role": "assistant", "content": answer})
        else:
            self.messages.pop()  # a message without an answer would be followed by another of the same role


def _ask_at_terminal(client: Client, talk: Conversation) -> int:
    _edit_lines()
    print(f"megalith: {client.url}; Ctrl-C stops a text, Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            if prompt := input("> "):
                talk.say(prompt)
        except EOFError:
            break
        except KeyboardInterrupt:  # at the question it drops the line: one that came too late must not end the talk
            print("\nmegalith: stopped; Ctrl-D ends", file=sys.stderr)
        except ServerError as error:
            print(f"megalith: {error}", file=sys.stderr)
    print()
    return 0


def _ask_as_megatron(client: Client, options: dict[str, Any]) -> int:
    _edit_lines()
    for prompt in _lines("Enter prompt: "):
        number = next(_lines("Enter number of tokens to generate: "), None)
        if number is None:
            break
        if not number.strip().isdecimal():
            print(f"megalith: the number of tokens must be a whole number; found {number!r}", file=sys.stderr)
            continue
        text = client.texts(prompt, {**options, "max_new_tokens": int(number)})[0]
        print(f"Megatron Response: {text}", flush=True)
    return 0


def _lines(question: str) -> Iterator[str]:
    """What is typed after each question, until the end of the input."""
    with contextlib.suppress(EOFError):
        while True:
            yield input(question)


def _edit_lines() -> None:
    """Let `input` have a history, which the arrow keys bring back."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401


def _token(path: str | None) -> str | None:
    """The token of a file; ConfigError where there is none."""
    if path is None:
        return None
    file = pathlib.Path(path)
    if not file.is_file():
        raise ConfigError(problem("--token-file", path, "must name a file that exists", "Correct the path"))
    token = file.read_text(encoding="utf-8", errors="replace").strip()
    if not token or not token.isascii() or not token.isprintable():
        found = Words(f"{len(token)} characters")
        raise ConfigError(problem("--token-file", found, "must hold one line of ASCII characters", "Correct the file"))
    return token
