"""Two source trees give the same results, bit for bit: losses, gradient norms, datasets, exports, generated ids.

    git worktree add ../old 756ff61                          # and a .venv in it: make -C ../old install
    python benchmarks/same_results.py ../old . --only tp2    # cases whose name has this in it; all without --only
    python benchmarks/same_results.py --list                 # the cases
    python benchmarks/same_results.py ../old . --mutate      # NEW gets another seed and text: every case must differ

Only the command lines of the two trees are used (TREE/.venv/bin/megalith and torchrun), at toy size, one after the
other, on the CPU, with one thread. A line per case: equal, or the first thing that differs and both values. Status 1
where anything differs or fails.

What a tree writes it reads again itself, but for exports and generation: both trees read the runs that OLD trained,
which shows as well that what is stored still opens.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

WORDS = 48  # token ids 0 to 47, and as many words of the sentences
SIZE = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 4 --global-batch-size 8"
RUN = """--train-iters 20 --lr 5e-3 --lr-warmup-iters 2 --lr-decay-style cosine --split 90,5,5
    --eval-interval 10 --eval-iters 2 --log-interval 10 --progress none --print-config none --device cpu"""
NUMBERS = """--data-path data/numbers_text_document --tokenizer-type NullTokenizer --vocab-size 48
    --seq-length 16 --max-position-embeddings 16"""
SENTENCES = """--data-path data/sentences_text_sentence --seq-length 24
    --tokenizer-type BertWordPieceLowerCase --vocab-file data/words.txt"""
FORMS = {  # name -> the words after `pretrain`; dropout is on in all of them
    "gpt-absolute": f"gpt {NUMBERS}",  # several heads of keys, tied, GELU
    "gpt-rotary": f"gpt {NUMBERS} --position-embedding-type rope --group-query-attention --num-query-groups 2 --swiglu"
    " --untie-embeddings-and-output-weights --normalization RMSNorm --disable-bias-linear",
    "gpt-alibi": f"gpt {NUMBERS} --position-embedding-type alibi --attention-head-type multiquery",
    "bert": f"bert {SENTENCES} --max-position-embeddings 24",
    "t5": f"t5 {SENTENCES} --vocab-extra-ids 20 --decoder-seq-length 16 --kv-channels 8"
    " --position-embedding-type relative --normalization RMSNorm --disable-bias-linear --relu --softmax-scale 1"
    " --initializer-factor 1 --scale-output",
}
LAYOUTS = {  # name -> processes, flags
    "one": (1, ""),
    "tp2+sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2-zero-bubble": (2, "--pipeline-model-parallel-size 2 --pipeline-schedule zero_bubble --micro-batch-size 2"),
    "pp2": (2, "--pipeline-model-parallel-size 2 --micro-batch-size 2"),  # zero-bubble does not compile
    "dp2-sharded": (2, "--data-parallel-sharding full"),
    "cp2": (2, "--context-parallel-size 2"),
}
COMPILED = ("one", "tp2+sp", "pp2", "dp2-sharded", "cp2")  # one for each form, because compiling takes long
MEGATRON = {  # form -> layout of the files
    "gpt-absolute": "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
    "gpt-rotary": "--tensor-model-parallel-size 2",
    "bert": "",
}
PROMPTS = ["3 4 5", "40 41 42 43 44 45 46", "7"]  # ids, for NullTokenizer
QUESTIONS = ["w1 w1 w1 [MASK] w2", "w3 w3 w3. w4"]
GENERATION = {  # name -> form, flags
    "greedy": ("gpt-absolute", "--greedy"),
    "greedy-rotary": ("gpt-rotary", "--greedy"),
    "greedy-alibi": ("gpt-alibi", "--greedy"),
    "seeded": ("gpt-absolute", "--num-samples 3 --temperature 0.9 --top-k 20 --top-p 0.95 --ignore-eod"),
    "seeded-rotary": ("gpt-rotary", "--num-samples 3 --ignore-eod --batch-size 2"),
    "beam": ("gpt-absolute", "--beam-width 3 --num-samples 3"),
    "t5": ("t5", "--num-samples 2 --temperature 0.9"),
}
MEASURED = {"seconds"}  # what metrics.jsonl holds that no two runs have in common
Found = dict[str, Any]  # what a case found, in order: name -> text, bytes or tensor


class Failed(Exception):
    """A command of a tree ended with an error."""


class Side(NamedTuple):
    """A tree, the folder that its commands run in, and the seed of all that is random."""

    tree: pathlib.Path
    folder: pathlib.Path
    seed: int

    def run(self, words: str, processes: int = 1) -> None:
        """`megalith WORDS` in the folder; raises Failed with the end of what it said."""
        torchrun = ["torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "megalith"]
        name, *more = torchrun if processes > 1 else ["megalith"]
        command = [f"{self.tree}/.venv/bin/{name}", *more, *words.split()]
        self.folder.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
        done = subprocess.run(command, cwd=self.folder, env=environment(), **options)
        if done.returncode:
            lines = done.stderr.splitlines()
            said = " | ".join([line for line in lines if "Error" in line or "megalith: " in line][-3:] or lines[-5:])
            raise Failed(f"`{' '.join(command)}` ended with status {done.returncode}: {said}")


def environment() -> dict[str, str]:
    """One thread, one order of hashes, and nobody else's modules."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": ""}


