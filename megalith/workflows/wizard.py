"""A few questions on standard input, and the config that the answers make: `megalith config`. No torch."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
from typing import Any

from megalith import recipes
from megalith.common.errors import ConfigError
from megalith.common.questions import Questions
from megalith.config.batch_math import check_length, data_parallel_size, global_batch
from megalith.config.checks.checks import find_problems
from megalith.config.checks.parallel import CP, PP, TP, layouts
from megalith.config.flags.loading import complete, from_yaml
from megalith.config.flags.text import Problem, fail, flag, value_text
from megalith.config.flags.values import convert, fields
from megalith.config.run import RunConfig

ONE_PROCESS: dict[str, Any] = {
    TP: 1,
    PP: 1,
    CP: 1,
    "sequence_parallel": False,
    "pipeline_schedule": "auto",
    "num_layers_per_virtual_pipeline_stage": None,
    "data_parallel_replicas": 1,
    "data_parallel_sharding": "none",
    "use_distributed_optimizer": False,
}
FILES = {  # dataset -> what its tokenizer is made from
    "gpt": "tokenizer.json, or vocabulary and merges: vocab.json merges.txt",
    "bert": "vocab.txt of BERT, or a tokenizer.json that has [CLS], [SEP], [PAD] and [MASK]",
    "t5": "vocab.txt of BERT, a sentencepiece .model, or a tokenizer.json",
}


@dataclasses.dataclass(frozen=True)
class Answers:
    """A config that can work, and the processes that it is for."""

    config: RunConfig
    processes: int
    per_machine: int


def next_commands(answers: Answers, file: str) -> str:
    """What is printed after the config was written into `file`: the commands to type next."""
    command = f"-m megalith pretrain {answers.config.model.model_type} --config {shlex.quote(file)}"
    machines, without_launcher = answers.processes // answers.per_machine, command.removeprefix("-m ")
    launch = f"--nproc-per-node {answers.per_machine} {command}"
    if machines == 1:
        return f"wrote {file}; next:\n  {without_launcher if answers.processes == 1 else f'torchrun {launch}'}"
    return (
        f"wrote {file}; to check it, on any machine:\n  {without_launcher} --dry-run\n"
        f"next, on each of {machines} machines, with the name of one of them for FIRST:\n"
        f"  torchrun --nnodes {machines} --rdzv-backend c10d --rdzv-endpoint FIRST:29500 {launch}"
    )


class FieldQuestions(Questions):
    """Questions on fields of a config too."""

    def field(self, config: RunConfig, name: str, what: str = "", default: Any = None) -> RunConfig:
        """The config with an answer for this field, of the field's type."""
        known = config.flat()[name] if default is None else default
        field = fields()[name]
        shown = "" if known in (None, []) else str(known).lower() if isinstance(known, bool) else value_text(known)
        while True:
            text = self.text(f"{flag(name)}: {what or field.metadata['help']}", shown)
            value, field_problem = convert(field, text if text or not field.optional else None, flag(name))
            if field_problem is None:
                return config.replace(**{name: value})
            print(f"  {field_problem.text}")
            if self.ended:
                return config


def ask() -> Answers:
    """Ask everything; what cannot work is asked again. Where the input has ended it is a ConfigError instead."""
    questions = FieldQuestions()
    name = _recipe(questions)
    text = recipes.text(name)
    config = from_yaml(text, f"recipe {name}")
    kind = config.model.architecture.dataset
    prefix = "dataset prefix, as `megalith data preprocess` names it"
    if config.data.data_file_list:
        config = questions.field(config, "data_file_list")
    else:
        config = questions.field(
            config, "data_path", prefix if kind == "gpt" else f"{prefix} with --split-sentences (..._text_sentence)"
        )
    config = config.replace(**_tokenizer(questions, kind))
    for field in (
        "name",
        "train_iters" if config.schedule.train_samples is None else "train_samples",
        "micro_batch_size",
    ):
        config = questions.field(config, field)
    processes = per_machine = questions.number("processes", recipes.about(text).get("processes", 1))
    if processes > 1:
        per_machine, config = _layout(questions, config, processes)
    else:
        config = config.replace(**ONE_PROCESS)
    values = {field: value for field, value in config.flat().items() if value != fields()[field].default}
    config = complete(values, [])
    while problems := find_problems(config, processes) or _too_short(config, processes):
        if questions.ended:
            fail(each.text for each in problems)
        print("\nthis cannot work yet:" + "".join(f"\n  {each.text}" for each in problems))
        for field in dict.fromkeys(field for each in problems for field in each.fields):
            config = questions.field(config, field, default=_proposal(config, field, processes))
    return Answers(config, processes, per_machine)


def _recipe(questions: Questions) -> str:
    print("recipes to start from:")
    for name in recipes.names():
        print(f"  {name:24} {recipes.about(recipes.text(name))['summary']}")
    while (name := questions.text("recipe", "cpu-tiny")) not in recipes.names():
        print(f"  there is no recipe {name!r}")
    return name


