"""What the next start of a run does, as text for its last line and for errors."""

from __future__ import annotations

import pathlib

from megalith import checkpoint
from megalith.checkpoint.store.folder import checkpoint_folder, load_path
from megalith.config.run import RunConfig
from megalith.training.resume.state import Progress


def describe_next_start(config: RunConfig, progress: Progress) -> str:
    """What the same command does when it is given again, and which flags to add or drop so that it resumes.

    tests/training/resume/test_next_start.py does what each of these sentences says.
    """
    c, own, load = config.checkpoint, checkpoint_folder(config), load_path(config)
    if config.validation.skip_train:
        return "the same command measures from the beginning"
    newest = checkpoint.latest(own)
    if progress.saved is None and c.ckpt_step is not None:
        return f"the same command starts from step {c.ckpt_step} again"
    if newest is None:
        metrics = pathlib.Path(config.run_folder) / "metrics.jsonl"
        fresh = load is None and not c.fresh and metrics.exists() and metrics.stat().st_size > 0
        return (
            "no checkpoint was written; the same command "
            + ("with --fresh " if fresh else "")
            + "begins from the start"
        )
    without = ["--fresh"] if c.fresh else []
    with_ = []
    if load is not None and not c.finetune:
        if c.use_checkpoint_args:  # it needs a folder to read
            with_.append(f"--load {own}")
        else:
            without.append("--load")
    without += ["--ckpt-step"] if c.ckpt_step is not None else []
    if c.no_save_optim and not c.no_load_optim:
        with_.append("--no-load-optim")
    if c.no_load_optim and not c.no_save_optim:
        without.append("--no-load-optim")
    words = (f" without {' and '.join(without)}" if without else "") + (f" with {' and '.join(with_)}" if with_ else "")
    return f"the same command{words} resumes from {'there' if newest == progress.iteration else f'step {newest}'}"
