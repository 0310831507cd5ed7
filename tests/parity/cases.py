"""The tables of the parity tests: forms of the models, and layouts. A new form or layout is a row here."""

import dataclasses

import torch

from megalith.config.architectures import GPT, ICT
from megalith.config.run import RunConfig
from megalith.testing import batches


def padded(config: RunConfig, step: int = 0) -> batches.Batch:
    """As `batches.gpt`, with padding before the tokens of a sample, after them, on both sides or nowhere."""
    batch, s = batches.gpt(config, step), config.data.seq_length
    first, last = torch.tensor([[s // 3], [0], [2], [0]]), torch.tensor([[s], [s - 5], [s - 3], [s]])
    mask = (torch.arange(s) >= first) & (torch.arange(s) < last)
    return batch | {"padding_mask": mask.repeat(len(batch["input_ids"]) // 4, 1)}


def hard_negatives(config: RunConfig, step: int = 0) -> batches.Batch:
    """As `batches.ict`, with two contexts that are wrong for each query, of which some are not there."""
    batch = batches.ict(config, step, contexts=3)
    b = len(batch["query_ids"])
    mask = torch.ones(b, 3, dtype=torch.long)
    mask[1::2, 2] = 0
    return batch | {"context_mask": mask, "document": torch.arange(3 * b).view(b, 3) % (2 * b)}


HARD_NEGATIVES = dataclasses.replace(ICT, name="hard negatives", batch="tests.parity.cases:hard_negatives")
PADDED = dataclasses.replace(GPT, name="padded", batch="tests.parity.cases:padded")

SMALL = RunConfig().replace(
    num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=48, max_position_embeddings=16,
    seq_length=16, vocab_size=64,
    hidden_dropout=0.0, attention_dropout=0.0, init_method_std=0.2, loss_chunk_tokens=24, micro_batch_size=1,
    global_batch_size=4,
    device="cpu",
)  # fmt: skip

T5_RELATIVE = {
    "model_type": "t5", "decoder_seq_length": 8, "kv_channels": 12, "position_embedding_type": "relative",
    "normalization": "RMSNorm",
    "add_bias_linear": False, "softmax_scale": 1.0, "initializer_factor": 1.0, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}  # fmt: skip
RETRO = {
    "model_type": "retro", "num_layers": 3, "retro_layer_numbers": [2, 3], "retro_gpt_chunk_length": 4,
    "retro_encoder_hidden_dropout": 0.0, "retro_encoder_attention_dropout": 0.0,
}  # fmt: skip
FORMS: dict[str, dict] = {
    "absolute": {},
    "rotary": {
        "position_embedding_type": "rope", "group_query_attention": True, "num_query_groups": 2, "swiglu": True,
        "untie_embeddings_and_output_weights": True, "normalization": "RMSNorm", "add_bias_linear": False,
        "qk_layernorm": True,
    },
    "alibi": {"position_embedding_type": "alibi", "attention_head_type": "multiquery", "squared_relu": True},
    "odd vocabulary": {"vocab_size": 67},
    "odd layers": {"num_layers": 3, "position_embedding_type": "rope", "untie_embeddings_and_output_weights": True},
    "post norm": {"apply_residual_connection_post_layernorm": True, "openai_gelu": True, "reset_attention_mask": True},
    "window": {
        "sliding_window": 5, "full_attention_layers": [1], "position_embedding_type": "rope",
        "rope_scaling_type": "llama3",
        "rope_original_max_position_embeddings": 12,
    },
    "norm plus one": {
        "normalization": "RMSNorm", "apply_layernorm_1p": True, "scale_embeddings": True,
        "glu_activation": "geglu_tanh",
        "position_embedding_type": "rope", "add_bias_linear": False,
    },
    "side by side": {"parallel_attn": True, "attention_head_type": "multiquery", "position_embedding_type": "rope"},
    "embedding norm": {
        "position_embedding_type": "alibi", "scaled_alibi": True, "embed_layernorm": True, "parallel_attn": True,
        "parallel_layernorm": True,
    },
    "dropout": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "padding": {"model_type": "tests.parity.cases:PADDED", "position_embedding_type": "rope"},
    "padding alibi": {
        "model_type": "tests.parity.cases:PADDED", "position_embedding_type": "alibi", "reset_attention_mask": True,
        "hidden_dropout": 0.1, "attention_dropout": 0.1,
    },
    "bert": {"model_type": "bert", "vocab_size": 67},
    "bert google": {"model_type": "bert", "norm_after_residual": True, "untie_embeddings_and_output_weights": True},
    "bert dropout": {"model_type": "bert", "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "bert no order": {"model_type": "bert", "bert_no_binary_head": True, "normalization": "RMSNorm", "swiglu": True},
    "bert classes": {
        "model_type": "bert_classification", "num_classes": 3, "hidden_dropout": 0.1, "classifier_dropout": 0.3,
    },
    "bert choices": {"model_type": "bert_multiple_choice", "norm_after_residual": True, "hidden_dropout": 0.1},
    "t5": {"model_type": "t5", "decoder_num_layers": 3, "decoder_seq_length": 8},
    "t5 relative": {
        **T5_RELATIVE, "num_query_groups": 2, "glu_activation": "geglu_tanh",
        "untie_embeddings_and_output_weights": True,
    },
    "t5 dropout": {
        **T5_RELATIVE, "relu": True, "scale_output": True, "hidden_dropout": 0.1, "attention_dropout": 0.1,
        "vocab_size": 67,
    },
    "ict": {
        "model_type": "ict", "biencoder_projection_dim": 12, "vocab_size": 67, "retriever_mask_same_document": True,
        "hidden_dropout": 0.1, "attention_dropout": 0.1,
    },
    "ict shared": {
        "model_type": "ict", "biencoder_shared_query_context_model": True, "norm_after_residual": True,
        "retriever_score_scaling": True, "hidden_dropout": 0.1,
    },
    "ict hard": {
        "model_type": "tests.parity.cases:HARD_NEGATIVES", "bert_no_binary_head": True, "hidden_dropout": 0.1,
        "retriever_chunk_queries": 3, "retriever_mask_same_document": True,
    },
    "retro": RETRO,
    "retro rotary": {
        **RETRO, "position_embedding_type": "rope", "num_query_groups": 2, "swiglu": True, "normalization": "RMSNorm",
        "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "retro_layer_numbers": [1, 3],
    },
    "retro dropout": {
        **RETRO, "hidden_dropout": 0.1, "attention_dropout": 0.1, "retro_encoder_hidden_dropout": 0.2,
        "retro_encoder_attention_dropout": 0.2, "embed_layernorm": True, "vocab_size": 67,
    },
    "lora retro": {**RETRO, "lora_rank": 4},
    "lora": {
        "position_embedding_type": "rope", "group_query_attention": True, "num_query_groups": 2, "swiglu": True,
        "normalization": "RMSNorm", "lora_rank": 4, "lora_alpha": 8.0,
    },
    "lora dropout": {
        "hidden_dropout": 0.1, "lora_rank": 3, "lora_dropout": 0.2,
        "lora_target_modules": ["q", "v", "layers.*.mlp.*"],
    },
    "lora ict": {"model_type": "ict", "lora_rank": 4, "lora_dropout": 0.1},
    "lora bert": {"model_type": "bert", "lora_rank": 4, "lora_dropout": 0.1},
    "lora classes": {
        "model_type": "bert_classification", "num_classes": 3, "lora_rank": 4, "lora_dropout": 0.1,
        "classifier_dropout": 0.3,
    },
    "dora": {
        "num_query_groups": 1, "group_query_attention": True, "lora_rank": 3, "lora_alpha": 6.0, "lora_dropout": 0.1,
        "use_dora": True,
    },
    "lora t5": {**T5_RELATIVE, "num_query_groups": 2, "lora_rank": 4},
}  # fmt: skip

# name -> (ranks, what differs from one process)
LAYOUTS: dict[str, tuple[int, dict]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp4 sp": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),
    "dp2 none": (2, {}),
    "dp2 optimizer": (2, {"use_distributed_optimizer": True}),
    "dp2 full": (2, {"data_parallel_sharding": "full"}),
    "dp 2x2": (4, {"data_parallel_sharding": "full", "data_parallel_replicas": 2}),
    "tp2 dp2": (4, {"tensor_model_parallel_size": 2}),
    "tp2 dp2 optimizer": (4, {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}),
    "tp2 sp dp2 full": (
        4,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "data_parallel_sharding": "full"},
    ),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp4": (4, {"context_parallel_size": 4}),
    "cp2 tp2": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "cp2 tp2 sp": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2 dp2": (4, {"context_parallel_size": 2}),
    "cp2 dp2 optimizer": (4, {"context_parallel_size": 2, "use_distributed_optimizer": True}),
    "cp2 pp2": (4, {"context_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "cp2 selective": (2, {"context_parallel_size": 2, "recompute_activations": True}),
    "cp2 full uniform": (
        2,
        {
            "context_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 2,
        },
    ),
    "cp2 compile": (2, {"context_parallel_size": 2, "compile": True}),
    "cp2 selective compile": (2, {"context_parallel_size": 2, "recompute_activations": True, "compile": True}),
    "tp2 compile": (2, {"tensor_model_parallel_size": 2, "compile": True}),
    "tp2 sp compile": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "compile": True}),
}

PIPELINES: dict[str, tuple[int, dict]] = {
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2 gpipe": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "gpipe"}),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "pp2 interleaved": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved_1f1b"}),
    "pp2 zero-bubble": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zero_bubble"}),
    "zbv": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}),
    "dualpipev": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "dualpipev"}),
    "tp2 pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2 sp zbv": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "pipeline_schedule": "zbv",
        },
    ),
    "cp2 pp2 interleaved": (
        4,
        {"context_parallel_size": 2, "pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved_1f1b"},
    ),
    "cp2 zbv selective": (
        4,
        {
            "context_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "pipeline_schedule": "zbv",
            "recompute_activations": True,
        },
    ),
    "pp2 dp2": (4, {"pipeline_model_parallel_size": 2}),
    "zbv dp2 full": (
        4,
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv", "data_parallel_sharding": "full"},
    ),
    "tp2 pp2 dp2": (8, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "pp2 compile": (2, {"pipeline_model_parallel_size": 2, "compile": True}),
    "pp2 full uniform": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 2,
        },
    ),
    "zbv selective": (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv", "recompute_activations": True},
    ),
}
LAYOUTS |= PIPELINES


def config_of(form: str, layout: str | None = None, deep: bool = False) -> RunConfig:
    """The config of a form, of one process where no layout is named. deep: with two more layers, as pipelines have."""
    config = SMALL.replace(**FORMS[form])
    config = config.replace(**config.model.architecture.defaults)
    if deep or layout in PIPELINES:
        config = config.replace(num_layers=config.model.num_layers + 2)
    return config.replace(micro_batch_size=4) if layout is None else config.replace(**LAYOUTS[layout][1])
