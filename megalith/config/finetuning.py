"""What follows from the section `finetuning`: the task's model, data and loss, what a run starts from, its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from megalith.common.registry import Registry, load
from megalith.config.architectures import ARCHITECTURES, architecture
from megalith.config.flags.text import flag, value_text
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig
from megalith.config.sections.data import INSTRUCTIONS

CORPORA = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_file_list")
DESCRIBED = "megalith.data.tasks.description:defaults"  # of a task that a YAML file describes
# Task -> a function of its name that gives the fields of RunConfig that follow from it ({"model_type": ...}), in which
# model_type, dataset and loss are those of a run whose --train-data and --valid-data are of this task.
TASKS = Registry(
    "task",
    {
        **dict.fromkeys(INSTRUCTIONS, "megalith.config.finetuning:instruction_defaults"),
        **dict.fromkeys(("nq", "ret-finetune-nq"), "megalith.config.finetuning:retrieval_defaults"),
        **dict.fromkeys(("cola", "mnli", "mrpc", "qnli", "qqp", "race", "rte", "sst2", "stsb"), DESCRIBED),
    },
)


def instruction_defaults(task: str) -> dict[str, Any]:
    """Of chats and completions: their dataset, with the loss that the model has anyway."""
    return {"dataset": task}


def retrieval_defaults(task: str) -> dict[str, Any]:
    """Of questions with passages: a bi-encoder."""
    return {"model_type": "ict", "dataset": "nq", "loss": "nq", "name": "nq"}


def task_defaults(task: str) -> dict[str, Any]:
    """The fields that follow from a task: a name (of any case, as Megatron's are in capitals), or a YAML file.

    Raises ConfigError where there is no such task.
    """
    if task.endswith((".yaml", ".yml")):
        return load(f"task {task!r}", DESCRIBED)(task)
    name = task if ":" in task else task.lower()
    return TASKS.find(name)(name)


def conclusions(values: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    """Fields that follow from those of the section `finetuning` among `values`, of what recipe, file and flags set.

    Raises ConfigError where the task is not known.
    """
    found: dict[str, Any] = {}
    task, epochs = values.get("task"), values.get("epochs")
    if task is not None:
        of_task = task_defaults(task)
        found = {name: value for name, value in of_task.items() if values.get(name) is None}
        found |= _instead(of_task, values, notices)
        if corpora := [name for name in CORPORA if values.get(name)]:
            notices.append(f"{' and '.join(map(flag, corpora))} has no effect: --train-data is read")
        if values.get("dataloader_type") == "cyclic":
            notices.append("--dataloader-type has no effect: the samples of a task are shuffled anew each epoch")
    if task is not None and "eval_iters" in values and values["eval_iters"]:
        notices.append("--eval-iters has no effect but for 0: each file of --valid-data is measured whole")
    length = values.get("retriever_seq_length")
    if length is not None and values.get("dataset", found.get("dataset")) == "nq":
        if values.get("seq_length", length) != length:
            notices.append(f"--retriever-seq-length {length} takes the place of --seq-length {values['seq_length']}")
        found["seq_length"] = length
    start = values.get("pretrained_checkpoint")
    if start is not None and values.get("load") in (None, start, values.get("save")):
        found |= {"load": start, "finetune": True}
    if epochs == 0:
        found["skip_train"] = True
    return found


def _instead(of_task: Mapping[str, Any], values: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    """What the task decides although `values` say otherwise, as the YAML of pretraining or of another task does.

    Lines name what was another task's. A user's own (module:name) stays.
    """
    given = values.get("model_type", RunConfig().model.model_type)
    record, wanted = architecture(given), of_task.get("model_type", given)
    builtin: dict[str, Iterable[Any]] = {name: fields()[name].metadata["names"] for name in ("dataset", "loss")}
    builtin["name"] = (*TASKS, *ARCHITECTURES)
    if given != wanted and given in ARCHITECTURES and (record.head_of or given) == architecture(wanted).head_of:
        builtin |= {"model_type": (given,), "num_classes": (RunConfig().model.num_classes,)}
    found = {
        name: value for name, value in of_task.items()
        if values.get(name) not in (None, value) and values[name] in builtin.get(name, ())
    }  # fmt: skip
    if "model_type" in found and record.head_of is None:
        notices.append(f"the model is {wanted}, a {given} with the head of the task")
    usual = {} if record.head_of else {"model_type": given, "dataset": record.dataset, "loss": record.loss}
    notices += [
        f"{flag(name)} is {found[name]}, as the task has it, and not {values[name]}"
        for name in ("model_type", "dataset", "loss") if name in found and values[name] != usual.get(name)
    ]  # fmt: skip
    return found


def completed(config: RunConfig) -> RunConfig:
    """The config with --pretrained-checkpoint as --load --finetune, and --epochs 0 as --skip-train."""
    set_values = {name: value for name, value in config.flat().items() if value is not None and name != "task"}
    return config.replace(**conclusions(set_values, []))


def in_samples(config: RunConfig, epoch: int, batch: int) -> RunConfig:
    """The config of a run measured in epochs, with its length and its schedule in samples.

    Samples, because the number of steps changes with the batch, and a run may be resumed with another one.
    epoch: samples of one. batch: the global batch.
    """
    s, total = config.schedule, round((config.finetuning.epochs or 0.0) * epoch)
    lengths: dict[str, Any] = {"train_samples": max(1, total)}
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        steps, samples = getattr(s, f"{name}_iters"), getattr(s, f"{name}_samples")
        lengths[f"{name}_samples"] = samples or (steps * batch if steps else samples)
        lengths[f"{name}_iters"] = 0 if name == "lr_warmup" else None
    return config.replace(**lengths)


def describe_length(config: RunConfig) -> str:
    """The length of a run measured in epochs, as text: 3 epochs."""
    epochs = config.finetuning.epochs
    return f"{value_text(epochs)} epoch{'s' * (epochs != 1)} of {flag('train_data')}"
