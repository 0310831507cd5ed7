"""Hugging Face's models and ours with the same weights: what every test of this folder compares."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megalith.config.sections.model import ModelConfig
from megalith.models.gpt import GPT

GPT2 = {  # their name -> ours; those of `attn.c_attn` are three of ours, and their matrices are transposed
    "transformer.wte": "embedding",
    "transformer.wpe": "position_embedding",
    "transformer.ln_f": "final_norm",
    "ln_1": "attention_norm",
    "ln_2": "mlp_norm",
    "attn.c_proj": "attention.out",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}
LLAMA = {  # also Qwen2, Qwen3, Mistral
    "model.embed_tokens": "embedding",
    "model.norm": "final_norm",
    "lm_head": "head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.out",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
BLOOM = {
    "transformer.word_embeddings": "embedding",
    "transformer.ln_f": "final_norm",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attention.dense": "attention.out",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
NEOX = {
    "gpt_neox.embed_in": "embedding",
    "gpt_neox.final_layer_norm": "final_norm",
    "lm_head": "head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "attention.dense": "attention.out",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}


def renamed(theirs: dict[str, Tensor], table: dict[str, str], heads: int) -> dict[str, Tensor]:
    """Their parameters, or gradients, under our names. heads: query heads, for the fused rows of Bloom and NeoX."""
    made: dict[str, Tensor] = {}
    for name, value in theirs.items():
        match = re.match(r"(?:transformer\.h|model\.layers|gpt_neox\.layers)\.(\d+)\.(.+)", name)
        layer, rest = (f"layers.{match[1]}.", match[2]) if match else ("", name)
        stem, kind = rest.rsplit(".", 1)
        if "c_attn" in stem or "query_key_value" in stem:
            if "c_attn" in stem:  # q, k, v side by side
                parts = value.t().chunk(3, dim=0) if kind == "weight" else value.chunk(3)
            else:  # q, k, v of one head after those of another
                parts = [part.flatten(0, 1) for part in value.unflatten(0, (heads, 3, -1)).unbind(1)]
            made.update({f"{layer}attention.{p}.{kind}": part for p, part in zip("qkv", parts)})
        else:
            is_conv = ".c_" in f".{stem}" and kind == "weight"  # GPT-2 keeps [in, out]
            made[f"{layer}{table[stem]}.{kind}"] = value.t() if is_conv else value
    return made


VOCAB, WIDTH, HEADS, LAYERS = 97, 48, 4, 3
OURS: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "loss_chunk_tokens": 13,
}
THEIRS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "intermediate_size": 80,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA_FORM: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "ffn_hidden_size": 80,
    "layernorm_epsilon": 1e-6,
}
UNTIED = {"untie_embeddings_and_output_weights": True}


def gpt2(**more: Any) -> transformers.PreTrainedModel:
    config = {
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 64,
        "vocab_size": VOCAB,
        "initializer_range": 0.1,
        **more,
    }
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **config)
    )


def bloom() -> transformers.PreTrainedModel:
    config = {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCAB, "initializer_range": 0.1}
    made = transformers.BloomForCausalLM(transformers.BloomConfig(hidden_dropout=0.0, attention_dropout=0.0, **config))
    made.transformer.word_embeddings_layernorm = torch.nn.Identity()  # Bloom alone has it
    return made


def hugging(kind: str, **more: Any) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{kind}Config")(**{**THEIRS, **more})
    return getattr(transformers, f"{kind}ForCausalLM")(config)


CASES: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "gpt2": (gpt2, GPT2, {"openai_gelu": True}),
    "gpt2, erf": (
        lambda: gpt2(activation_function="gelu", n_inner=70),
        GPT2,
        {"ffn_hidden_size": 70, "bias_gelu_fusion": False},
    ),
    "llama": (lambda: hugging("Llama", rms_norm_eps=1e-6), LLAMA, {**LLAMA_FORM, **UNTIED}),
    "llama, groups": (
        lambda: hugging(
            "Llama", num_key_value_heads=2, rope_theta=5e5, rope_parameters={"rope_type": "default", "rope_theta": 5e5}
        ),
        LLAMA,
        {**LLAMA_FORM, **UNTIED, "num_query_groups": 2, "rotary_base": 5e5},
    ),
    "mistral, one group, wide heads, tied": (
        lambda: hugging("Mistral", num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, sliding_window=None),
        LLAMA,
        {**LLAMA_FORM, "attention_head_type": "multiquery", "kv_channels": 16},
    ),
    "qwen2": (
        lambda: hugging("Qwen2", num_key_value_heads=2),
        LLAMA,
        {**LLAMA_FORM, **UNTIED, "add_qkv_bias": True, "num_query_groups": 2},
    ),
    "qwen3": (
        lambda: hugging("Qwen3", num_key_value_heads=2, head_dim=20, attention_bias=False),
        LLAMA,
        {**LLAMA_FORM, **UNTIED, "qk_layernorm": True, "num_query_groups": 2, "kv_channels": 20},
    ),
    "bloom": (bloom, BLOOM, {"position_embedding_type": "alibi", "openai_gelu": True}),
    "neox, half rotated": (
        lambda: hugging(
            "GPTNeoX",
            use_parallel_residual=False,
            hidden_act="gelu",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        NEOX,
        {
            **UNTIED,
            "position_embedding_type": "rotary",
            "rotary_percent": 0.5,
            "ffn_hidden_size": 80,
            "bias_gelu_fusion": False,
        },
    ),
}


class Pair:
    """An original with random weights (norms and biases too), and ours with the same."""

    def __init__(self, case: str):
        make, self.table, form = CASES[case]
        torch.manual_seed(0)
        self.original = make().float().eval()
        with torch.no_grad():
            for parameter in self.original.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self.model = GPT(ModelConfig(**{**OURS, **form})).eval()
        made, mine = self.renamed(dict(self.original.named_parameters())), dict(self.model.named_parameters())
        assert set(made) == set(mine), set(made) ^ set(mine)
        with torch.no_grad():
            for name, value in made.items():
                mine[name].copy_(value)

    def renamed(self, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The original's parameters, or their gradients, under our names."""
        return renamed(theirs, self.table, HEADS)


@pytest.fixture
def pair() -> Callable[[str], Pair]:
    """`pair(case)` for a case of CASES."""
    return Pair


@pytest.fixture(params=CASES)
def each_pair(request: pytest.FixtureRequest) -> Pair:
    """Every case in turn."""
    return Pair(request.param)