# What the cases are made of


@functools.cache
def texts(side: Side) -> None:
    """In data/: documents that count upwards, documents of sentences that repeat a word, prose, and the words."""
    draw, data = random.Random(side.seed), side.folder / "data"
    data.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *(f"w{i}" for i in range(WORDS))]
    (data / "words.txt").write_text("\n".join(words))
    numbers, sentences, prose = [], [], []
    for _ in range(120):
        first = draw.randrange(WORDS)
        numbers.append(" ".join(str((first + i) % WORDS) for i in range(draw.randint(5, 40))))
        several = (f"w{(first + i) % 8} " * draw.randint(2, 8) for i in range(draw.randint(2, 7)))
        sentences.append(" ".join(f"{each.strip().capitalize()}." for each in several))
        letters = draw.choice(["etaoin shrdlu, ", "ётаоин ст. ", "日本語の文章。\n", "a\u0301e\u0300 🙂🚀 "])
        prose.append("".join(draw.choice(letters) for _ in range(draw.randint(0, 300))))
    for name, documents in {"numbers": numbers, "sentences": sentences, "prose": prose}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))


@functools.cache
def datasets(side: Side) -> None:
    """numbers and sentences as token ids, by the side's own tree."""
    texts(side)
    preprocess = "data preprocess --workers 1 --input data/{0}.jsonl --output-prefix data/{0}"
    side.run(preprocess.format("numbers") + " --tokenizer-type NullTokenizer --vocab-size 48 --append-eod")
    words = " --split-sentences --tokenizer-type BertWordPieceLowerCase --vocab-file data/words.txt"
    side.run(preprocess.format("sentences") + words)


@functools.cache
def trained(side: Side, form: str, layout: str = "one", flags: str = "") -> pathlib.Path:
    """The folder of a run of 20 steps."""
    datasets(side)
    (processes, split), name = LAYOUTS[layout], "-".join([form, layout, *flags.split()])
    side.run(f"pretrain {FORMS[form]} {SIZE} {RUN} {split} {flags} --seed {side.seed} --run-dir {name}", processes)
    return side.folder / name


def losses(side: Side, source: Side, form: str, layout: str, flags: str = "") -> Found:
    """All numbers that metrics.jsonl holds of each step and validation, as they are written: every bit of a float."""
    lines = (trained(side, form, layout, flags) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_float=str) for line in lines]
    return {f"step {each['step']}: {key}": str(each[key]) for each in records for key in each if key not in MEASURED}


def corpus(side: Side, source: Side, flags: str, text: str) -> Found:
    """The bytes of a preprocessed corpus."""
    texts(side)
    tokenizer = f"{source.folder}/tokenizer.json"
    if "HuggingFace" in flags and not pathlib.Path(tokenizer).exists():
        texts(source)
        source.run("data bpe --input data/prose.jsonl --vocab-size 300 --output tokenizer.json")
    flags = flags.format(tokenizer=tokenizer)
    side.run(f"data preprocess --input data/{text}.jsonl --output-prefix {text}-case --workers 2 {flags}")
    return {path.name: path.read_bytes() for path in sorted(side.folder.glob(f"{text}-case_*.[bi][id][nx]"))}


