"""Classifiers as scorers: one that `megalith finetune` has trained, and one of transformers."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import torch

from megalith.common.errors import ConfigError, DataError, problem
from megalith.common.extras import require
from megalith.config.flags.text import Words
from megalith.data.tasks.dataset import TaskDataset
from megalith.data.tasks.description import TaskDescription, read_description
from megalith.data.tasks.examples import Example, Examples, clean_text
from megalith.data.tokenizers.tokenizer import load_tokenizer
from megalith.runtime.load import load_model
from megalith.workflows.detoxify.options import DetoxifyOptions
from megalith.workflows.detoxify.scorers import Scorer, required_path

TOXIC = ("toxic", "toxicity")  # what the class is called where --scorer-label does not say


class FinetunedClassifier(Scorer):
    """The probability of a class, by a BERT that `megalith finetune TASK` has trained on labelled texts."""

    def __init__(self, options: DetoxifyOptions):
        path = existing(required_path(options, "a run of `megalith finetune`"))
        self.model, config, folder = load_model(path, device=options.device)
        if config.model.model_type != "bert_classification" or folder is None:
            rule = "must be a BERT with a head for classes, and its tokenizer"
            cure = "Name the run of `megalith finetune TASK`"
            raise ConfigError(problem("--scorer-path", config.model.model_type, rule, cure))
        self.tokenizer, self.seq_length = load_tokenizer(folder, config.data), config.data.seq_length or 512
        self.label = class_of(labels_of(config.finetuning.task, config.model.num_classes), options.scorer_label)
        self.batch_size = options.batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float | None]:
        """Scores of the texts, each cut to the length that the classifier was trained with."""
        examples = [Example(str(number), ((clean_text(text), ""),), 0.0) for number, text in enumerate(texts)]
        found = Examples(False, examples, [])
        task = TaskDescription(name="toxicity")
        samples = TaskDataset(found, task, self.tokenizer, seq_length=self.seq_length, files=())
        device, scores = next(self.model.parameters()).device, list[float]()
        for first in range(0, len(samples), self.batch_size):
            rows = [samples[number] for number in range(first, min(first + self.batch_size, len(samples)))]
            names = ("input_ids", "token_types", "padding_mask")
            ids, types, mask = (torch.from_numpy(np.stack([row[name] for row in rows])).to(device) for name in names)
            logits = self.model(ids, token_types=types, padding_mask=mask)
            scores += logits.float().softmax(dim=-1)[:, self.label].tolist()
        return list(scores)


class HuggingFaceClassifier(Scorer):
    """The probability of a class, by a folder of transformers: AutoModelForSequenceClassification, from files alone.

    A model of several labels that do not exclude each other, or of one label, has a sigmoid for each.
    """

    def __init__(self, options: DetoxifyOptions):
        transformers = require("transformers", "--scorer huggingface")
        path = existing(required_path(options, "a folder of transformers with a classifier"))
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            classes = transformers.AutoModelForSequenceClassification
            self.model, loading = classes.from_pretrained(path, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            rule = f"must hold a classifier of transformers and its tokenizer ({error})"
            raise DataError(problem("--scorer-path", path, rule, "Name another folder")) from error
        if missing := sorted(loading["missing_keys"]):
            rule = "must have all weights of the classifier, which would be random otherwise"
            raise DataError(problem("--scorer-path", Words(f"none of {missing[0]}"), rule, "Name another folder"))
        device = "cpu"
        if options.device != "cpu" and (found := torch.accelerator.current_accelerator(check_available=True)):
            device = found.type
        self.model.to(device).eval()
        config = self.model.config
        self.label = class_of([config.id2label[number] for number in range(config.num_labels)], options.scorer_label)
        self.separate = config.problem_type == "multi_label_classification" or config.num_labels == 1
        self.batch_size = options.batch_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float | None]:
        """Scores of the texts, each cut to what the classifier can read."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = min(each for each in (self.tokenizer.model_max_length, limit) if each is not None)
        scores = list[float]()
        for first in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[first : first + self.batch_size]), padding=True, truncation=True, max_length=longest,
                return_tensors="pt",
            ).to(self.model.device)  # fmt: skip
            logits = self.model(**batch).logits.float()
            probs = logits.sigmoid() if self.separate else logits.softmax(dim=-1)
            scores += probs[:, self.label].tolist()
        return list(scores)


def labels_of(task: str | None, classes: int) -> list[str]:
    """The names of the classes that a run was trained on; their numbers where the task's file has gone."""
    try:
        return list(read_description(task or "").labels)
    except ConfigError:
        return [str(number) for number in range(classes)]


def class_of(labels: Sequence[str], wanted: str | None) -> int:
    """The number of the toxic class. Raises ConfigError where no label, or not one alone, is the one."""
    names = TOXIC if wanted is None else (wanted.lower(),)
    found = [number for number, label in enumerate(labels) if label.lower() in names]
    if wanted is None and len(labels) == 1:
        return 0
    if len(found) != 1:
        rule = f"must name one of the classifier's classes, {', '.join(labels)}"
        cure = f"Write --scorer-label {labels[-1]}, if that one is toxic"
        raise ConfigError(problem("--scorer-label", Words("nothing") if wanted is None else wanted, rule, cure))
    return found[0]


def existing(path: str) -> str:
    """The path. Raises DataError where nothing is there."""
    if not pathlib.Path(path).exists():
        raise DataError(problem("--scorer-path", path, "must name a folder that exists", "Correct the path"))
    return path
