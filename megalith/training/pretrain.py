"""`megalith pretrain` and `megalith.train`: a config in, a trained model in the run folder out."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import tempfile

import torch
import torch.distributed as dist

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, MegalithError
from megalith.common.files import write_text
from megalith.common.orphans import ends_with_launcher
from megalith.config import launched
from megalith.config.batch_math import batch_size_at, check_length, global_batch, total_steps
from megalith.config.checks import check
from megalith.config.flops import flops_per_token
from megalith.config.loading import to_yaml
from megalith.config.megatron_counts import rows_asked
from megalith.config.run import RunConfig
from megalith.config.stages import layers_of, schedule_of
from megalith.data.build import build_datasets, told
from megalith.data.loader import Loader
from megalith.data.tokenizers import Tokenizer, tokenizer_from_config
from megalith.optim.build import build_optimizer
from megalith.optim.loss_scale import build_loss_scale
from megalith.optim.schedule import Schedule
from megalith.runtime.build import Mesh, grid, join, place
from megalith.training import origin, run_folder, saving
from megalith.training.callbacks import RunInfo, print_lines
from megalith.training.duties import CountValidation, ExitInterval, SaveCheckpoints, SaveFirst, StopSignal, Validate
from megalith.training.failures import same_config
from megalith.training.guards import Retain, StopDiverged, StopUnlearned
from megalith.training.loop import train_loop
from megalith.training.metrics import FILE, validated
from megalith.training.next_start import next_start
from megalith.training.peaks import peak_flops
from megalith.training.profile import ProfilePipeline
from megalith.training.reporters import reporters
from megalith.training.state import FAILED, Progress
from megalith.training.step import Trainer
from megalith.training.tasks import TASKS
from megalith.training.validation import evaluate


def train(config: RunConfig) -> Progress:
    """Train (or resume) what `config` describes; returns where the run stands at its end.

    Under a launcher every process calls it with the same config. Raises ConfigError, DataError or CheckpointError before
    the first step where something cannot work.
    """
    ours = not dist.is_initialized()
    check(config, launched.world_size() if ours else dist.get_world_size())
    tokenizer = tokenizer_from_config(config.data, vocab_size=config.model.vocab_size)
    with ends_with_launcher():
        return _train(config, tokenizer, ours)


def _train(config: RunConfig, tokenizer: Tokenizer, ours: bool) -> Progress:
    """ours: the process group is made here, and ended."""
    device = join(config.parallel)
    try:
        same_config(config)
        mesh = grid(config.parallel, device)
        check_length(config, mesh.data_size)
        if old := Ranks().first(lambda: run_folder.old_place(config)):
            if mesh.is_main:
                print(f"run folder {old}, where this run began its record; new runs have it in the folder of --save", flush=True)
            config = config.replace(run_dir=old)
        with contextlib.ExitStack() as held:
            on_main(mesh, lambda: held.enter_context(run_folder.alone(config)))
            if Ranks().first(lambda: origin.has_exact_gelu(config)):
                if mesh.is_main:
                    was = "activation gelu (exact) as what it starts from, which was stored before --bias-gelu-fusion had an effect"
                    print(f"{was}; --no-bias-gelu-fusion says the same without this line", flush=True)
                config = config.replace(bias_gelu_fusion=False)
            if mesh.is_main:
                write_text(pathlib.Path(config.run_folder) / "config.yaml", to_yaml(config))
            return run(with_vocabulary(config, tokenizer), mesh, tokenizer)
    finally:
        if ours:
            dist.destroy_process_group()


def run(config: RunConfig, mesh: Mesh, tokenizer: Tokenizer) -> Progress:
    """The run itself, on a mesh."""
    if config.precision.deterministic_mode:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch refuses to be deterministic without it; read at first use
    torch.use_deterministic_algorithms(config.precision.deterministic_mode)
    datasets = build_datasets(config, tokenizer, rank=mesh.data_rank, size=mesh.data_size, run_folder=config.run_folder)
    if datasets["train"] is None and not config.validation.skip_train:
        raise ConfigError(
            f"--split {config.data.split!r} leaves no document to train on; its first share must be above 0, and come to a document. "
            f"Change it, or give --train-data-path."
        )
    data = origin.fingerprints(filter(None, datasets.values()), config.data)
    changed = origin.compare(config, tokenizer, data)
    batch = global_batch(config, mesh.data_size)
    runtime = place(config, mesh)
    measures = config.validation.skip_train  # with neither rate nor length
    rates = RunConfig().replace(lr=0.0, train_iters=1) if measures else config
    optimizer = build_optimizer(rates.optimizer, runtime.named_parameters())
    schedule = Schedule(rates.optimizer, rates.schedule, batch)
    trainer = Trainer(runtime, TASKS.find(config.data.loss)(), optimizer, schedule, build_loss_scale(config.precision))
    progress = saving.resume(trainer)
    last_step = 0 if measures else total_steps(config, mesh.data_size)
    names = {"validation": "valid", "test": "test"} if config.validation.eval_iters else {}
    splits = [split for split, name in names.items() if datasets[name] is not None]
    known = measured(config, mesh, progress.iteration)
    owed = [split for split in splits if split not in known]
    if mesh.is_main:
        announce(config, mesh, trainer, progress, last_step, changed, owed)
        print("".join(f"  {line}\n" for line in told(datasets["train"])), end="", flush=True)
        if datasets["valid"] is None and config.validation.eval_iters:
            print("no validation data, so nothing is validated: --split or --valid-data-path gives some", flush=True)
    if progress.iteration >= last_step > 0 and not owed:
        return progress
    loaders = {
        split: Loader(
            dataset, micro_batch_size=config.batch.micro_batch_size, rank=mesh.data_rank, size=mesh.data_size, seed=config.batch.seed,
            order=config.data.dataloader_type if split == "train" else "single", num_workers=config.data.num_workers,
        )
        for split, dataset in datasets.items() if dataset is not None
    }  # fmt: skip
    info = RunInfo(
        config=config, folder=pathlib.Path(config.run_folder), start_step=progress.iteration,
        rank=mesh.rank, world_size=mesh.world_size,
        train_iters=last_step,
        flops_per_token_full=flops_per_token(config.model, config.data.seq_length, False, config.data.decoder_seq_length),
        flops_per_token_half=flops_per_token(config.model, config.data.seq_length, True, config.data.decoder_seq_length),
        peak_flops=peak_flops(device_name(mesh.device), config.precision.compute_dtype, config.logging.peak_tflops),
    )  # fmt: skip

    signals = StopSignal(config.resilience.exit_signal_handler, config.resilience.exit_duration_in_mins)
    samples = config.validation.eval_iters * batch  # of one validation

    def measure(split: str) -> dict[str, float]:
        if split == "test":
            return evaluate(trainer, loaders["test"], 0, config.validation.eval_iters, batch, signals)
        # Each validation takes the next samples, as Megatron's does; after the last whole set it starts over. One that is due at
        # this step is counted already (CountValidation); the point before the first step is one more than Megatron counts.
        due = progress.iteration > 0 and progress.iteration % config.validation.eval_interval == 0
        number = (progress.consumed_valid_samples // samples - due) % max(1, len(datasets["valid"]) // samples)
        return evaluate(trainer, loaders["valid"], number * samples, config.validation.eval_iters, batch, signals)

    tell = reporters(config)
    if config.logging.profile_pipeline:
        tell.append(ProfilePipeline(runtime))
    again = functools.partial(next_start, config, progress)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        files = {f"tokenizer/{path.name}": str(path) for path in pathlib.Path(scratch).iterdir()}
        save = functools.partial(saving.save, trainer, progress, to_yaml(config), files, data, again)
        saver = SaveCheckpoints(save, progress)
        retain = Retain(functools.partial(saving.retain, config, progress, progress.iteration) if mesh.is_main else lambda: None, progress)
        callbacks = [
            *tell, StopDiverged(again), StopUnlearned(), retain, *([CountValidation(progress, samples)] if splits else []), saver,
            Validate(measure, progress, [*tell, retain], splits, known), ExitInterval(progress), SaveFirst(saver),
        ]  # fmt: skip
        try:
            batches = functools.partial(batch_size_at, config, mesh.data_size)
            train_loop(trainer, loaders.get("train"), progress, batches, info, callbacks, signals, again)
        finally:
            if mesh.world_size == 1 or progress.stop != FAILED:  # a launcher's SIGTERM to the others must not silence what they have to say
                signals.restore()
    if mesh.is_main:
        done = f"step {progress.iteration} is measured" if measures else f"all {progress.iteration} steps are done"
        stopped = f"stopped after step {progress.iteration} ({progress.stop}); {again()}"
        print_lines(done if progress.stop is None else stopped, run_folder.written(config, progress))
    return progress


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The config with the vocabulary's true size, which is the tokenizer's unless a larger one is asked for."""
    asked = config.model.vocab_size
    size = rows_asked(asked, config.data.tokenizer_type) if asked else tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab-size {size} is smaller than the tokenizer's vocabulary: found {tokenizer.vocab_size} tokens; "
            f"every token needs a row of the embedding. Drop --vocab-size, or name the tokenizer that made the data; "
            f"`megalith checkpoint edit SOURCE FOLDER --vocab-size {tokenizer.vocab_size}` gives a checkpoint more rows."
        )
    return config.replace(vocab_size=size)


