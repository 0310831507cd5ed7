"""The parts of a run, each made from its config: the trainer, the datasets and loaders, the callbacks."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from megalith.checkpoint.formats import adapters
from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError
from megalith.common.registry import load
from megalith.config.batch_math import global_batch
from megalith.config.parameters import weight_decays
from megalith.config.run import RunConfig
from megalith.data.build import build_datasets, prepare_tokenizer
from megalith.data.loader import Loader
from megalith.data.samples.epochs import Epochs
from megalith.data.tokenizers.tokenizer import Tokenizer, tokenizer_from_config
from megalith.optim.build import build_optimizer
from megalith.optim.loss_scale import build_loss_scale
from megalith.optim.schedule import Schedule
from megalith.planner.flops import flops_per_token
from megalith.runtime.build import Mesh, build_runtime
from megalith.training.best import KeepBest
from megalith.training.callbacks import Callback, RunInfo
from megalith.training.duties import CountValidation, ExitInterval, SaveCheckpoints, SaveFirst, Validate
from megalith.training.guards import PruneCheckpoints, StopDiverged, StopEmptyBatches
from megalith.training.predictions import WritePredictions, can_predict
from megalith.training.reporting.peaks import peak_flops
from megalith.training.reporting.profile import ProfilePipeline
from megalith.training.reporting.reporters import reporters
from megalith.training.resume import saving
from megalith.training.resume.start import Start, read_start
from megalith.training.resume.state import Progress
from megalith.training.step import Trainer
from megalith.training.tasks import build_task
from megalith.training.validation import PART, Validation

EVALUATE_TASKS = "megalith.evaluation.in_training:EvaluateTasks"  # by its address: evaluation stands above training


def set_determinism(config: RunConfig) -> None:
    """Ask torch for deterministic algorithms, or not, as the config says."""
    if config.precision.deterministic_mode:
        # torch refuses to be deterministic without it; it is read at first use
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.precision.deterministic_mode)


def build_trainer(config: RunConfig, mesh: Mesh, tokenizer: Tokenizer) -> Trainer:
    """A parallelized model with its task, optimizer, schedule and loss scale, none of them resumed.

    With LoRA, with a new head and of two towers the model has the weights that the run starts from (resume/start.py).
    config.model.vocab_size must be known; see pretrain.with_vocabulary.
    """
    start = Ranks().on_every_rank(lambda: read_start(config))
    if start.weights is not None and mesh.is_main_process:
        print("".join(f"{start.weights.source}: {note}\n" for note in start.weights.notes), end="", flush=True)
    return trainer_from(start, config, mesh, tokenizer)


def trainer_from(
    start: Start, config: RunConfig, mesh: Mesh, tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> Trainer:  # fmt: skip
    """As build_trainer, from given weights. dtype: of the model; see build_runtime."""
    batch = global_batch(config, mesh.data_size)
    runtime = build_runtime(config, mesh, dtype, start.weights, drawn=start.drawn)
    only_measures = config.validation.skip_train  # with neither rate nor length
    rates = RunConfig().replace(lr=0.0, train_iters=1) if only_measures else config
    decays = functools.partial(weight_decays, config.model)
    optimizer = build_optimizer(rates.optimizer, runtime.named_parameters(), decays)
    schedule = Schedule(rates.optimizer, rates.schedule, batch)
    return Trainer(
        runtime, build_task(config, mesh, tokenizer), optimizer, schedule, build_loss_scale(config.precision),
        start.weights.train_state.get(adapters.BASE) if config.lora.lora_rank and start.weights else None,
        start.weights is not None,
    )  # fmt: skip


def open_tokenizer(config: RunConfig) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a run, with what its data change in it, and lines on that."""
    tokenizer = tokenizer_from_config(config.data, vocab_size=config.model.vocab_size)
    return tokenizer, prepare_tokenizer(config, tokenizer)


def open_datasets(config: RunConfig, mesh: Mesh, tokenizer: Tokenizer) -> dict[str, Any]:
    """{"train": dataset or None, "valid": ..., "test": ...}. Raises ConfigError where there is nothing to train on."""
    data_rank = {"rank": mesh.data_rank, "size": mesh.data_size}
    datasets = build_datasets(config, tokenizer, **data_rank, run_folder=config.run_folder)
    if datasets["train"] is None and not config.validation.skip_train:
        raise ConfigError(
            f"--split {config.data.split!r} leaves no document to train on; its first number must be above 0, and come "
            f"to at least a document. Change it, or give --train-data-path."
        )
    return datasets