def exported(side: Side, source: Side, form: str, format: str, flags: str) -> Found:
    """The tensors and the texts of an exported folder."""
    name = f"{form}-{format}"
    side.run(f"checkpoint export {trained(source, form)} {name} --to {format} {flags}")
    return folder_contents(side.folder / name)


def generated(side: Side, source: Side, form: str, flags: str, load: str = "run") -> Found:
    """Each text; those of NullTokenizer are ids."""
    path, seed = trained(source, form), "" if "--beam" in flags or "--greedy" in flags else f"--seed {side.seed}"
    tokenizer = ""
    if load != "run":
        tokenizer = f"--tokenizer {path}/checkpoints/iter_0000020/tokenizer"
        path = source.folder / f"{form}-{load}"
        if not path.exists():
            exported(source, source, form, load, "")
    side.folder.mkdir(exist_ok=True)
    (side.folder / "prompts.txt").write_text("\n".join(PROMPTS if form != "t5" else QUESTIONS) + "\n")
    files = "--prompt-file prompts.txt --out-file texts.jsonl --overwrite"
    side.run(f"generate --load {path} {tokenizer} {files} --max-new-tokens 8 --device cpu {flags} {seed}")
    lines = (side.folder / "texts.jsonl").read_text().splitlines()
    return {f"text {number}": line for number, line in enumerate(lines, 1)}


def cases() -> dict[str, Callable[[Side, Side], Found]]:
    """Name -> what finds the results of a side, given whose runs are read."""
    made: dict[str, Callable[[Side, Side], Found]] = {}
    for form in FORMS:
        for layout in LAYOUTS:
            made[f"{form} {layout}"] = functools.partial(losses, form=form, layout=layout)
    for form, layout in zip(FORMS, COMPILED):
        made[f"{form} {layout} compile"] = functools.partial(losses, form=form, layout=layout, flags="--compile")
    subwords = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tokenizer} --append-eod --partitions 3"
    sentences = "--tokenizer-type BertWordPieceLowerCase --vocab-file data/words.txt --split-sentences"
    made["corpus documents"] = functools.partial(corpus, text="prose", flags=subwords)
    made["corpus sentences"] = functools.partial(corpus, text="sentences", flags=sentences)
    for form in FORMS:
        if form != "gpt-alibi":  # no family of Hugging Face has this form
            made[f"export huggingface {form}"] = functools.partial(exported, form=form, format="huggingface", flags="")
    for form, flags in MEGATRON.items():
        made[f"export megatron {form}"] = functools.partial(exported, form=form, format="megatron", flags=flags)
    for name, (form, flags) in GENERATION.items():
        made[f"generate {name}"] = functools.partial(generated, form=form, flags=flags)
    for load in ("huggingface", "megatron"):
        made[f"generate greedy {load}"] = functools.partial(generated, form="gpt-rotary", flags="--greedy", load=load)
    return made


# How they are compared


def folder_contents(folder: pathlib.Path) -> Found:
    """Every tensor of every file, and the bytes of files that hold none."""
    found: Found = {}
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name}: {key}": tensor for key, tensor in sorted(load_file(path).items())}
        elif path.suffix in (".pt", ".bin"):  # the trees wrote them just now, so they may be unpickled
            found |= dict(leaves(torch.load(path, map_location="cpu", weights_only=False), name))
        else:
            found[name] = path.read_bytes()
    return found


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor or text) of all that is nested in `value`."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, (dict, list, tuple)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(each, f"{name}: {key}")
    else:
        yield name, value if isinstance(value, torch.Tensor) else repr(value)


