"""`megalith pretrain` and `megalith.train`: a config in, a trained model in the run folder out."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import tempfile
from collections.abc import Callable

import torch.distributed as dist

from megalith.checkpoint.ranks import Ranks
from megalith.common.errors import ConfigError, MegalithError
from megalith.common.files import write_text
from megalith.common.orphans import ends_with_launcher
from megalith.config import environment
from megalith.config.batch_math import batch_size_at, check_length, global_batch, steps_left, total_steps
from megalith.config.checks.checks import check
from megalith.config.finetuning import completed, in_samples
from megalith.config.flags.loading import to_yaml
from megalith.config.megatron.counts import embedding_rows
from megalith.config.run import RunConfig
from megalith.data.tokenizers.tokenizer import Tokenizer
from megalith.runtime.build import Mesh, build_mesh, init_distributed, process_group
from megalith.training.best import best_so_far
from megalith.training.build import (
    build_callbacks,
    build_loaders,
    build_trainer,
    open_datasets,
    open_tokenizer,
    run_info,
    set_determinism,
)
from megalith.training.callbacks import print_lines
from megalith.training.duties import StopSignal
from megalith.training.failures import check_same_config
from megalith.training.loop import train_loop
from megalith.training.predictions import can_predict, has_predicted
from megalith.training.reporting.announce import announce
from megalith.training.reporting.metrics import METRICS_FILE, splits_measured_at
from megalith.training.resume import origin, run_folder, saving, source
from megalith.training.resume.next_start import describe_next_start
from megalith.training.resume.state import FAILED, Progress
from megalith.training.validation import Validation, measured_splits


def train(config: RunConfig) -> Progress:
    """Train (or resume) what `config` describes; returns the progress of the run at its end.

    Under a launcher every process calls it with the same config. Raises ConfigError, DataError or CheckpointError
    before the first step where something cannot work.
    """
    config = completed(config)
    check(config, dist.get_world_size() if dist.is_initialized() else environment.world_size())
    tokenizer, changes = open_tokenizer(config)
    if environment.rank() == 0:
        print("".join(f"{line}\n" for line in changes), end="", flush=True)
    with ends_with_launcher(), process_group():
        return _train(config, tokenizer)


def _train(config: RunConfig, tokenizer: Tokenizer) -> Progress:
    device = init_distributed(config.parallel)
    check_same_config(config)
    mesh = build_mesh(config.parallel, device)
    check_length(config, mesh.data_size)
    if old := Ranks().on_rank_0(lambda: run_folder.find_old_run_folder(config)):
        if mesh.is_main_process:
            print(
                f"run folder {old}, where this run began its record; new runs have it in the folder of --save",
                flush=True,
            )
        config = config.replace(run_dir=old)
    config, line = Ranks().on_rank_0(lambda: source.infer_finetune(config))
    if line and mesh.is_main_process:
        print(line, flush=True)
    with contextlib.ExitStack() as held:
        checks: list[Callable[[], None]] = []
        on_main_process(lambda: checks.append(held.enter_context(run_folder.hold_folders(config))))
        if Ranks().on_rank_0(lambda: origin.has_exact_gelu(config)):
            if mesh.is_main_process:
                kept = "activation gelu (exact), as in the checkpoint, which is older than --bias-gelu-fusion"
                print(f"{kept}; --no-bias-gelu-fusion says the same without this line", flush=True)
            config = config.replace(bias_gelu_fusion=False)
        if mesh.is_main_process:
            write_text(pathlib.Path(config.run_folder) / "config.yaml", to_yaml(config))
        return run(with_vocabulary(config, tokenizer), mesh, tokenizer, *checks)


def run(
    config: RunConfig, mesh: Mesh, tokenizer: Tokenizer, check_locks: Callable[[], None] = lambda: None
) -> Progress:
    """The run itself, on a mesh. check_locks: raises CheckpointError where another run has taken the run's folders."""
    set_determinism(config)
    given, datasets = config, open_datasets(config, mesh, tokenizer)
    epoch = getattr(datasets["train"], "samples_per_epoch", None) if config.finetuning.epochs is not None else None
    if epoch is not None:
        config = in_samples(config, epoch, global_batch(config, mesh.data_size))
    data = origin.fingerprints(filter(None, datasets.values()), config.data)
    changed = origin.compare(config, tokenizer, data)
    trainer = build_trainer(config, mesh, tokenizer)
    progress = saving.resume(trainer)
    train_iters = 0 if config.validation.skip_train else total_steps(config, mesh.data_size)
    if config.finetuning.epochs:  # whatever batches the steps before had
        train_iters = progress.iteration + steps_left(config, mesh.data_size, progress.consumed_train_samples)
    loaders = build_loaders(config, mesh, datasets)
    valid_data = origin.validation_fingerprint(datasets["valid"], data)
    measured_before = already_measured(config, mesh, progress.iteration, valid_data)
    predicted = not can_predict(loaders) or Ranks().on_rank_0(
        lambda: has_predicted(pathlib.Path(config.run_folder), progress.iteration, valid_data)
    )
    # A run that was ended before it had predicted measures its end again, for the file of results.
    measured_before = measured_before if predicted or progress.iteration < train_iters else set()
    unmeasured = [split for split in measured_splits(config, loaders) if split not in measured_before]
    left = [f"the loss of its {' and '.join(unmeasured)} data"] if unmeasured else []
    left += [] if predicted else ["its predictions"]
    if mesh.is_main_process:
        announce(trainer, progress, train_iters, datasets, changed, left)
    if progress.iteration >= train_iters > 0 and not left:
        return progress
    signals = StopSignal(config.resilience.exit_signal_handler, config.resilience.exit_duration_in_mins)
    validation = Validation(trainer, progress, loaders, signals)
    if validation.whole and config.finetuning.keep_best:
        best = functools.partial(best_so_far, config, progress.iteration, trainer.task.best_metric, valid_data)
        progress.best = Ranks().collect(best, lambda found: next(filter(None, found), None))
    next_start = functools.partial(describe_next_start, config, progress)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save(scratch)
        files = {f"tokenizer/{path.name}": str(path) for path in pathlib.Path(scratch).iterdir()}
        save = functools.partial(saving.save, trainer, progress, to_yaml(given), files, data, next_start, check_locks)
        callbacks = build_callbacks(
            trainer, tokenizer, progress, validation, measured_before, save, next_start, epoch
        )  # fmt: skip
        try:
            batches = functools.partial(batch_size_at, config, mesh.data_size)
            info = run_info(config, mesh, progress.iteration, train_iters, valid_data)
            train_loop(trainer, loaders.get("train"), progress, batches, info, callbacks, signals, next_start)
        finally:
            for loader in loaders.values():
                loader.close()
            # After a failure a launcher's SIGTERM to the other ranks must not end them before their own messages.
            if mesh.world_size == 1 or progress.stop != FAILED:
                signals.restore()
    if mesh.is_main_process:
        done = f"all {progress.iteration} steps are done" if train_iters else f"step {progress.iteration} is measured"
        stopped = f"stopped after step {progress.iteration} ({progress.stop}); {next_start()}"
        print_lines(done if progress.stop is None else stopped, run_folder.describe_outputs(config, progress))
    return progress


