"""The demo: from nothing to a trained GPT and its text, by the same commands a user would type.

Each step is a separate command, printed before it runs, so that a reader can repeat and change it.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys
import time

from megalith.common.errors import ConfigError, MegalithError
from megalith.common.locks import locked
from megalith.common.units import duration, size
from megalith.workflows.corpus import write_corpus

MODEL = [
    "--num-layers",
    "4",
    "--hidden-size",
    "256",
    "--num-attention-heads",
    "4",
    "--max-position-embeddings",
    "256",
    "--seq-length",
    "256",
]
TRAINING = (
    "--micro-batch-size 8 --global-batch-size 16 --train-iters {steps} --lr 2e-3 --min-lr 2e-4 --lr-decay-style cosine "
    "--lr-warmup-fraction 0.2 --weight-decay 0.1 --adam-beta2 0.95 --hidden-dropout 0 --attention-dropout 0 "
    "--split 95,5,0 --eval-interval {interval} --eval-iters 8 --save-interval {interval} --log-interval 20"
)
PROMPT = "def "
OUTPUTS = (  # in the demo's folder; files of these names that are there already are renamed
    "corpus.jsonl",
    "tokenizer.json",
    "corpus_text_document.bin",
    "corpus_text_document.idx",
    "corpus_preprocess.json",
    "corpus.parts",
    "run",
)


def run_demo(folder: str = "runs/demo", steps: int = 200, megabytes: float = 8.0, vocabulary: int = 4096) -> int:
    """Make a corpus, train a tokenizer, preprocess, train, stop and resume, draw, generate. Returns an exit status."""
    if steps < 4:
        raise ConfigError(
            f"--steps must be at least 4, because the demo stops half-way and resumes; found {steps}. Give more."
        )
    work = pathlib.Path(folder)
    with locked(work, inside=True):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        for path in [work / name for name in OUTPUTS if (work / name).exists()]:
            path.rename(path.with_name(f"{path.name}.before-{stamp}"))
        return _run(work, steps, megabytes, vocabulary)


def _run(work: pathlib.Path, steps: int, megabytes: float, vocabulary: int) -> int:
    started, run = time.perf_counter(), work / "run"
    _print_step(f"1. A corpus: the sources and help texts of Python {sys.version.split()[0]}, on every machine")
    documents, text = write_corpus(work / "corpus.jsonl", megabytes)
    print(f"   {documents} documents, {size(text)} of text -> {work / 'corpus.jsonl'}")

    _print_step(f"2. A byte-level BPE tokenizer of {vocabulary} tokens, trained on it")
    _megalith(
        "data",
        "bpe",
        "--input",
        f"{work}/corpus.jsonl",
        "--vocab-size",
        str(vocabulary),
        "--output",
        f"{work}/tokenizer.json",
    )

    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{work}/tokenizer.json"]
    _print_step("3. The corpus as token numbers, in Megatron's .bin/.idx format")
    _megalith(
        "data", "preprocess", "--input", f"{work}/corpus.jsonl", "--output-prefix", f"{work}/corpus", *tokenizer,
        "--append-eod", "--workers", str(_cores()),
    )  # fmt: skip

    processes = _training_processes()
    train = ["pretrain", "gpt", *MODEL, *TRAINING.format(steps=steps, interval=max(steps // 6, 1)).split(), *tokenizer]
    train += ["--data-path", f"{work}/corpus_text_document", "--run-dir", str(run)]
    _print_step(f"4. Training a small GPT on {processes} process{'es' if processes > 1 else ''}; stopped half-way ...")
    _megalith(*train, "--exit-interval", str(steps // 2), processes=processes)
    _print_step("5. ... and resumed by the same command: the loss continues where it was")
    _megalith(*train, processes=processes)

    _print_step(f"6. Text from it, after the prompt {PROMPT!r}")
    _megalith(
        "generate",
        "--load",
        str(run),
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "96",
        "--temperature",
        "0.8",
        "--top-k",
        "40",
        "--seed",
        "1",
    )
    first, last = _validation(run)
    _print_step(f"Done in {duration(time.perf_counter() - started)}")
    print(
        f"   validation loss {first:.2f} -> {last:.2f}\n"
        f"   curve        {run / 'loss.png'}\n"
        f"   every step   {run / 'metrics.jsonl'}\n"
        f"   checkpoints  {run / 'checkpoints'}\n"
        f"   next: longer training    megalith demo --steps 3000\n"
        f"         your own prompts   megalith generate --load {run} --prompt 'import '\n"
        f"         your own corpus    megalith data preprocess --help; megalith pretrain gpt --help"
    )
    return 0


def _print_step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _training_processes() -> int:
    """Two where there are two cores; one where there is an accelerator, which one process keeps busy."""
    import torch

    return 1 if torch.accelerator.is_available() else min(2, _cores())


def _megalith(*words: str, processes: int = 1) -> None:
    """Print a megalith command as a user would type it, and run it; more than one process by torchrun."""
    start = (
        ["torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "megalith"]
        if processes > 1
        else ["megalith"]
    )
    print("$ " + shlex.join([*start, *words]), flush=True)
    module = ["-m", "torch.distributed.run", *start[1:]] if processes > 1 else ["-m", "megalith"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(max(1, _cores() // processes))} if processes > 1 else {})
    done = subprocess.run([sys.executable, *module, *words], env=environment)
    if done.returncode:
        raise MegalithError(
            f"the command above ended with status {done.returncode}; its message above says why. The demo stops here."
        )


def _validation(run: pathlib.Path) -> tuple[float, float]:
    """First and last validation loss of the run."""
    import json

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    return losses[0], losses[-1]
