"""Formulas of activation memory against what autograd keeps: unique storages of saved tensors, parameters excluded."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from megalith.common.errors import ConfigError
from megalith.config.run import RunConfig
from megalith.parallel import mesh as meshes
from megalith.planner.activations import activation_bytes, attention_path, end_terms, layer_terms, score_terms
from megalith.runtime.build import build_model, build_runtime

BASE = RunConfig().replace(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    ffn_hidden_size=160,
    seq_length=48,
    max_position_embeddings=48,
    vocab_size=50,
    micro_batch_size=3,
    global_batch_size=3,
    device="cpu",
)
PLAIN = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
FORMS = {
    "explicit": {},
    "explicit, no dropout": {"attention_backend": "explicit", **PLAIN},
    "fused": {"attention_dropout": 0.0},
    "llama": {
        "position_embedding_type": "rope",
        "swiglu": True,
        "normalization": "RMSNorm",
        "num_query_groups": 2,
        "add_bias_linear": False,
        "qk_layernorm": True,
        **PLAIN,
    },
    "alibi": {"position_embedding_type": "alibi", "squared_relu": True, **PLAIN},
    "window": {"position_embedding_type": "rope", "sliding_window": 7, **PLAIN},
    "side by side": {"parallel_attn": True, "embed_layernorm": True, **PLAIN},
    "side by side, two norms": {"parallel_attn": True, "parallel_layernorm": True, **PLAIN},
    "reglu": {"glu_activation": "reglu", **PLAIN},
    "selective": {"recompute_activations": True},
    "selective, grouped": {
        "recompute_activations": True,
        "num_query_groups": 2,
        "position_embedding_type": "rope",
        **PLAIN,
    },
    "full uniform": {"recompute_granularity": "full", "recompute_method": "uniform"},
    "full block": {"recompute_granularity": "full", "recompute_method": "block"},
}
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2 sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def measure(config: RunConfig, model: torch.nn.Module) -> int:
    """Bytes kept by one micro-batch, with the gradients that the loss has made."""
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in model.parameters()]
    weights = {parameter.untyped_storage().data_ptr() for parameter in local}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    shape = config.batch.micro_batch_size, config.data.seq_length
    ids, samples = torch.arange(shape[0] * shape[1]).view(shape) % config.model.vocab_size, torch.arange(shape[0])
    documents = {}
    if config.data.dataset == "chat":  # packed rows of two samples
        documents = {"documents": (torch.arange(shape[1]) >= shape[1] // 2).int().expand(shape)}
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(
            ids, labels=ids, loss_weights=torch.ones(shape), samples=samples, step=torch.tensor(0), **documents
        )
        made = losses.grad_fn.gradients
    return sum(storage.nbytes() for storage in kept.values()) + made.hidden.nbytes + made.weight.nbytes


def of_rank(config: RunConfig) -> int:
    """On each rank of a pool."""
    runtime = build_runtime(config, meshes.init_mesh(config.parallel))
    runtime.train()
    return measure(config, runtime.model)


def of_process(config: RunConfig) -> int:
    from megalith.parallel import recompute

    model = build_model(
        config.model, torch.device("cpu"), getattr(torch, config.precision.compute_dtype), seed=0
    ).train()
    recompute.apply(model, config.recompute)
    return measure(config, model)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_one_process(form, bf16):
    config = BASE.replace(**FORMS[form], bf16=bf16)
    assert activation_bytes(config) == pytest.approx(of_process(config), rel=0.02)


def test_packed_rows_of_chats_have_a_mask_of_documents():
    config = BASE.replace(**FORMS["llama"], dataset="chat")
    assert attention_path(config) == "blocks" and attention_path(config.replace(packing=False)) == "fused"
    assert activation_bytes(config) == pytest.approx(of_process(config), rel=0.02)


def test_the_forms_take_every_path():
    assert {attention_path(BASE.replace(**changes)) for changes in FORMS.values()} == {"explicit", "fused", "blocks"}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["explicit", "llama"])
def test_a_rank_of_tensor_parallelism(ranks, layout, form):
    config = BASE.replace(**FORMS[form], **LAYOUTS[layout])
    for found in ranks(of_rank, 2, config):
        assert activation_bytes(config) == pytest.approx(found, rel=0.02)


def test_sequence_parallelism_divides_all_of_a_layer():
    one = layer_terms(BASE)
    tensor, sequence = (layer_terms(BASE.replace(**LAYOUTS[layout])) for layout in ("tp2", "tp2 sp"))
    assert sequence == {name: size // 2 for name, size in one.items()}
    whole = {name for name, size in tensor.items() if size == one[name]}
    assert whole == {
        "attention_norm.input",
        "attention_norm.statistics",
        "attention.input",
        "attention_dropout.mask",
        "mlp_norm.input",
        "mlp_norm.statistics",
        "mlp.input",
        "mlp_dropout.mask",
    }


def test_selective_recompute_removes_the_square_terms():
    def growth(**changes):
        """Bytes a token for sequences of 64 and of 128: equal where nothing is quadratic."""
        lengths = [
            BASE.replace(seq_length=length, recompute_activations=True).replace(**changes) for length in (64, 128)
        ]
        return [sum(layer_terms(config).values()) / config.data.seq_length for config in lengths]

    short, long = growth()
    assert short == long
    short, long = growth(recompute_activations=False)
    assert long - short == pytest.approx(sum(score_terms(BASE.replace(seq_length=64)).values()) / 64)


def test_ends_and_layers_add_up():
    assert activation_bytes(BASE) == 2 * sum(layer_terms(BASE).values()) + sum(end_terms(BASE).values())
    assert activation_bytes(BASE, layers=1, ends=False) == sum(layer_terms(BASE).values())


def test_of_gpt_alone():
    with pytest.raises(ConfigError, match=r"The model must be GPT, .*; found 'bert'"):
        activation_bytes(BASE.replace(model_type="bert"))
