"""Hugging Face folders: read, written back bit for bit, and refused where they are damaged."""

import json
import pathlib
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import megalith
from megalith import checkpoint
from megalith.checkpoint import formats
from megalith.checkpoint.formats import HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.family import architecture_fields
from megalith.checkpoint.weights import Weights, read_megalith, write
from megalith.common.errors import CheckpointError
from megalith.config.flags.loading import to_yaml
from megalith.config.parameters import parameter_shapes
from megalith.config.run import RunConfig
from megalith.data.tokenizers.tokenizer import build_tokenizer
from megalith.runtime.build import build_model
from megalith.runtime.state import weights as weights_of
from tests.checkpoint.formats.huggingface.folders import change_config
from tests.originals.families import BERTS, MODELS
from tests.originals.test_t5 import original
from tests.toy import make_corpus


@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_is_bit_exact(name: str, folder, tmp_path: pathlib.Path) -> None:
    theirs = folder(name)
    write(formats.read(theirs), tmp_path / "ours")
    huggingface.write(read_megalith(tmp_path / "ours"), tmp_path / "back", HuggingFaceOptions(max_shard_size=40_000))
    before, after = load_file(theirs / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    index = json.loads((tmp_path / "back/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == before.keys()
    ids = torch.randint(90, (2, 20))
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(each).eval()(ids).logits
        for each in (theirs, tmp_path / "back")
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_a_config_of_our_own_making_is_the_same_model(name: str, folder, tmp_path: pathlib.Path) -> None:
    """Without the config.json it came from, as a model trained here has none."""
    theirs = folder(name)
    weights = replace(formats.read(theirs), files={})
    huggingface.write(weights, tmp_path / "back", HuggingFaceOptions())
    ids = torch.randint(90, (2, 40))
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(each).eval()(ids).logits
        for each in (theirs, tmp_path / "back")
    )
    assert torch.equal(one, other) or (one - other).abs().max() < 1e-5
    again = formats.read(tmp_path / "back")
    assert architecture_fields(again.config.model) == architecture_fields(weights.config.model)


@pytest.mark.parametrize("name", ["gpt2", "llama, groups, tied"])
def test_bin_and_dtype(name: str, folder, tmp_path: pathlib.Path) -> None:
    theirs = folder(name)
    huggingface.write(
        formats.read(theirs),
        tmp_path / "back",
        HuggingFaceOptions(safetensors=False, dtype="bfloat16", max_shard_size=40_000),
    )
    assert len(list((tmp_path / "back").glob("pytorch_model-*.bin"))) > 1 and not list(
        (tmp_path / "back").glob("*.safetensors")
    )
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert made.dtype == torch.bfloat16
    original = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.bfloat16)
    assert all(
        torch.equal(one, other) for one, other in zip(made.state_dict().values(), original.state_dict().values())
    )
    again = formats.read(tmp_path / "back")
    assert again.config.precision.bf16 and {lazy.dtype for lazy in again.tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
def test_files_of_the_bare_model(name: str, folder, tmp_path: pathlib.Path) -> None:
    """As gpt2's on the hub: names without the model's prefix, and masks that are no weights."""
    theirs = folder(name)
    state = load_file(theirs / "model.safetensors")
    prefix = {"llama": "model."}.get(name, "transformer.")
    bare = {key.removeprefix(prefix): value for key, value in state.items()}
    extra = {"gpt2": "h.0.attn.bias", "llama": "layers.0.self_attn.rotary_emb.inv_freq", "bloom": "other"}[name]
    save_file({**bare, extra: torch.ones(1)}, theirs / "model.safetensors")
    found = formats.read(theirs)
    assert len(found) == len(parameter_shapes(found.config.model))
    assert found.notes == (("left out, as this model has no use for them: other",) if name == "bloom" else ())


ERRORS = [
    (
        {"model_type": "rwkv"},
        r"model_type must be one of .*gpt2, .*; found 'rwkv'. Convert a model of one of these",
    ),
    (
        {"hidden_size": "absent"},
        r"config.json has no hidden_size, which LlamaForCausalLM needs; found \[.*\]. Add what is missing",
    ),
    (
        {"attention_bias": True},
        r"attention_bias must be False for LlamaForCausalLM: nothing else is implemented; found True. This model",
    ),
    ({"hidden_act": "gelu_10"}, r"activation must be one of silu, .*; found 'gelu_10'"),
    (
        {"rope_parameters": {"rope_type": "longrope"}},
        r"rope_parameters must have a rope_type of default, dynamic, .*; found \{'rope_type': 'longrope'\}",
    ),
    (
        {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
        r"rope_scaling must have .* with all fields of that type .*; found \{'type': 'linear'\}",
    ),
    (
        {"intermediate_size": 64},
        r"must have the shapes .*; found \['model.layers.0.mlp.gate_proj.weight of shape \[80, 48\] instead of \[64",
    ),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        r"weights must be in .* and not quantized; found 'bitsandbytes'. Save the model dequantized",
    ),
    (
        {"num_hidden_layers": 4},
        r"must be all those of LlamaForCausalLM, .* found 9 missing: model.layers.3.input_layernorm.weight, .*Copy all",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[next(iter(changes)) for changes, _ in ERRORS])
def test_what_does_not_fit_is_named(changes: dict, message: str, folder) -> None:
    theirs = folder("llama")
    change_config(theirs, **changes)
    with pytest.raises(CheckpointError, match=message):
        formats.read(theirs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype: torch.dtype, folder) -> None:
    theirs = folder("llama")
    state = load_file(theirs / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**state, name: state[name].to(dtype), f"{name}_scale": torch.ones(1)}, theirs / "model.safetensors")
    message = f"weights must be in .* and not quantized; found '{name}: {dtype}'. Save the model dequantized"
    with pytest.raises(CheckpointError, match=message):
        formats.read(theirs)


def test_a_form_that_no_family_has_is_named(tmp_path: pathlib.Path) -> None:
    config = RunConfig().replace(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=9,
        max_position_embeddings=4,
        squared_relu=True,
        qk_layernorm=True,
    )
    weights = Weights(config=config, tensors={})
    with pytest.raises(
        CheckpointError,
        match=r"has fields that GPT2LMHeadModel cannot represent, nor can another .*; found qk_layernorm True\. Export",
    ):
        huggingface.write(weights, tmp_path / "a", HuggingFaceOptions())
    with pytest.raises(
        CheckpointError,
        match=r"has fields that LlamaForCausalLM cannot represent; found activation squared_relu\. Export to megatron",
    ):
        huggingface.write(
            replace(weights, config=config.replace(position_embedding_type="rope")),
            tmp_path / "a",
            HuggingFaceOptions(architecture="llama"),
        )


def test_not_a_format(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"The source must be an existing file or folder; found '.*nothing'. Correct the path"
    ):
        formats.read(tmp_path / "nothing")
    (tmp_path / "a").touch()
    message = r"must be in one of the known formats \(megalith: a folder with manifest.json.*; found \['a'\]"
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path)


def test_a_model_trained_here_with_its_tokenizer(tmp_path: pathlib.Path) -> None:
    """From a checkpoint as a run leaves it to transformers' model and tokenizer."""
    make_corpus(tmp_path)
    tokenizer = build_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt")
    )
    tokenizer.save(tmp_path / "tokenizer")
    config = RunConfig().replace(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=tokenizer.vocab_size,
        max_position_embeddings=32, seq_length=32, init_method_std=0.3,
    )  # fmt: skip
    model = build_model(config.model, torch.device("cpu"), seed=1)
    files = {f"tokenizer/{file.name}": file for file in (tmp_path / "tokenizer").iterdir()}
    checkpoint.save(tmp_path / "run", 5, weights_of(model), train_state={}, config_yaml=to_yaml(config), files=files)
    huggingface.write(read_megalith(tmp_path / "run"), tmp_path / "out", HuggingFaceOptions())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert their_tokenizer("def main():").input_ids == list(tokenizer.encode("def main():"))
    assert theirs.config.eos_token_id == tokenizer.eod == theirs.generation_config.eos_token_id
    ids = torch.tensor([their_tokenizer("def main():").input_ids])
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5
    loaded = megalith.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded(ids), model(ids)) and loaded.tokenizer.encode("def") == tokenizer.encode("def")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "neox", "bert", "t5"])
def test_layers_that_config_json_does_not_count_are_no_smaller_model(name: str, folder, tmp_path: pathlib.Path) -> None:
    """transformers leaves them out, but files and config.json disagree: that is an error."""
    if name in MODELS:
        theirs = folder(name)
    else:
        theirs = tmp_path / "theirs"
        (BERTS["bert"]() if name == "bert" else original("t5")).save_pretrained(theirs)
    field = {"gpt2": "n_layer", "bloom": "n_layer", "t5": "num_decoder_layers"}.get(name, "num_hidden_layers")
    layers = json.loads((theirs / "config.json").read_text())[field]
    change_config(theirs, **{field: layers - 1})
    message = (
        r"tensors must be of as many layers as .*config.json, or a flag, says that there are \(\d.*\); "
        rf"found \['.*\.{layers - 1}\."
    )
    with pytest.raises(CheckpointError, match=message):
        formats.read(theirs)