def with_vocabulary(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The config with the vocabulary's true size, which is the tokenizer's unless --vocab-size is larger."""
    given = config.model.vocab_size
    size = embedding_rows(given, config.data.tokenizer_type) if given else tokenizer.vocab_size
    if size < tokenizer.vocab_size:
        raise ConfigError(
            f"--vocab-size {size} is smaller than the tokenizer's vocabulary of {tokenizer.vocab_size} tokens; "
            f"every token needs a row of the embedding. Drop --vocab-size, or name the tokenizer that made the data; "
            f"`megalith checkpoint edit SOURCE FOLDER --vocab-size {tokenizer.vocab_size}` adds rows to a checkpoint."
        )
    return config.replace(vocab_size=size)


def on_main_process(job: Callable[[], object]) -> None:
    """Run `job` on the main process; an error of it is raised on all, so that none waits for the others."""

    def attempt() -> Exception | None:
        try:
            job()
        except (MegalithError, OSError) as error:
            return error
        return None

    if (error := Ranks().on_rank_0(attempt)) is not None:
        raise error


def already_measured(config: RunConfig, mesh: Mesh, step: int, valid_data: str | None = None) -> set[str]:
    """The splits that this run has measured at this step; none for --skip-train, which always measures.

    valid_data: a hash of validation data that come by name. All ranks call it.
    """
    if config.validation.skip_train:
        return set()
    has_file = mesh.global_rank == mesh.world_size - 1  # the rank that wrote it may be the only one that sees it
    splits = splits_measured_at(pathlib.Path(config.run_folder) / METRICS_FILE, step, valid_data) if has_file else set()
    return Ranks().collect(lambda: splits, lambda sets: set().union(*sets))
