"""Flags of the Megatron family that set nothing here: why each is not needed, or why it cannot be used.

A command written for Megatron-LM, Megatron-DeepSpeed or their forks runs as typed: a flag that could not change the
result is accepted with a line that says why; one whose meaning cannot be kept is an error that names the way out.
"""

from __future__ import annotations

ONE_KERNEL = (
    "attention is PyTorch's, which takes its flash kernels by itself where they fit (--attention-backend chooses)"
)
COMPILED = "nothing is fused by hand; --compile fuses what can be, with the same formulas"
REDUCTION = "--data-parallel-sharding says how gradients are reduced, in buckets that overlap the backward pass"
FLOAT32 = "weights, accumulated gradients and their sums are float32 already, whatever the compute format"
NO_INIT = "every process draws its own shard of the weights by a counter, the same on every device and layout"
METRICS = "every metric of every step is in metrics.jsonl, and in tensorboard with --tensorboard-dir"
MMAP = "the format of a dataset is recognised by itself, and it is read through a memory map"
PIPELINE = "stages exchange contiguous activations directly; there is nothing to switch"
SPLIT = (
    "encoder and decoder share one layout, and stages are cut where they cost the same (or by --pipeline-split even)"
)
RETRIEVAL = "training does not read it; `megalith index` makes and searches an index of block embeddings"
DEEPSPEED = (
    "DeepSpeed is not used; --data-parallel-sharding takes the place of ZeRO, "
    "and what its config file set belongs in flags"
)
MEMORY = "the allocator of PyTorch is left alone"
RECOMPUTED = "--sequence-parallel splits the saved activations among the tensor-parallel processes"
ANY_LAYOUT = "every checkpoint loads in any layout"
SIGTERM = "SIGTERM finishes the step, saves, exits with status 0 and prints how to resume from there"
PARALLEL_INPUT = "gradients are reduced while the weight gradient is computed, always"
MASKS = "masks are computed where they are used and never built as a whole"
ALWAYS_RETRIEVES = "`pretrain retro` has a retriever; --retro-no-retrieval trains it as if no neighbour had been found"
OWN_MODELS = "there is one implementation of each model"
SAVED = "checkpoints are written by torch's distributed checkpoint, in a format that any layout opens"

