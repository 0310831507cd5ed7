"""Whether a config can work: every rule at once, before torch is imported or a process group starts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megalith.common.errors import ConfigError
from megalith.common.extras import missing_package
from megalith.config.architectures import architecture
from megalith.config.checks.finetune import finetune_problems
from megalith.config.checks.lora import lora_problems
from megalith.config.checks.masking import masking_problems
from megalith.config.checks.model import model_problems
from megalith.config.checks.parallel import parallel_problems
from megalith.config.checks.schedule import schedule_problems
from megalith.config.flags.text import Problem, Words, around, fail, field_problem, flag, multiples, nearest, value_text
from megalith.config.flags.values import TYPE_NAMES, fields
from megalith.config.run import RunConfig
from megalith.config.sections.data import CORPUS_DATASETS, missing_tokenizer_files, split_fractions

TOKENIZER_PACKAGES = {  # tokenizer -> the package that it needs
    **dict.fromkeys(("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"), "sentencepiece"),
    "TikTokenizer": "tiktoken",
}
BELOW_ONE = (
    "hidden_dropout", "attention_dropout", "classifier_dropout", "lora_dropout", "lr_warmup_fraction", "adam_beta1",
    "adam_beta2", "mask_prob",
)  # fmt: skip
NEEDS_CHECKPOINT = ("finetune", "no_load_optim", "ckpt_step", "skip_train")


def check(config: RunConfig, world_size: int = 1, *, data: bool = True) -> None:
    """Raise one ConfigError that holds every problem; return where there is none.

    world_size: number of processes. data: whether a corpus and a tokenizer are needed.
    """
    fail(each.text for each in find_problems(config, world_size, data=data))


def find_problems(
    config: RunConfig, world_size: int = 1, *, data: bool = True, corpus: bool = True, one_step: bool = False
) -> list[Problem]:
    """Every reason why this config cannot work on `world_size` processes.

    A rule is skipped where a field that it needs is wrong itself.
    data: whether the section data is checked. corpus: whether a corpus and a tokenizer have to be named.
    one_step: a single step of the full batch is meant, so that a run's length, schedule and files are not checked.
    """
    found = [*_limits(config), *_architecture(config)]
    wrong = {field for each in found for field in each.fields}
    config = config.replace(**{name: fields()[name].default for name in wrong})  # the rules below may divide
    if one_step:
        config = config.replace(rampup_batch_size=[])
    rules = [*model_problems(config), *parallel_problems(config, world_size), *recompute_problems(config)]
    rules += lora_problems(config)
    if not one_step:
        rules += [*schedule_problems(config), *_files(config), *finetune_problems(config, data and corpus)]
    if data:
        rules += [*_data(config, corpus), *masking_problems(config), *_packages(config)]
    return found + [each for each in rules if not wrong.intersection(each.fields)]


def _limits(config: RunConfig) -> Iterator[Problem]:
    """Each value against its own limits."""
    for name, value in config.flat().items():
        if wrong := violated_limit(name, value):
            yield field_problem((name,), flag(name), value, *wrong)


def _architecture(config: RunConfig) -> Iterator[Problem]:
    """A user's model (module:name) that cannot be imported."""
    try:
        if ":" in config.model.model_type:
            architecture(config.model.model_type)
    except ConfigError as error:
        yield Problem(("model_type",), str(error))


