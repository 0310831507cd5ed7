"""What follows from the section `finetuning`: the task's model, data and loss, what a run starts from, its length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megalith.common.registry import Registry, load
from megalith.config.architectures import architecture
from megalith.config.flags.text import flag, value_text
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
        found |= _head_for_its_base(of_task, values, notices)
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


def _head_for_its_base(of_task: Mapping[str, Any], values: Mapping[str, Any], notices: list[str]) -> dict[str, Any]:
    """The task's model, where a file of pretraining has the one that it is a head on, with its data and loss.

    Of a task without a model of its own its data, where the file has the model's usual ones.
    """
    if "model_type" not in of_task:
        usual_data = architecture(values.get("model_type", RunConfig().model.model_type)).dataset
        return dict(of_task) if values.get("dataset") == usual_data else {}
    record, given = architecture(of_task["model_type"]), values.get("model_type")
    if record.head_of is None or given != record.head_of:
        return {}
    base = architecture(given)
    notices.append(f"the model is {record.name}, a {given} with the head of the task")
    usual = {"model_type": given, "dataset": base.dataset, "loss": base.loss, "name": base.name}
    usual |= {"num_classes": RunConfig().model.num_classes}  # which a BERT has no use for
    return {name: of_task[name] for name, value in usual.items() if values.get(name) == value and name in of_task}


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