def build_loaders(config: RunConfig, mesh: Mesh, datasets: Mapping[str, Any]) -> dict[str, Loader]:
    """A loader of this data-parallel rank's micro-batches for every dataset that there is, by the same name.

    Those of validation data that come by name are "validation/NAME".
    """
    named = datasets["valid"] if isinstance(datasets["valid"], Mapping) else {}
    whole = {PART + name: dataset for name, dataset in named.items()}
    return {
        split: Loader(
            dataset, micro_batch_size=config.batch.micro_batch_size, rank=mesh.data_rank, size=mesh.data_size,
            order=config.data.dataloader_type if split == "train" and not isinstance(dataset, Epochs) else "single",
            seed=config.batch.seed, num_workers=config.data.num_workers,
        )
        for split, dataset in {**datasets, **whole}.items() if dataset is not None and dataset is not named
    }  # fmt: skip


def run_info(
    config: RunConfig, mesh: Mesh, start_step: int, train_iters: int, valid_data: str | None = None
) -> RunInfo:  # fmt: skip
    """The run, as callbacks see it.

    start_step: steps done before this process started. train_iters: the step at which the run ends. valid_data: a hash
    of validation data that come by name.
    """
    lengths, contexts = (config.data.seq_length, config.data.decoder_seq_length), 1 + config.retriever.train_hard_neg
    full, half = (flops_per_token(config.model, lengths[0], causal, lengths[1], contexts) for causal in (False, True))
    if config.lora.lora_rank:  # frozen weights have no gradients; the same is left out of attention, a little too much
        full, half = full * 2 / 3, half * 2 / 3
    peak = peak_flops(device_name(mesh.device), config.precision.compute_dtype, config.logging.peak_tflops)
    return RunInfo(
        config=config, folder=pathlib.Path(config.run_folder), start_step=start_step, train_iters=train_iters,
        rank=mesh.global_rank, world_size=mesh.world_size, flops_per_token_full=full, flops_per_token_half=half,
        peak_flops=peak, valid_data=valid_data,
    )  # fmt: skip


def build_callbacks(
    trainer: Trainer, tokenizer: Tokenizer, progress: Progress, validation: Validation,
    measured_before: Collection[str], save: Callable[[], None], next_start: Callable[[], str], epoch: int | None = None,
) -> list[Callback]:  # fmt: skip
    """The callbacks of a run, in the order in which they must be called: guards, then saving, then validation.

    measured_before: the splits that were measured at the present step before this process started.
    save: writes a checkpoint. next_start: what the next start does, as text. epoch: samples of one, where it is known.
    """
    config, mesh = trainer.runtime.config, trainer.runtime.mesh
    reporting = reporters(config)
    if config.logging.profile_pipeline:
        reporting.append(ProfilePipeline(trainer.runtime))
    start = progress.iteration

    def prune() -> None:
        if mesh.is_main_process:
            saving.prune(config, progress, start)

    pruning = PruneCheckpoints(prune, progress)
    saver = SaveCheckpoints(save, progress)
    count: Sequence[Callback] = [CountValidation(validation.cursor)] if validation.cursor else []
    best: list[Callback] = []
    if validation.whole and config.finetuning.keep_best and not config.validation.skip_train:
        best = [KeepBest(saver, progress, trainer.task.best_metric)]
    predictions: list[Callback] = []
    if files := can_predict(validation.loaders):
        train = getattr(validation.loaders.get("train"), "dataset", None)
        predictions = [WritePredictions(trainer, progress, files, validation.batch, getattr(train, "dataset", None))]
    listeners = [*reporting, *best, *predictions, pruning]
    measure = Validate(validation.measure, progress, listeners, validation.splits, measured_before, epoch)
    tasks: list[Callback] = []
    if config.validation.eval_tasks:
        tasks = [load("--eval-tasks", EVALUATE_TASKS)(trainer, tokenizer, progress, reporting, measure.due)]
    guards: list[Callback] = [StopDiverged(next_start), StopEmptyBatches(), pruning]
    # Ends come in reverse order: the run is saved, measured, and then predicts.
    return [*reporting, *guards, *count, saver, *predictions, *tasks, measure, ExitInterval(progress), SaveFirst(saver)]


def device_name(device: torch.device) -> str:
    """The device's name as its driver gives it; "cpu" for the CPU."""
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