def violated_limit(name: str, value: Any) -> tuple[str, str] | None:
    """(rule, cure) where `value` is not allowed for field `name`; None where it is.

    Checked are the type, the smallest and the largest value, the allowed choices, and that numbers are finite.
    """
    field = fields()[name]
    smallest, choices = field.metadata["minimum"], field.metadata["choices"]
    default, or_default = "", ""
    if field.default not in (None, []):
        default = f" (the default is {value_text(field.default)})"
        or_default = f"; the default is {value_text(field.default)}"
    if value is None:
        return None if field.optional else (f"must have a value{default}", f"Give {flag(name)} one")
    if not _has_type(value, field.kind) or (
        field.kind is list and not all(_has_type(item, field.item) for item in value)
    ):
        return f"must be {TYPE_NAMES[field.kind]}{default}", f"Give {flag(name)} such a value"
    if choices and value not in choices:
        near = nearest(str(value), choices) or nearest(str(value).lower(), choices) or choices[0]
        return f"must be one of {', '.join(choices)}", f"Write {flag(name)} {near}"
    if field.metadata["names"] and value not in field.metadata["names"] and ":" not in value:
        names = field.metadata["names"]
        near = nearest(value, names) or nearest(value.lower(), names) or field.default or names[0]
        return f"must be one of {', '.join(names)}, or module:name of your own", f"Write {flag(name)} {near}"
    if field.kind is float and not math.isfinite(value):
        return "must be a finite number", f"Write one after {flag(name)}{or_default}"
    if field.kind is int and field.section == "model" and value >= 2**31:
        return "must be below 2 to the 31st", f"Write a smaller number after {flag(name)}"
    if smallest is not None and value < smallest:
        if name in ("train_iters", "train_samples"):
            return "must be at least 1, or 0 with --skip-train", f"Write {flag(name)} 1 or more{or_default}"
        cure = f"Write {flag(name)} {value_text(smallest)} or more{or_default}"
        return f"must be at least {value_text(smallest)}", cure
    if name == "seed" and value >= 2**32:
        return "must be below 2 to the 32nd, as Megatron's seeds of sample orders", "Write a smaller one"
    if (name in BELOW_ONE and value >= 1.0) or (name == "rotary_percent" and value > 1.0):
        rule = "must be a fraction below 1" if name in BELOW_ONE else "must be a fraction, at most 1"
        return rule, f"Write {flag(name)} with a number between 0 and 1"
    return None


def _has_type(value: Any, kind: type) -> bool:
    """Whether a value has the type of its field; whole numbers are numbers, but true and false are not."""
    return isinstance(value, bool) == (kind is bool) and isinstance(value, (int, float) if kind is float else kind)


def recompute_problems(config: RunConfig) -> Iterator[Problem]:
    """What in the section recompute cannot work together."""
    r = config.recompute
    if r.recompute_activations and r.recompute_granularity == "full":
        both = ("recompute_activations", "recompute_granularity")
        rule = "means --recompute-granularity selective"
        found = Words("--recompute-granularity full")
        yield field_problem(both, "--recompute-activations", found, rule, "Leave out one of the two")
    elif r.granularity == "full" and r.recompute_method is None:
        cure = "Write --recompute-method uniform (or block)"
        both, rule = ("recompute_granularity", "recompute_method"), "needs a --recompute-method where it is full"
        yield field_problem(both, "--recompute-granularity", Words("none"), rule, cure)
    elif r.granularity != "full" and r.recompute_method is not None:
        cure = f"Write --recompute-granularity full --recompute-method {r.recompute_method}, or leave the method out"
        both, rule = ("recompute_granularity", "recompute_method"), "is for --recompute-granularity full alone"
        yield field_problem(both, "--recompute-method", r.recompute_method, rule, cure)
    layers = config.model.num_layers
    if layers and r.granularity == "full" and r.recompute_num_layers > layers:
        both, rule = ("recompute_num_layers", "num_layers"), f"must be at most --num-layers, {layers}"
        yield field_problem(both, "--recompute-num-layers", r.recompute_num_layers, rule, "Write a smaller number")


def needs_checkpoint(config: RunConfig) -> str | None:
    """The flag that has a meaning only where a checkpoint is loaded, if one is set."""
    values = config.flat()
    set_names = (
        name for name in NEEDS_CHECKPOINT if values[name] is not None and values[name] is not False
    )  # step 0 is one too
    name = next(set_names, None)
    if name == "skip_train" and config.finetuning.epochs == 0:
        return "--epochs 0"
    return None if name is None else flag(name)


