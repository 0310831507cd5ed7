"""GPT-NeoX's folders, written from a transformers model as NeoX saves it, give that model's logits in every layout.

Models that cannot be read are refused.
"""

import json
import pathlib

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megalith.checkpoint import formats
from megalith.checkpoint.weights import write as write_own
from megalith.common.errors import CheckpointError
from megalith.runtime.load import load_model
from tests.checkpoint.formats.deepspeed.test_megatron_deepspeed import write_zero_shards
from tests.checkpoint.megatron_files import Tensors

LAYERS, HIDDEN, HEADS, PADDED = 3, 32, 4, 128
COLUMNS = (
    "attention.query_key_value.weight",
    "attention.query_key_value.bias",
    "mlp.dense_h_to_4h.weight",
    "mlp.dense_h_to_4h.bias",
)
ROWS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
BIASES = ("attention.dense.bias", "mlp.dense_4h_to_h.bias")
FORMS = {  # of transformers' config
    "pythia": dict(rotary_pct=0.25, use_parallel_residual=True, hidden_act="gelu"),
    "20b": dict(rotary_pct=0.5, use_parallel_residual=True, hidden_act="gelu_new", rotary_emb_base=5000),
    "sequential": dict(rotary_pct=1.0, use_parallel_residual=False, hidden_act="gelu"),
    "tied": dict(rotary_pct=0.25, use_parallel_residual=True, hidden_act="relu", tie_word_embeddings=True),
}


def original(**form) -> GPTNeoXForCausalLM:
    """A small model whose biases and norms are drawn too."""
    sizes = dict(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=96, vocab_size=100
    )
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, max_position_embeddings=32, layer_norm_eps=1e-4, **form)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.dim() == 1 else 0))
    return model


def modules_of(model: GPTNeoXForCausalLM, ranks: int, rank: int) -> dict[int, Tensors]:
    """{number: tensors} of the modules of NeoX's pipeline that have parameters, for one tensor-parallel rank."""
    given = {name.removeprefix("gpt_neox."): each for name, each in model.state_dict().items()}
    given["embed_out.weight"] = model.get_output_embeddings().weight.detach()

    def words(name: str) -> torch.Tensor:
        return torch.cat([given[name], torch.ones(PADDED - 100, HIDDEN)]).chunk(ranks)[rank].clone()

    found: dict[int, Tensors] = {0: {"word_embeddings.weight": words("embed_in.weight")}}
    frequencies = model.gpt_neox.rotary_emb.inv_freq
    for number in range(LAYERS):
        of_layer = {
            name.removeprefix(f"layers.{number}."): each
            for name, each in given.items()
            if name.startswith(f"layers.{number}.")
        }
        module = {"attention.rotary_emb.inv_freq": frequencies.clone()}
        for name, each in of_layer.items():
            if name in COLUMNS or name in ROWS:
                each = each.chunk(ranks, 1 if name in ROWS else 0)[rank]
            elif name in BIASES and model.config.use_parallel_residual:  # every rank adds its own
                each = each * (0.25 if rank else 1 - 0.25 * (ranks - 1))
            module[name] = each.clone()
        found[2 + number] = module
    found[LAYERS + 3] = {f"norm.{kind}": given[f"final_layer_norm.{kind}"].clone() for kind in ("weight", "bias")}
    tied = model.config.tie_word_embeddings
    found[LAYERS + 4] = (
        {"word_embeddings.weight": words("embed_in.weight")}
        if tied
        else {"final_linear.weight": words("embed_out.weight")}
    )
    return found