def difference(old: Found, new: Found) -> str | None:
    """The first thing that differs, both values, and how many differ; None where all is equal."""
    if not old and not new:
        return "neither has any result"
    names = [*old, *(name for name in new if name not in old)]
    differing = [name for name in names if name not in old or name not in new or not same(old[name], new[name])]
    if not differing:
        return None
    name = differing[0]
    values = [told(side[name]) if name in side else "nothing" for side in (old, new)]
    if name in old and name in new and isinstance(old[name], torch.Tensor):
        values[1] += distance(old[name], new[name])
    return f"{name}: old {values[0]}, new {values[1]} ({len(differing)} of {len(names)} differ)"


def same(old: Any, new: Any) -> bool:
    """Equal in every bit: a NaN equals itself, and 0 is not -0."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return type(old) is type(new) and old == new
    return old.dtype == new.dtype and old.shape == new.shape and bits(old) == bits(new)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of its elements in order."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def told(value: Any) -> str:
    """A value on a line."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{len(value)} bytes {value[:40]!r}" if isinstance(value, bytes) else str(value)[:200]


def distance(old: torch.Tensor, new: torch.Tensor) -> str:
    """How far tensors of one shape are apart."""
    if old.shape != new.shape:
        return ""
    apart = (old.double() - new.double()).abs()
    return f" with {int((apart != 0).sum())} other elements, by {apart.max().item():.3g} at most"


# The comparison


def compare(case: Callable[[Side, Side], Found], sides: list[Side], sources: list[Side]) -> str | None:
    """What differs, None where nothing does."""
    found = []
    for label, side, source in zip(("OLD", "NEW"), sides, sources):
        try:
            found.append(case(side, source))
        except Failed as error:
            return f"{label} failed: {error}"
    return difference(*found)


def described(tree: pathlib.Path) -> str:
    """The tree's commit, and that its commands run its own code; exits where they do not."""
    python = tree / ".venv/bin/python"
    if not python.exists():
        sys.exit(f"{tree}: no .venv/bin/python; it must be a source tree with its own environment")
    file = said(python, "-c", "import megalith; print(megalith.__file__)")
    if not pathlib.Path(file).resolve().is_relative_to(tree):
        sys.exit(f"{tree}: its .venv runs {file}; it must run the tree's own code. Install it: make -C {tree} install")
    commit = said("git", "-C", tree, "log", "-1", "--format=%h %s")
    changed = said("git", "-C", tree, "status", "--short", "megalith")
    return f"{commit[:80]}{', with changes' if changed else ''}"


def said(*command: Any) -> str:
    """What a command prints."""
    return subprocess.run(command, cwd="/", env=environment(), stdout=subprocess.PIPE, text=True).stdout.strip()


def main() -> int:
    """Compare, print, and 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="*", metavar="TREE", type=pathlib.Path, help="OLD and NEW, each with a .venv")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="cases with one of these in the name")
    parser.add_argument("--list", action="store_true", help="show the names of the cases")
    parser.add_argument("--mutate", action="store_true", help="another seed and text for NEW: every case must differ")
    args = parser.parse_args()
    chosen = {name: case for name, case in cases().items() if any(part in name for part in args.only)}
    if args.list:
        print("\n".join(chosen))
        return 0
    if len(args.trees) != 2 or not chosen:
        parser.error("two trees are needed, OLD and NEW" if chosen else "--only: no case is named so; see --list")
    trees = [tree.resolve() for tree in args.trees]
    print(f"{platform.machine()}, torch {torch.__version__}, {len(chosen)} cases", flush=True)
    print("".join(f"{label}: {described(tree)}\n" for label, tree in zip(("old", "new"), trees)), flush=True)
    began, differing = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="same_results_") as scratch:
        seeds = (1234, 4321 if args.mutate else 1234)
        folder = pathlib.Path(scratch)
        sides = [Side(tree, folder / label, seed) for tree, label, seed in zip(trees, ("old", "new"), seeds)]
        sources = [Side(trees[0], folder / f"source-{seed}", seed) for seed in seeds]
        for name, case in chosen.items():
            start = time.perf_counter()
            found = compare(case, sides, sources)
            differing += found is not None
            print(f"{name:34}{time.perf_counter() - start:5.0f} s  {found or 'equal'}", flush=True)
    print(f"\n{len(chosen) - differing} equal, {differing} not; {time.perf_counter() - began:.0f} s")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
