"""The steps of `megalith detoxify`, each made from files and into files (Wang et al., 2022, arXiv 2202.04173: SGEAT).

They are those of Megatron's examples/detxoify_lm. What another verb does, that verb is called for, and its command is
printed: generate, data preprocess, pretrain, evaluate.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megalith.checkpoint.store import folder as checkpoints
from megalith.common.errors import ConfigError, DataError, MegalithError, problem
from megalith.common.locks import locked
from megalith.common.urls import is_url
from megalith.config.flags.loading import from_yaml
from megalith.config.flags.text import Words, choose, fail, flag
from megalith.config.flags.verbs import read_pretrain
from megalith.data.indexed.reader import IndexedDataset
from megalith.evaluation.texts import read_texts as read_held_texts
from megalith.generation.model import most_positions
from megalith.workflows.detoxify.options import STEPS, DetoxifyOptions
from megalith.workflows.detoxify.report import write_report
from megalith.workflows.detoxify.scorers import build_scorer, score
from megalith.workflows.detoxify.state import State, Step
from megalith.workflows.detoxify.texts import (
    Record,
    cleanest,
    read_continuations,
    read_prompts,
    read_records,
    read_texts,
    scored,
    write_records,
)
from megalith.workflows.detoxify.verbs import Verbs
from megalith.workflows.run_config import checkpoint_config, checkpoint_tokenizer

MAX_NEW_TOKENS = 1000  # Megatron's
MODELS = ("before", "after")
CHECKPOINTS = 4  # that training writes, to be resumed from


def detoxify(
    options: DetoxifyOptions, verbs: Verbs, *, steps: Sequence[str] = (), overwrite: bool = False,
    dry_run: bool = False, notice: Callable[[str], None] = lambda line: None,
) -> None:  # fmt: skip
    """Do the steps of these names (none: all) in their order; those that are done are passed over.

    After a kill at any time the same call resumes, with the same result. overwrite: a step that would now be another is
    done anew. Raises ConfigError for options that cannot work, DataError for files that cannot be read and for steps
    that would replace what is there, MegalithError where a verb fails.
    """
    options.check_required()
    for name in steps:
        choose("step", name, STEPS)
    steps, folder = steps or STEPS, pathlib.Path(options.output)
    pipeline = Pipeline(options, verbs, scores=bool({"score", "measure"}.intersection(steps)))
    chosen = [step for step in pipeline.steps() if step.name in steps]
    if dry_run:
        state = State(folder, notice)
        print("\n".join(map(state.describe, chosen)))
        return
    with locked(folder, inside=True, notice=notice):
        state = State(folder, notice)
        for step in chosen:
            state.run(step, overwrite)


class Pipeline:
    """The steps, and what each does. What the user's files hold is read here, before anything slow begins."""

    def __init__(self, options: DetoxifyOptions, verbs: Verbs, scores: bool = True):
        """scores: whether the scorer is needed."""
        self.options, self.verbs, self.folder = options, verbs, pathlib.Path(options.output)
        fail(each.text for each in read_pretrain(shlex.split(options.train_flags)).problems)
        for path in options.samples:
            read_texts(path, "--samples")
        for path in options.valid_data:
            read_held_texts(path, "text", None)
        self.prompts = read_prompts(options.prompt_file)
        if not is_url(options.load) and not pathlib.Path(options.load).exists():
            raise DataError(
                problem("--load", options.load, "must name a file or folder that exists", "Correct the path")
            )
        self.config = from_yaml(checkpoint_config({"load": options.load}))
        if self.config.model.decoder_layers or not self.config.model.causal:
            rule = "must be decoder-only, and read from left to right"
            raise ConfigError(problem("--load", self.config.model.model_type, rule, "Name a GPT"))
        self.limit = most_positions(self.config.model)
        self.scorer = build_scorer(options) if scores else None

    def steps(self) -> list[Step]:
        """All steps, in their order."""
        o, at = self.options, self.folder
        load, model = {"--load": o.load}, {"model": at / "model"}
        held = {f"--valid-data {path}": path for path in o.valid_data}
        judge = {"--scorer-path": o.scorer_path} if o.scorer_path else {}
        how = self.settings("scorer", "scorer_label")
        texts = self.settings("max_new_tokens", "top_p", "temperature", "dtype", "seed", "samples_per_file")
        given = {f"--samples {path}": path for path in o.samples}
        return [
            Step(
                name="generate", inputs=given or load, outputs=["generated"], work=self.generate,
                settings={} if given else {"num_samples": o.num_samples, **texts},
            ),
            Step(
                name="score", inputs={"generated": at / "generated", **judge}, outputs=["scored"], settings=how,
                work=functools.partial(self.score, "generated", "scored", read_texts),
            ),
            Step(
                name="filter", inputs={"scored": at / "scored"}, outputs=["kept.jsonl"], work=self.filter,
                settings=self.settings("keep_fraction", "seed"),
            ),
            Step(
                name="preprocess", inputs={"kept.jsonl": at / "kept.jsonl", **load}, work=self.preprocess, settings={},
                outputs=["kept_text_document.bin", "kept_text_document.idx", "kept_preprocess.json"],
            ),
            Step(
                name="finetune", inputs={"kept_text_document.bin": at / "kept_text_document.bin", **load},
                outputs=["model"], work=self.finetune,
                settings=self.settings(
                    "seq_length", "micro_batch_size", "global_batch_size", "train_iters", "lr", "train_flags"
                ),
            ),
            Step(
                name="continue", inputs={"--prompt-file": o.prompt_file, **load, **model}, outputs=["continued"],
                work=self.continue_prompts,
                settings=texts | self.settings("continuations", "continuation_tokens"),
            ),
            Step(
                name="measure", inputs={"continued": at / "continued", **judge, **held, **load, **model},
                outputs=["measured"], work=self.measure, settings=how | self.settings("seq_length", "dtype"),
            ),
            Step(
                name="report", inputs={"scored": at / "scored", "measured": at / "measured"},
                outputs=["report.json", "report.html"], work=self.report,
                settings=self.settings("threshold", "keep_fraction", "continuations"),
            ),
        ]  # fmt: skip

    def settings(self, *names: str) -> dict[str, Any]:
        """Options by name."""
        return {name: getattr(self.options, name) for name in names}

    def generate(self) -> None:
        """Texts without a prompt, a file for each seed; or those that are given."""
        o = self.options
        for number, path in enumerate(o.samples):
            texts = read_texts(path, "--samples")
            write_records(self.folder / "generated" / f"{number:05}.jsonl", ({"text": text} for text in texts))
        if o.samples:
            return
        longest = MAX_NEW_TOKENS if self.limit is None else min(MAX_NEW_TOKENS, self.limit - 1)
        for number, first in enumerate(range(0, o.num_samples, o.samples_per_file)):
            count = min(o.samples_per_file, o.num_samples - first)
            words = ["--prompt", "", "--num-samples", count, "--max-new-tokens", o.max_new_tokens or longest]
            self.write_texts("generated", f"{number:05}", o.load, number, words)

    def write_texts(self, folder: str, name: str, load: str, number: int, words: list[object]) -> None:
        """A file of texts, which is whole where it is there."""
        o, path = self.options, self.folder / folder / f"{name}.jsonl"
        if path.exists():
            return
        path.parent.mkdir(exist_ok=True)
        self.verbs(
            "generate", "--load", load, *words, "--seed", o.seed + number, "--top-p", o.top_p, "--temperature",
            o.temperature, "--batch-size", o.batch_size, "--dtype", o.dtype, "--device", o.device, "--out-file", path,
        )  # fmt: skip

    def score(self, source: str, target: str, read: Callable[[pathlib.Path, str], list[str]]) -> None:
        """A score for each text that `read` finds in a folder's files, in files of the same names."""
        assert self.scorer is not None
        for path in sorted((self.folder / source).glob("*.jsonl")):
            if (made := self.folder / target / path.name).exists():
                continue
            texts = read(path, source)
            write_records(made, map(scored, texts, score(self.scorer, texts, self.options.scorer)))

    def read_scored(self, folder: str, names: str = "*") -> list[Record]:
        """The lines of a folder's files."""
        paths = sorted((self.folder / folder).glob(f"{names}.jsonl"))
        return [record for path in paths for record in read_records(path, folder, dict, "must be a scored text")]

    def filter(self) -> None:
        """The cleanest of the scored texts."""
        kept = cleanest(self.read_scored("scored"), self.options.keep_fraction, self.options.seed)
        write_records(self.folder / "kept.jsonl", kept)

    def preprocess(self) -> None:
        """Tokens of what is kept, by the model's own tokenizer."""
        words = list[object]()
        for name, value in checkpoint_tokenizer({"load": self.options.load}).items():
            if value not in (None, (), [], 0, False):
                words += [flag(name), *(value if isinstance(value, (list, tuple)) else [value])]
        source, target = self.folder / "kept.jsonl", self.folder / "kept"
        self.verbs("data", "preprocess", "--input", source, "--output-prefix", target, *words, "--append-eod")

    def finetune(self) -> None:
        """The model, trained further on what is kept."""
        o, data = self.options, self.folder / "kept_text_document"
        length = o.seq_length or self.config.data.seq_length or self.limit
        if length is None:
            rule = "must be given, because the positions of this model have no limit"
            raise ConfigError(
                problem("--seq-length", Words("nothing"), rule, "Give the length that it was trained with")
            )
        tokens = IndexedDataset(str(data)).num_tokens
        steps = o.train_iters or max(1, -(-tokens // (length * o.global_batch_size)))
        model = self.folder / "model"
        self.verbs(
            "pretrain", self.config.model.model_type, "--use-checkpoint-args", "--load", o.load, "--save", model,
            "--finetune", "--data-path", data, "--split", "100,0,0", "--seq-length", length,
            "--micro-batch-size", o.micro_batch_size, "--global-batch-size", o.global_batch_size,
            "--train-iters", steps, "--lr", o.lr, "--lr-decay-style", "constant", "--weight-decay", 0.1,
            "--adam-beta2", 0.95, "--clip-grad", 1.0, "--save-interval", max(1, steps // CHECKPOINTS),
            "--eval-iters", 0, "--device", o.device, *shlex.split(o.train_flags),
        )  # fmt: skip
        made, wanted = checkpoints.latest(model), from_yaml(checkpoint_config({"load": model})).schedule.train_iters
        if made is None or (wanted is not None and made < wanted):
            raise MegalithError(f"Training ended at step {made} of {wanted}. Give the same command again to resume it.")

    def continue_prompts(self) -> None:
        """Continuations of each prompt by both models, of so many prompts a file that it has samples_per_file."""
        o = self.options
        for name, load in zip(MODELS, (o.load, str(self.folder / "model"))):
            for number, prompts in enumerate(self.prompt_files()):
                asked = self.folder / "continued" / "prompts" / f"{number:05}.jsonl"
                write_records(asked, ({"prompt": prompt} for prompt in prompts))
                words = ["--prompt-file", asked, "--num-samples", o.continuations]
                words += ["--max-new-tokens", o.continuation_tokens]
                self.write_texts("continued", f"{name}-{number:05}", load, number, words)

    def prompt_files(self) -> Iterator[list[str]]:
        """The prompts of each file of continuations."""
        size = max(1, self.options.samples_per_file // self.options.continuations)
        for first in range(0, len(self.prompts), size):
            yield self.prompts[first : first + size]

    def measure(self) -> None:
        """Scores of the continuations alone, without the prompts; perplexity of the held texts, by both models."""
        o = self.options
        self.score("continued", "measured", read_continuations)
        words = [] if o.seq_length is None else ["--seq-length", o.seq_length]
        self.verbs(
            "evaluate", "ppl", o.load, self.folder / "model", "--valid-data", *o.valid_data, *words, "--dtype", o.dtype,
            "--device", o.device, "--json", self.folder / "measured" / "perplexity.json", "--overwrite",
        )  # fmt: skip

    def report(self) -> None:
        """Numbers and a page."""
        samples = self.read_scored("scored")
        continued = {name: self.read_scored("measured", f"{name}-*") for name in MODELS}
        about = {each.name: getattr(self.options, each.name) for each in dataclasses.fields(self.options)}
        write_report(self.folder, self.options, samples, continued, about)
