"""The section `checkpoint`: what is kept of a run, and what a run starts from."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class CheckpointConfig:
    """Saving and loading. A saved run is a folder with iter_NNNNNNN/ and the `latest` pointer."""

    save: str | None = option(
        None,
        "where checkpoints go, and the run's record unless --run-dir is given "
        "(default: checkpoints/ in the run folder)",
    )
    save_interval: int | None = option(None, "steps between checkpoints (default: only at the end)", minimum=1)
    load: str | None = option(
        None,
        "what to start from: a run or checkpoint, a Hugging Face folder, a checkpoint of Megatron or DeepSpeed, a zip "
        "or URL of one (default: --save, where it holds one)",
    )
    qkv_layout: str = option(
        "auto",
        "order of rows of fused q, k, v in Megatron's files (auto: by the file's version)",
        choices=("auto", "grouped", "thirds", "interleaved"),
    )
    swiglu_order: str = option(
        "auto",
        "which half of a fused gated MLP in Megatron's files is the gate",
        choices=("auto", "gate-first", "gate-second"),
    )
    replicas: str = option(
        "equal",
        "copies of one parameter that Megatron's ranks keep must be equal, or are averaged",
        choices=("equal", "average"),
    )
    ckpt_step: int | None = option(None, "iteration to load (default: the latest)", minimum=0)
    keep_last: int = option(3, "newest checkpoints kept; 0 keeps all", minimum=0)
    keep_every: int | None = option(None, "also keep every checkpoint whose iteration is a multiple of this", minimum=1)
    no_save_optim: bool = option(False, "leave the optimizer out of checkpoints")
    no_load_optim: bool = option(False, "load weights but not the optimizer")
    no_save_rng: bool = option(
        False, "accepted: no random state is needed, everything random is a function of seed and step"
    )
    no_load_rng: bool = option(False, "accepted: as --no-save-rng")
    finetune: bool = option(
        False,
        "load weights alone and start at iteration 0, as is done where there is nothing else (Hugging Face folders); "
        "ignored where --save already holds this run",
    )
    use_checkpoint_args: bool = option(
        False, "take the model section, and the tokenizer where none is named, from the checkpoint"
    )
    exit_on_missing_checkpoint: bool = option(False, "accepted: --load without a checkpoint is always an error here")
    fresh: bool = option(False, "start a new run although --save holds one (its files are moved aside)")
