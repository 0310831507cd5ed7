"""Indexed datasets (.bin and .idx) in a script: their arguments, and loaders that give batches of their samples.

A batch is in megalith's terms (an IndexedBatch): labels are those of the next token already, `loss_mask` says which of
them count, and `samples` has the numbers that pretrain has for the same data, so that losses and dropout masks agree.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from megalith.common.errors import ConfigError, MegalithError, TrainingError, problem
from megalith.config.checks.checks import find_problems
from megalith.config.flags.text import Words, fail
from megalith.config.flags.values import fields
from megalith.config.run import RunConfig
from megalith.data.build import sample_counts
from megalith.data.loader import Loader
from megalith.data.samples.splits import SPLIT_NAMES
from megalith.integrations.accelerate.batches import IndexedBatch
from megalith.integrations.accelerate.data.datasets import ProvidedDataset, choose_tokenizer, tokenizer_type
from megalith.integrations.accelerate.options import megatron_args
from megalith.integrations.accelerate.session import Session
from megalith.training.build import build_loaders, open_datasets

WHERE = "MegatronLMDummyDataLoader"
DATASETS = {"gpt": "gpt", "bert": "bert", "t5": "t5"}  # kind of model (parsers.py: kind_of) -> its dataset
OTHERS = ("micro_batch_size", "seed", "vocab_size", "eval_iters", "eval_interval")  # that act, beside the section data


class MegatronLMDummyDataLoader:
    """Indexed datasets, of which `prepare` makes loaders: given three times, of training, validation and test data.

    dataset_args: as they were given. values: the fields of RunConfig that they set. notices: lines for the user.
    """

    def __init__(self, **dataset_args: Any):
        """dataset_args: arguments of data and validation under Megatron's names: data_path (prefixes, weighted or not),
        split (the guide's splits_string too), seq_length, micro_batch_size, train_data_path, reset_position_ids,
        vocab_file, num_workers ... No command line is read.

        Raises ConfigError with all that are not known, have wrong values, or belong elsewhere.
        """
        self.dataset_args = dataset_args
        given, problems = dict(dataset_args), []
        splits = given.pop("splits_string", None)
        if splits is not None and given.setdefault("split", splits) != splits:
            rule = f"is another spelling of split, {given['split']!r}, and must be equal to it"
            problems.append(problem(f"{WHERE}: splits_string", splits, rule, "Leave out one of the two"))
        if not given.get("micro_batch_size"):
            rule, cure = "must be given: samples of a micro-batch", "Write micro_batch_size=8"
            problems.append(problem(f"{WHERE}: micro_batch_size", Words("none"), rule, cure))
        read = megatron_args.read({name: _one_path(value) for name, value in given.items()}, WHERE)
        for name in read.values:
            if fields()[name].section != "data" and name not in OTHERS:
                cure = f"Give it to MegatronLMPlugin, there or in other_megatron_args={{'{name}': ...}}"
                problems.append(problem(f"{WHERE}: {name}", read.values[name], "is no argument of data", cure))
        fail([*read.problems, *problems])
        self.values = read.values
        elsewhere = tuple(f"{WHERE}: {name} has no effect" for name in read.values)  # true of other_megatron_args alone
        self.notices = [line for line in read.notices if not line.startswith(elsewhere)]


def _one_path(value: Any) -> Any:
    """A prefix whose name has spaces, as one word of several."""
    return [value] if isinstance(value, str) and " " in value and os.path.exists(f"{value}.idx") else value


class IndexedLoader:
    """Batches of one split of indexed datasets, without end; every process takes the same number of them.

    consumed_samples: of all data-parallel processes, which is the number of the next sample.
    """

    use_stateful_dataloader = True  # so that Accelerate's save_state asks for `state_dict`
    _is_accelerate_prepared = True

    def __init__(
        self, loader: Loader | None, *, batch_size: int, consumed_samples: int, device: torch.device, repeats: bool,
        why_missing: str = "",
    ):  # fmt: skip
        """batch_size: samples of a batch on all data-parallel processes. repeats: start over after the last full batch.

        loader: None where the split has no data, which why_missing explains to who asks for a batch.
        """
        self.loader, self.batch_size, self.consumed_samples = loader, batch_size, consumed_samples
        self.device, self.repeats, self.why_missing = device, repeats, why_missing

    @property
    def dataset(self) -> Any:
        """Samples by number; None where there are none."""
        return None if self.loader is None else self.loader.dataset

    def __len__(self) -> int:
        """Batches before a sample repeats."""
        return 0 if self.loader is None else len(self.loader.dataset) // self.batch_size

    def __iter__(self) -> IndexedLoader:
        return self

    def __next__(self) -> IndexedBatch:
        """This process's samples of the next batch, its micro-batches one after the other."""
        if self.loader is None:
            raise ConfigError(self.why_missing)
        first, batches = self.consumed_samples, len(self)
        if self.repeats and batches:
            first = first // self.batch_size % batches * self.batch_size
        elif self.loader.order == "single" and first + self.batch_size > len(self.loader.dataset):
            rule = f"must be at most {batches}, for which there are samples"
            cure = "Raise train_iters of MegatronLMPlugin, or total_num_steps of MegatronLMDummyScheduler"
            raise TrainingError(problem("The number of batches", first // self.batch_size + 1, rule, cure))
        micro_batches = self.loader.step(first, self.batch_size)
        self.consumed_samples += self.batch_size
        joined = {name: torch.cat([each[name] for each in micro_batches]) for name in micro_batches[0]}
        return IndexedBatch({name: tensor.to(self.device, non_blocking=True) for name, tensor in joined.items()})

    def state_dict(self) -> dict[str, int]:
        """Where it is, equal on every process and in any layout."""
        return {"consumed_samples": self.consumed_samples}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume there."""
        self.consumed_samples = state["consumed_samples"]


def indexed_loaders(
    dummy: MegatronLMDummyDataLoader, session: Session, train_iters: int | None = None
) -> list[IndexedLoader]:
    """Loaders of training, validation and test data for a prepared model, on every process.

    train_iters: optimizer steps of the run, where the plugin does not say: the scheduler's. They decide how often the
    documents repeat, and so on the order of samples. The plugin's consumed_samples say where each loader begins.
    The tokenizer is that of the dummy's arguments, of other_megatron_args, or of the model's folder; GPT's datasets do
    without one. A line on it is added to dummy.notices.
    Raises ConfigError or DataError where datasets cannot be made.
    """
    plugin, mesh = session.plugin, session.runtime.mesh
    config = dataset_config(dummy, session, train_iters)
    _check(config, mesh.world_size, built=plugin.custom_megatron_datasets_provider_function is None)
    try:
        if plugin.custom_megatron_datasets_provider_function is not None:
            counts = sample_counts(config, mesh.data_size)
            provided = plugin.custom_megatron_datasets_provider_function(list(counts))
            datasets = {
                name: None if each is None else ProvidedDataset(each)
                for name, each in zip(SPLIT_NAMES, provided, strict=True)
            }
        else:
            tokenizer, line = choose_tokenizer(config, session, dummy.values.get("vocab_size"))
            dummy.notices.append(line)
            datasets = open_datasets(config, mesh, tokenizer)
        loaders = build_loaders(config, mesh, datasets)
    except MegalithError as error:
        raise type(error)(f"{WHERE}: {megatron_args.without_dashes(str(error))}") from error
    batch_size = (config.batch.micro_batch_size or 1) * plugin.num_micro_batches * mesh.data_size
    consumed: Sequence[int] = plugin.consumed_samples or [0, 0, 0]
    return [
        IndexedLoader(
            loaders.get(name), batch_size=batch_size, consumed_samples=first, device=mesh.device,
            repeats=name != "train", why_missing=_why_missing(name, config),
        )
        for name, first in zip(SPLIT_NAMES, consumed)
    ]  # fmt: skip


def _why_missing(name: str, config: RunConfig) -> str:
    found, rule = Words(f"none with split={config.data.split!r}"), "must be there where the script takes a batch of it"
    return problem(f"{WHERE}: {name} data", found, rule, f"Raise its part of split, or give {name}_data_path")


def dataset_config(dummy: MegatronLMDummyDataLoader, session: Session, train_iters: int | None) -> RunConfig:
    """The session's config with the dummy's arguments, from which datasets are made as for `megalith pretrain`."""
    values, plugin, config = dict(dummy.values), session.plugin, session.config
    values.pop("vocab_size", None)  # the tokenizer's; see choose_tokenizer
    values.setdefault("dataset", DATASETS.get(session.kind))
    if values["dataset"] is None:
        found, rule = Words(session.hf_class.__name__), "must be one that learns from text alone (GPT, BERT, T5)"
        raise ConfigError(problem("The model of indexed datasets", found, rule, "Use an ordinary DataLoader"))
    if values.setdefault("seq_length", config.data.seq_length) is None:
        values["seq_length"] = config.model.max_position_embeddings
    steps = config.schedule.train_iters or train_iters
    if steps is None and config.schedule.train_samples is None:
        rule = "must be given, as the order of samples depends on it"
        cure = "Write MegatronLMPlugin(train_iters=...), or prepare a MegatronLMDummyScheduler(total_num_steps=...)"
        raise ConfigError(problem("The number of optimizer steps", Words("none"), rule, cure))
    if config.schedule.train_samples is None:
        values["train_iters"] = steps
    accumulated = plugin.num_micro_batches * session.gradient_state.num_steps
    samples = values["micro_batch_size"] * accumulated * session.runtime.mesh.data_size
    config = config.replace(**values, global_batch_size=samples)
    return config.replace(tokenizer_type=tokenizer_type(config))


def _check(config: RunConfig, world_size: int, built: bool) -> None:
    """Raise ConfigError with all that is wrong with the section data. built: whether datasets are made of a corpus."""
    found = find_problems(config, world_size, corpus=built, one_step=True)
    own = [each for each in found if any(fields()[name].section == "data" for name in each.fields)]
    needless = ("tokenizer_type", "vocab_file")  # a tokenizer may also come from the model's folder
    fail(f"{WHERE}: {megatron_args.without_dashes(each.text)}" for each in own if each.fields != needless)