def on_main(mesh: Mesh, job) -> None:
    """Run `job` on the first process; an error of it is raised on all, so that none waits for the others."""
    outcome: list = [None]
    if mesh.is_main:
        try:
            job()
        except (MegalithError, OSError) as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, device=mesh.device if mesh.device.type != "cpu" else None)
    if outcome[0] is not None:
        raise outcome[0]


def measured(config: RunConfig, mesh: Mesh, step: int) -> set[str]:
    """The splits that this run has measured at this step; none for --skip-train, which always measures. All ranks call it."""
    if config.validation.skip_train:
        return set()
    writes = mesh.rank == mesh.world_size - 1  # it alone may see the file
    mine = validated(pathlib.Path(config.run_folder) / FILE, step) if writes else set()
    return Ranks().collect(lambda: mine, lambda each: set().union(*each))


def announce(
    config: RunConfig, mesh: Mesh, trainer: Trainer, progress: Progress, last_step: int, changed: list[str], owed: list[str]
) -> None:
    """Say what is about to run, in a few lines."""
    print(
        f"{config.model.model_type} with {trainer.runtime.num_parameters:,} parameters on {mesh.world_size} x {device_name(mesh.device)}, "
        f"{config.precision.compute_dtype}; activation {config.model.activation}; run folder {config.run_folder}",
        flush=True,
    )
    if mesh.size("pp") > 1:
        stages = ", ".join(f"{layers.start}-{layers.stop - 1}" for layers in layers_of(config))
        print(f"pipeline: {schedule_of(config.parallel)}, layers by stage {stages}", flush=True)
    if line := saving.loaded(trainer):
        print(line, flush=True)
    if progress.iteration:
        left = f"what is left is the loss of its {' and '.join(owed)} data" if owed else "nothing is left to do"
        more = "raise --train-iters, with --override-opt-param-scheduler, to go on"
        done = f"; that is all of them, {left} ({more})" if progress.iteration >= last_step > 0 else ""
        doing = f"resuming after step {progress.iteration} of {last_step}{done}" if last_step else f"measuring step {progress.iteration}"
        print(doing, flush=True)
    for line in changed:
        print(f"  changed since that checkpoint: {line}", flush=True)


def device_name(device: torch.device) -> str:
    """The device's name as its maker gives it; "cpu" for the CPU."""
    return "cpu" if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