def _tokenizer(questions: Questions, kind: str) -> dict[str, str]:
    """Fields of the tokenizer that the files mean; none at the end of the input."""
    while True:
        files = questions.text(FILES[kind]).split()
        suffixes = [pathlib.Path(file).suffix for file in files]
        if not files:
            return {}
        if len(files) == 2 and kind == "gpt":
            return {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": files[0], "merge_file": files[1]}
        if suffixes == [".txt"] and kind != "gpt":
            case = questions.choice("vocabulary of text whose case is", ("lowered", "kept"), "lowered")
            return {
                "tokenizer_type": f"BertWordPiece{'LowerCase' if case == 'lowered' else 'Case'}",
                "vocab_file": files[0],
            }
        if suffixes == [".model"]:
            types = ("GPTSentencePieceTokenizer", "Llama2Tokenizer") if kind == "gpt" else ("SentencePieceTokenizer",)
            known = (
                types[0]
                if len(types) == 1
                else questions.choice("type (Llama2Tokenizer begins each text with BOS)", types, types[0])
            )
            return {"tokenizer_type": known, "tokenizer_model": files[0]}
        if (
            len(files) == 1
            and suffixes != [".txt"]
            and not (suffixes == [".json"] and "vocab" in pathlib.Path(files[0]).name)
        ):
            return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": files[0]}
        print(f"  a {kind} takes {FILES[kind]}; found {' '.join(files)!r}")


def _too_short(config: RunConfig, processes: int) -> list[Problem]:
    """The problem of a run without a step, of a config that has no other."""
    try:
        check_length(config, data_parallel_size(config, processes))
        return []
    except ConfigError as error:
        return [Problem(("train_iters" if config.schedule.train_samples is None else "train_samples",), str(error))]


def _proposal(config: RunConfig, field: str, processes: int) -> Any:
    """A value of `field` with which the config fits that many processes; None where another field decides."""
    copy, s = config.parallel.model_parallel_size, config.schedule
    if field in ("lr_warmup_iters", "lr_warmup_samples"):
        return min(config.flat()[field], (s.train_iters or s.train_samples or 1) // 10)
    if field in (TP, PP, CP):
        return next((sizes[(TP, PP, CP).index(field)] for sizes in layouts(config, processes, count=1)), None)
    if field not in ("global_batch_size", "rampup_batch_size", "train_samples") or processes % copy:
        return None
    if field == "train_samples":
        return max(s.train_samples or 0, global_batch(config, processes // copy))
    unit, ramp = (config.batch.micro_batch_size or 1) * (processes // copy), config.batch.rampup_batch_size
    if field == "global_batch_size":
        return -(-(config.batch.global_batch_size or unit) // unit) * unit
    if unit >= (config.batch.global_batch_size or unit):
        return []  # a batch that small cannot be ramped up to on so many processes
    return [unit, unit, min(ramp[2], s.train_samples or ramp[2])] if len(ramp) == 3 else None


def _layout(questions: FieldQuestions, config: RunConfig, processes: int) -> tuple[int, RunConfig]:
    """(processes on a machine, the config with the answers that several processes need)."""
    fitting = max(n for n in range(1, 9) if processes % n == 0)
    per_machine = questions.number("processes on each machine", fitting, divides=processes)
    sizes = layouts(config, processes, count=processes**3)
    for index, name in enumerate((TP, PP, CP)):
        config = questions.field(config, name, default=sizes[0][index] if sizes else None)
        sizes = [each for each in sizes if each[index] == getattr(config.parallel, name)]
    split = config.parallel.tensor_model_parallel_size > 1
    config = questions.field(config, "sequence_parallel") if split else config.replace(sequence_parallel=False)
    if config.parallel.pipeline_model_parallel_size == 1:
        config = config.replace(pipeline_schedule="auto", num_layers_per_virtual_pipeline_stage=None)
    p, r = config.parallel, config.recompute
    if processes > p.model_parallel_size:
        about = "sharded over the data-parallel processes (full: parameters too)"
        sharding = questions.choice(about, fields()["data_parallel_sharding"].metadata["choices"], p.sharding)
        config = config.replace(data_parallel_sharding=sharding, use_distributed_optimizer=False)
    formats = {
        "float32": {"fp16": False, "bf16": False},
        "bf16": {"fp16": False, "bf16": True},
        "fp16": {"fp16": True, "bf16": False},
    }
    known = "fp16" if config.precision.fp16 else "bf16" if config.precision.bf16 else "float32"
    config = config.replace(**formats[questions.choice("number format", tuple(formats), known)])
    recomputed = questions.choice(
        "recomputed in the backward pass", ("none", "selective", "full"), r.granularity or "none"
    )
    method = (r.recompute_method or "uniform") if recomputed == "full" else None
    config = config.replace(
        recompute_activations=False,
        recompute_granularity=None if recomputed == "none" else recomputed,
        recompute_method=method,
    )
    return per_machine, questions.field(config, "clip_grad")