_NOT_NEEDED: dict[str, dict[int | str, str]] = {  # reason -> how many values ("?": one or none) -> flags
    ONE_KERNEL: {
        0: "--use-flash-attn --use-flash-attn-v1 --use-flash-attn-v2 --use-flash-attn-triton --use-flash-attn-builder"
    },
    COMPILED: {
        0: "--no-masked-softmax-fusion --no-bias-dropout-fusion --no-persist-layer-norm --no-rope-fusion "
        "--no-bias-swiglu-fusion --cross-entropy-loss-fusion"
    },
    REDUCTION: {
        0: "--no-contiguous-buffers-in-local-ddp --use-contiguous-buffers-in-local-ddp --overlap-grad-reduce "
        "--no-overlap-grad-reduce "
        "--overlap-param-gather --no-delay-grad-reduce",
        1: "--DDP-impl --ddp-bucket-size --ddp-num-buckets",
    },
    FLOAT32: {
        0: "--accumulate-allreduce-grads-in-fp32 --attention-softmax-in-fp32 --embedding-weights-in-fp32 "
        "--no-gradient-accumulation-fusion "
        "--fp16-lm-cross-entropy"
    },
    NO_INIT: {0: "--use-cpu-initialization --no-initialization", "?": "--lazy-mpu-init"},
    METRICS: {
        0: "--log-timers-to-tensorboard --log-batch-size-to-tensorboard --no-log-learnig-rate-to-tensorboard "
        "--no-log-learning-rate-to-tensorboard --no-log-loss-scale-to-tensorboard "
        "--log-validation-ppl-to-tensorboard --log-memory-to-tensorboard "
        "--log-world-size-to-tensorboard --transformer-timers --log-throughput --log-progress",
        1: "--tensorboard-log-interval --tensorboard-queue-size --timing-log-level --timing-log-option",
    },
    MMAP: {0: "--mmap-warmup", 1: "--data-impl --dataset-impl --num-dataset-builder-threads"},
    MASKS: {0: "--no-create-attention-mask-in-dataloader"},
    PIPELINE: {
        0: "--no-scatter-gather-tensors-in-pipeline --no-pipeline-parallel --standalone-embedding-stage "
        "--overlap-p2p-communication "
        "--no-overlap-p2p-communication --use-ring-exchange-p2p"
    },
    PARALLEL_INPUT: {
        0: "--no-async-tensor-model-parallel-allreduce --async-tensor-model-parallel-allreduce --tp-comm-overlap"
    },
    RECOMPUTED: {0: "--distribute-saved-activations --distribute-checkpointed-activations"},
    MEMORY: {0: "--manual-gc", 1: "--empty-unused-memory-level --manual-gc-interval"},
    SIGTERM: {0: "--adlr-autoresume", 1: "--adlr-autoresume-interval"},
    ANY_LAYOUT: {0: "--universal-checkpoint --ckpt-assume-constant-structure"},
    SAVED: {
        0: "--use-dist-ckpt --async-save --ckpt-fully-parallel-save --no-ckpt-fully-parallel-save "
        "--ckpt-fully-parallel-load "
        "--auto-detect-ckpt-format",
        1: "--ckpt-format --dist-ckpt-format --dist-ckpt-strictness",
    },
    OWN_MODELS: {0: "--use-mcore-models --use-legacy-models", 1: "--transformer-impl"},
    DEEPSPEED: {
        0: "--deepspeed --deepspeed-mpi --deepspeed-activation-checkpointing --deepscale --create-moe-param-group "
        "--partition-activations --contigious-checkpointing --checkpoint-in-cpu --synchronize-each-layer "
        "--profile-backward",
        1: "--deepspeed-config --deepscale-config --zero-reduce-bucket-size --zero-allgather-bucket-size",
    },
    ALWAYS_RETRIEVES: {0: "--retro-add-retriever"},
    "a neighbour's document is in the database, by the neighbour's number": {0: "--retro-return-doc-ids"},
    "the launcher's environment says it (LOCAL_RANK)": {1: "--local-rank"},
    "it was for exports to ONNX": {"?": "--onnx-safe"},
    SPLIT: {
        1: "--pipeline-model-parallel-split-rank --encoder-tensor-model-parallel-size "
        "--encoder-pipeline-model-parallel-size",
    },
    "only vision models read it; it has no effect on gpt": {
        1: "--sample-rate --img-h --img-w --num-channels --patch-dim"
    },
    RETRIEVAL: {
        1: "--evidence-data-path --block-data-path --embedding-path --indexer-batch-size --indexer-log-interval",
    },
    "validation reads batches of --global-batch-size": {1: "--eval-micro-batch-size"},
}


def not_needed() -> dict[str, tuple[int | str, str]]:
    """Flag -> (how many values it takes, why it is not needed)."""
    return {
        name: (nargs, reason)
        for reason, groups in _NOT_NEEDED.items()
        for nargs, names in groups.items()
        for name in names.split()
    }


