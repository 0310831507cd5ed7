"""The section `finetuning`: a task that a trained model is finetuned on, and for how many epochs."""

from __future__ import annotations

from megalith.config.options import option, section


@section
class FinetuneConfig:
    """What `megalith finetune` adds to a run. (The section is not called `finetune`, which is a flag of Megatron's.)"""

    task: str | None = option(
        None, "what to finetune on: the name of a task (megalith finetune --help lists them), or a FILE.yaml"
    )
    train_data: list[str] = option([], "files or folders of the task to train on")
    valid_data: list[str] = option([], "files or folders of the task to validate on, each measured whole and by name")
    epochs: float | None = option(
        None, "passes over --train-data, instead of --train-iters; 0: only validate what is loaded", minimum=0.0
    )
    pretrained_checkpoint: str | None = option(
        None, "weights to start from, in any format that --load takes; the same as --load with --finetune"
    )
    retro_freeze: bool = option(
        False, "retro: train what reads neighbours alone, and leave the GPT that the weights are of as it is"
    )
    keep_best: bool = option(
        True, "keep the checkpoint that is best on all of --valid-data, however many --keep-last keeps"
    )
