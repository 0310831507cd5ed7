"""Old and foreign spellings of flags, as tables. They act, and a line names the new spelling.

Flags of Megatron that set nothing here are in config/megatron/flags.py.
"""

from __future__ import annotations

from typing import Any

VALUE = "VALUE"  # stands for what follows the flag

RENAMED: dict[str, dict[str, Any]] = {
    # Megatron-LM before 2.0
    "--batch-size": {"micro_batch_size": VALUE},
    "--warmup": {"lr_warmup_fraction": VALUE},  # it was a fraction already, of all iterations
    "--checkpoint-activations": {"recompute_granularity": "full", "recompute_method": "uniform"},
    "--checkpoint-num-layers": {"recompute_num_layers": VALUE},
    # Megatron-LM before 3.0, and READMEs and examples since
    "--activations-checkpoint-method": {"recompute_granularity": "full", "recompute_method": VALUE},
    "--activations-checkpoint-num-layers": {"recompute_num_layers": VALUE},
    "--no-query-key-layer-scaling": {"apply_query_key_layer_scaling": False},
    "--ict-load": {"load": VALUE},
    "--encoder-num-layers": {"num_layers": VALUE},
    "--encoder-seq-length": {"seq_length": VALUE},
    # Megatron core
    "--use-rope-scaling": {"rope_scaling_type": "llama3"},
    "--rotary-seq-len-interpolation-factor": {"rope_scaling_type": "linear", "rope_scaling_factor": VALUE},
    "--retro-project-dir": {"retro_workdir": VALUE},
    # Hugging Face's fork
    "--finetune-from": {"load": VALUE, "finetune": True},
    # Megatron-DeepSpeed
    "--no-position-embedding": {"position_embedding_type": "none"},
    "--ds-sequence-parallel-size": {"context_parallel_size": VALUE},
    "--train-tokens": {"train_tokens": VALUE},
    "--lr-decay-tokens": {"lr_decay_tokens": VALUE},
    "--lr-warmup-tokens": {"lr_warmup_tokens": VALUE},
}

BY_VALUE: dict[str, dict[str, dict[str, Any]]] = {  # the value decides what is set
    "--zero-stage": {
        "0": {"data_parallel_sharding": "none"},
        "0.0": {"data_parallel_sharding": "none"},
        "1": {"data_parallel_sharding": "optimizer"},
        "1.0": {"data_parallel_sharding": "optimizer"},
        "2": {"data_parallel_sharding": "optimizer"},
        "3": {"data_parallel_sharding": "full"},
    },
    "--data-parallel-sharding-strategy": {
        "no_shard": {"data_parallel_sharding": "none"},
        "optim": {"data_parallel_sharding": "optimizer"},
        "optim_grads": {"data_parallel_sharding": "optimizer"},
        "optim_grads_params": {"data_parallel_sharding": "full"},
    },
}

# Keys that are no fields: a count of tokens is divided by seq_length once all layers of the config are known.
IN_TOKENS = {
    "train_tokens": "train_samples",
    "lr_decay_tokens": "lr_decay_samples",
    "lr_warmup_tokens": "lr_warmup_samples",
}
