"""Rules of the section `finetuning`."""

from __future__ import annotations

from collections.abc import Iterator

from megalith.config.flags.text import Problem, Words, field_problem, flag, value_text
from megalith.config.run import RunConfig
from megalith.config.sections.data import CORPUS_DATASETS, INSTRUCTIONS, OF_FILES


def finetune_problems(config: RunConfig, corpus: bool = True) -> Iterator[Problem]:
    """What of a task, its data and its epochs cannot work together. corpus: whether data have to be named."""
    f, c = config.finetuning, config.checkpoint
    if f.task is None and config.data.dataset == "classification" and corpus:
        rule, cure = "must be named, as it says what the files hold", "Write --task mnli, or a YAML file of your own"
        yield field_problem(("task", "dataset"), "The task", None, rule, cure)
    if f.task is None:
        for name in ("train_data", "valid_data", "epochs"):
            if getattr(f, name) not in (None, []) and config.data.dataset in CORPUS_DATASETS:
                rule, cure = "is of a task, and there is none", "Name one with --task, or leave it out"
                yield field_problem((name, "task"), flag(name), getattr(f, name), rule, cure)
    if f.task is not None or config.data.dataset in OF_FILES:
        yield from _data(config)
    for name in ("train_iters", "train_samples"):
        if f.epochs is not None and getattr(config.schedule, name) is not None:
            rule = f"excludes {flag(name)}, because a run has one length"
            cure = f"Keep one; to drop the one that a recipe or file sets, write --epochs none or {flag(name)} none"
            found = Words(f"{value_text(f.epochs)}, and {flag(name)} {getattr(config.schedule, name)}")
            yield field_problem(("epochs", name), "--epochs", found, rule, cure)
    if f.epochs is not None and config.batch.rampup_batch_size:
        rule = "excludes --rampup-batch-size, because every batch of an epoch has the same size"
        found = Words(value_text(config.batch.rampup_batch_size))
        yield field_problem(("epochs", "rampup_batch_size"), "--epochs", found, rule, "Leave out one of the two")
    prompts = config.data.dataset in INSTRUCTIONS and not config.data.assistant_only_loss
    if prompts and config.model.architecture.decoder:
        rule = f"must be true for a {config.model.model_type}, whose decoder reads nothing but answers"
        cure = "Leave --no-assistant-only-loss out"
        yield field_problem(("assistant_only_loss",), "--assistant-only-loss", False, rule, cure)
    if f.pretrained_checkpoint is not None and c.load not in (None, f.pretrained_checkpoint, c.save):
        rule = "excludes --load of another folder, because a run starts from one"
        cure = "Keep --pretrained-checkpoint for a new run; a run that is in --save is resumed without either"
        found = Words(f"{f.pretrained_checkpoint}, and --load {c.load}")
        yield field_problem(("pretrained_checkpoint", "load"), "--pretrained-checkpoint", found, rule, cure)


def _data(config: RunConfig) -> Iterator[Problem]:
    f, training = config.finetuning, not config.validation.skip_train
    if training and not f.train_data:
        rule, cure = "must name the files to train on", "Write --train-data FILE, or --epochs 0 to validate alone"
        yield field_problem(("train_data",), "--train-data", None, rule, cure)
    if not training and not f.valid_data:
        rule = "must name the files to validate on, because nothing is trained"
        yield field_problem(("valid_data",), "--valid-data", None, rule, "Write --valid-data FILE")