# Words that Megatron lets follow a flag that is not needed here: a typing mistake is one all the same.
CHOICES: dict[str, tuple[str, ...]] = {
    "--DDP-impl": ("local", "torch", "FSDP"),
    "--transformer-impl": ("local", "transformer_engine", "inference_optimized"),
    "--data-impl": ("lazy", "cached", "mmap", "infer"),
    "--dataset-impl": ("lazy", "cached", "mmap", "infer"),
    "--ckpt-format": ("torch", "torch_dist", "torch_dcp", "zarr", "fsdp_dtensor"),
    "--dist-ckpt-format": ("torch_dist", "torch_dcp", "zarr"),
    "--dist-ckpt-strictness": (
        "assume_ok_unexpected", "log_unexpected", "log_all", "raise_unexpected", "raise_all",
        "return_unexpected", "return_all", "ignore_all",
    ),
    "--timing-log-level": ("0", "1", "2"),
    "--timing-log-option": ("flatten", "max", "minmax", "all"),
    "--empty-unused-memory-level": ("0", "1", "2"),
    "--lazy-mpu-init": ("True", "False", "true", "false"),
    "--onnx-safe": ("True", "False", "true", "false"),
}  # fmt: skip
PATHS = (  # flags that are not needed here and take any word; what follows all others is a number
    "--evidence-data-path", "--block-data-path", "--embedding-path", "--deepspeed-config",
    "--deepscale-config",
)  # fmt: skip

NO_EXPERTS = "there are no mixture-of-experts layers; leave it out for a dense model"
NO_FP8 = "there is no FP8 path; use --bf16"
NO_TRACKER = (
    "no tracker is connected; metrics.jsonl in the run folder holds every metric, "
    "--tensorboard-dir writes them for tensorboard"
)

# flag -> (how many values it takes, values with which it changes nothing, why not and what to do instead)
REFUSED: dict[str, tuple[int | str, tuple[str, ...], str]] = {
    "--num-experts": (1, ("1",), NO_EXPERTS),
    "--expert-model-parallel-size": (1, ("1",), NO_EXPERTS),
    "--moe-expert-parallel-size": (1, ("1",), NO_EXPERTS),
    "--mlp-type": (1, ("standard",), NO_EXPERTS),
    "--topk": (1, ("1",), NO_EXPERTS),
    "--moe-router-topk": (1, (), NO_EXPERTS),
    "--moe-loss-coeff": (1, (), NO_EXPERTS),
    "--moe-grouped-gemm": (0, (), NO_EXPERTS),
    "--fp8-format": (1, (), NO_FP8),
    "--fp8-e4m3": (0, (), NO_FP8),
    "--fp8-hybrid": (0, (), NO_FP8),
    "--fp32-residual-connection": (
        0, (), "the residual stream has the compute format; train without --bf16 and --fp16 to have it in float32"
    ),
    "--window-size": (
        1, ("-1,0",),
        "write --sliding-window N: N counts the token itself, which the left side here does not, so 4095,0 is 4096",
    ),
    "--window-attn-skip-freq": (1, (), "name the layers that see everything with --full-attention-layers 0 2 4"),
    "--data-parallel-random-init": (
        0, (), "all data-parallel processes hold one model; leave it out, --seed gives another start"
    ),
    "--retro-cyclic-train-iters": (
        1, (), "the length of a run is --train-iters, and `megalith retro neighbors` finds neighbours for that length"
    ),
    "--retro-attention-gate": (
        1, ("1", "1.0"), "attention to neighbours has no gate; --retro-no-retrieval leaves it out"
    ),
    "--retro-no-verify-neighbor-count": (
        0, (), "neighbours of other samples are never read; find those of this run with `megalith retro neighbors`"
    ),
    "--load-tag": (1, (), "checkpoints are chosen by iteration; use --ckpt-step N"),
    "--wandb-entity-name": (1, (), NO_TRACKER),
    "--wandb-entity": (1, (), NO_TRACKER),
    "--wandb-project-name": (1, (), NO_TRACKER),
    "--wandb-project": (1, (), NO_TRACKER),
    "--wandb-exp-name": (1, (), NO_TRACKER),
    "--label-smoothing": (
        1, ("0", "0.0"), "losses are cross entropies without smoothing; register one of your own with --loss "
                         "module:name"
    ),
    "--decrease-batch-size-if-needed": (
        0, (),
        "a batch size that does not divide is an error, never rounded; "
        "give multiples of micro batch x data-parallel size",
    ),
}  # fmt: skip