def _files(config: RunConfig) -> Iterator[Problem]:
    c = config.checkpoint
    if c.keep_every and c.save_interval and c.keep_every % c.save_interval:
        rule = f"must be a multiple of --save-interval, {c.save_interval}, "
        rule += "or some of its multiples have no checkpoint to keep"
        cure = f"Write --keep-every {around(c.keep_every, multiples(c.keep_every, c.save_interval))}"
        yield field_problem(("keep_every", "save_interval"), "--keep-every", c.keep_every, rule, cure)
    given = needs_checkpoint(config)
    if given and not (c.load or c.save or config.logging.run_dir):
        rule = "needs a checkpoint to load"
        cure = (
            "Name its folder with --load" if config.finetuning.task is None else "Name it with --pretrained-checkpoint"
        )
        yield field_problem((*NEEDS_CHECKPOINT, "load"), given, Words("none"), rule, cure)
    if c.use_checkpoint_args and not c.load:
        both, rule = ("use_checkpoint_args", "load"), "needs a checkpoint to read"
        yield field_problem(both, "--use-checkpoint-args", Words("no --load"), rule, "Name its folder with --load")


def _packages(config: RunConfig) -> Iterator[Problem]:
    """Packages that are not installed: reported now, and not after the corpora were read."""
    kind = config.data.tokenizer_type
    if kind in TOKENIZER_PACKAGES and (fault := missing_package(TOKENIZER_PACKAGES[kind], kind)):
        yield Problem(("tokenizer_type",), fault)
    if config.logging.tensorboard_dir and (fault := missing_package("tensorboard", "--tensorboard-dir")):
        yield Problem(("tensorboard_dir",), fault)


def _data(config: RunConfig, corpus: bool) -> Iterator[Problem]:
    d = config.data
    apart = [name for name in ("train_data_path", "valid_data_path", "test_data_path") if getattr(d, name)]
    given = [name for name in ("data_path", "data_file_list") if getattr(d, name)] + apart[:1]
    if apart and "train_data_path" not in apart and not config.validation.skip_train:
        rule = "needs --train-data-path beside it, because a run that trains needs data"
        yield field_problem(("train_data_path",), flag(apart[0]), None, rule, "Write --train-data-path too")
    elif d.dataset in CORPUS_DATASETS and not given and corpus:
        cure = "Write --data-path PREFIX, the name without .bin and .idx that `megalith data preprocess` gave"
        yield field_problem(("data_path",), "--data-path", None, "must name the corpus of the dataset", cure)
    elif d.dataset == "retro" and not (d.retro_workdir or d.retro_no_retrieval) and corpus:
        cure = "Write --retro-workdir FOLDER, which `megalith retro` makes, or --retro-no-retrieval"
        rule = "must name the folder with the neighbours of the samples"
        yield field_problem(("retro_workdir",), "--retro-workdir", None, rule, cure)
    elif len(given) > 1:
        cure = "Keep one; --data-path and --data-file-list go with --split, "
        cure += "the others name training, validation and test"
        found = Words(" and ".join(map(flag, given)))
        yield field_problem(tuple(given), "The corpus", found, "must be named in one way", cure)
    if d.tokenizer_type is None and corpus:
        cure = "Write --vocab-file FILE --merge-file FILE (GPT-2's), or --tokenizer-model tokenizer.json"
        rule = "must be the one that the data was made with, because it has the vocabulary"
        yield field_problem(("tokenizer_type", "vocab_file"), "The tokenizer", None, rule, cure)
    for name in missing_tokenizer_files(d) if corpus else ():
        rule = f"must be given, because {d.tokenizer_type} is made from it"
        cure = f"Write {flag(name)} FILE, or name another --tokenizer-type"
        yield field_problem((name, "tokenizer_type"), flag(name), None, rule, cure)
    try:
        split_fractions(d.split)
    except ConfigError as error:
        yield Problem(("split",), str(error))