def write(folder: pathlib.Path, model: GPTNeoXForCausalLM, ranks: int, pipelined: bool, **more) -> pathlib.Path:
    """Write this model as NeoX saves it, with its optimizer; `more` are entries of configs/, None removes one."""
    c, place = model.config, folder / "global_step7"
    (place / "configs").mkdir(parents=True)
    args = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": 32,
            "make_vocab_size_divisible_by": 64, "padded_vocab_size": PADDED, "tokenizer_type": "HFTokenizer",
            "model_parallel_size": ranks}  # fmt: skip
    rope = c.rope_parameters
    said = {"pipe-parallel-size": int(pipelined), "model-parallel-size": ranks, "num-layers": LAYERS,
            "hidden-size": HIDDEN, "num-attention-heads": HEADS, "seq-length": 32, "max-position-embeddings": 32,
            "norm": "layernorm", "pos-emb": "rotary", "rotary-pct": rope["partial_rotary_factor"],
            "rotary-emb-base": rope["rope_theta"], "layernorm-epsilon": c.layer_norm_eps,
            "no-weight-tying": not c.tie_word_embeddings, "gpt-j-residual": c.use_parallel_residual,
            "attention-config": [[["flash"], 3]], "bias-gelu-fusion": c.hidden_act == "gelu_new",
            "fp16": {"enabled": True}, "vocab-file": "/x/20B_tokenizer.json",
            "activation": "relu" if c.hidden_act == "relu" else "gelu"}  # fmt: skip
    said = {
        name: value
        for name, value in (said | {n.replace("_", "-"): v for n, v in more.items()}).items()
        if value is not None
    }
    (place / "configs/model.yml").write_text("# a comment, as NeoX's files have\n" + json.dumps(said, indent=1))
    flat = []
    for rank in range(ranks):
        modules = modules_of(model, ranks, rank)
        tied = c.tie_word_embeddings
        named: Tensors = {}
        for number, module in modules.items():
            before = (
                "tied_modules.embed."
                if tied and pipelined and number == 0
                else f"{'' if pipelined else 'sequential.'}{number}."
            )
            for name, each in module.items():
                if "inv_freq" not in name and not (tied and number == LAYERS + 4):
                    named[before + name] = each
        flat.append(named)
        shapes = [
            {name: each.shape for name, each in named.items() if (each.dim() > 1) is wanted} for wanted in (True, False)
        ]
        content = {"module": None, "args": args, "iteration": 7, "param_shapes": shapes}
        if pipelined:
            for number, module in modules.items():
                torch.save(module, place / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
        else:
            last = LAYERS + 4
            whole = {n: m for n, m in modules.items() if not (tied and n == last)}
            content["module"] = {
                f"sequential.{n}.{name}": each for n, module in whole.items() for name, each in module.items()
            }
        torch.save(content, place / f"mp_rank_{rank:02d}_model_states.pt")
    write_zero_shards(place, flat, 2, False, "")
    (folder / "latest").write_text("global_step7")
    return folder


@pytest.mark.parametrize("ranks, pipelined", [(1, True), (2, True), (2, False)])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_transformers(tmp_path: pathlib.Path, form: str, ranks: int, pipelined: bool) -> None:
    model = original(**FORMS[form])
    weights = formats.read(
        write(tmp_path / "neox", model, ranks, pipelined), options=dict(overrides={"vocab_size": 100})
    )
    assert formats.recognise(tmp_path / "neox") == "deepspeed" and weights.iteration == 7
    imported = load_model(write_own(weights, tmp_path / "ours"), device="cpu")[0]
    ids = torch.randint(100, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = model(ids).logits, imported(ids)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    summed = any("are summed over tensor-parallel ranks" in note for note in weights.notes)
    assert summed is (ranks > 1 and FORMS[form]["use_parallel_residual"])


@pytest.mark.parametrize("pipelined", [True, False], ids=["layer files", "sequential"])
@pytest.mark.parametrize("form", ["pythia", "tied"])
def test_optimizer(tmp_path: pathlib.Path, form: str, pipelined: bool) -> None:
    """Every parameter has its state. Each rank's gradient of a summed bias is that of the sum, so states are copies."""
    model = original(**FORMS[form])
    folder = write(tmp_path, model, 1, pipelined)
    weights = formats.read(folder, options=dict(with_optimizer=True, overrides={"vocab_size": 100}))
    for name in [name for name in weights if name.startswith("model/")]:
        moment = name.replace("model/", "optimizer/exp_avg/")
        assert torch.allclose(weights[moment], weights[name] + 1), name


REFUSED = [
    ("pos_emb", "sinusoidal"), ("pos_emb", "rpe"), ("norm", "rmsnorm"), ("norm", "scalenorm"), ("activation", "geglu"),
    ("activation", "swish"), ("gpt_j_tied", True), ("attention_config", [[["local"], 3]]),
    ("attention_config", [[["global", "gmlp"], 2]]), ("use_mup", True), ("num_kv_heads", 2), ("num_unique_layers", 1),
    ("soft_prompt_tuning", {"enabled": True}), ("opt_pos_emb_offset", 2),
    ("moe_num_experts", 8), ("sliding_window_width", 128), ("mlp_type", "llama"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: pathlib.Path, name: str, value: object) -> None:
    folder = write(tmp_path, original(**FORMS["pythia"]), 1, True, **{name: value})
    with pytest.raises(
        CheckpointError, match=rf"{name} of GPT-NeoX .*read here; found .*\. Train without it, or convert with GPT-NeoX"
    ):
        formats.read(folder)


def test_sources_of_arguments_that_disagree(tmp_path: pathlib.Path) -> None:
    model = original(**FORMS["pythia"])
    with pytest.raises(
        CheckpointError,
        match=r"num_attention_heads of GPT-NeoX must be the same .*; found 4 in args of the model states, 2 in .*\.yml",
    ):
        formats.read(write(tmp_path / "a", model, 1, True, num_attention_heads=2))
    other = original(**FORMS["20b"])
    for name, value in (("rotary_pct", 0.25), ("rotary_emb_base", 500000), ("pos_emb", "none")):
        message = (
            r"rotary_emb.inv_freq of GPT-NeoX must be [012] frequencies.*, as pos_emb, .* give; found 2 frequencies"
        )
        with pytest.raises(CheckpointError, match=message):
            formats.read(write(tmp_path / name, other, 1, True, **{name: value}))
    with pytest.raises(CheckpointError, match=r"not in the file: \['head.weight'\]"):
        formats.read(write(tmp_path / "b", original(**FORMS["tied"]), 1, True, no_weight_tying=True))
    with pytest.raises(CheckpointError, match=r"embedding.word_embeddings.weight and output_layer.weight differ"):
        formats.read(write(tmp_path / "c", model, 1, True, no_weight_tying=False))


def test_arguments_that_tensors_or_others_contradict(tmp_path: pathlib.Path) -> None:
    model = original(**FORMS["pythia"])
    for name in ("use_bias_in_attn_linear", "use_bias_in_norms", "use_bias_in_mlp"):
        with pytest.raises(
            CheckpointError, match=rf"{name} of GPT-NeoX must agree .*; found False, and the tensors have \w+.*bias"
        ):
            formats.read(write(tmp_path / name, model, 1, True, **{name: False}))
        formats.read(write(tmp_path / f"{name} true", model, 1, True, **{name: True}))
    with pytest.raises(
        CheckpointError, match=r"Activation of GPT-NeoX must agree with .*; found relu, and openai_gelu is True"
    ):
        formats.read(write(tmp_path / "relu", original(**FORMS["tied"]), 1, True, openai_gelu=True))
    other = original(**FORMS["20b"])
    weights = formats.read(write(tmp_path / "tanh", other, 1, True, openai_gelu=True, bias_gelu_fusion=None))
    assert weights.config.model.activation == "gelu_tanh"


def test_without_its_configs_flags_say_what_no_tensor_does(tmp_path: pathlib.Path) -> None:
    model = original(**FORMS["pythia"])
    folder = write(tmp_path / "neox", model, 2, True)
    (folder / "global_step7/configs/model.yml").unlink()
    flags = "--position-embedding-type, --rotary-percent, --parallel-attn"
    message = rf"must have its configs/\*\.yml, .*; found none\. Copy configs/ along, or give {flags}"
    with pytest.raises(CheckpointError, match=message):
        formats.read(folder)
    given = dict(position_embedding_type="rope", rotary_percent=0.25, parallel_attn=True, layernorm_epsilon=1e-4)
    weights = formats.read(folder, options=dict(overrides=given | {"vocab_size": 100}))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = model(ids).logits
        found = load_model(write_own(weights, tmp_path / "ours"), device="cpu")[0](ids)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_copies_and_layers_are_checked_here_too(tmp_path: pathlib.Path) -> None:
    sequential = write(tmp_path / "a", original(**FORMS["sequential"]), 2, True)
    file = sequential / "global_step7/layer_03-model_01-model_states.pt"
    content = torch.load(file)
    content["attention.dense.bias"] += 1
    torch.save(content, file)
    # A copy where residuals are not parallel
    with pytest.raises(CheckpointError, match=r"layers.1.self_attention.dense.bias: .* differ by up to 1,"):
        formats.read(sequential)
    folder = write(tmp_path / "b", original(**FORMS["pythia"]), 1, True)
    (folder / "global_step7/layer_04-model_00-model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="num_layers: the tensors have 2, the arguments say 3"):
        formats.read(folder)
