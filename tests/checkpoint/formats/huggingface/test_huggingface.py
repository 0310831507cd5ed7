"""Hugging Face folders: read, written back bit for bit, and every way in which one can be broken."""

import json
import pathlib
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import megalith
from megalith import checkpoint
from megalith.checkpoint import formats
from megalith.checkpoint.formats import Options
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.family import FAMILIES, KINDS, form
from megalith.checkpoint.weights import Weights, own, write
from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.checks.model import form_problems
from megalith.config.flags.loading import to_yaml
from megalith.config.parameters import parameter_shapes
from megalith.config.run import RunConfig
from megalith.data.tokenizers.tokenizer import build_tokenizer
from megalith.runtime.build import plain
from megalith.runtime.state import weights as weights_of
from tests.originals.families import BERTS, MODELS
from tests.originals.test_t5 import original
from tests.toy import make_corpus


@pytest.fixture
def folder(tmp_path: pathlib.Path):
    """`folder(name)`: a saved model of a family at toy size."""

    def make(name: str) -> pathlib.Path:
        torch.manual_seed(0)
        MODELS[name]().save_pretrained(tmp_path / "theirs")
        return tmp_path / "theirs"

    return make


@pytest.mark.parametrize("name", MODELS)
def test_import_then_export_is_bit_exact(name: str, folder, tmp_path: pathlib.Path) -> None:
    theirs = folder(name)
    write(formats.read(theirs), tmp_path / "ours")
    huggingface.write(own(tmp_path / "ours"), tmp_path / "back", Options(max_shard_size=40_000))
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
    huggingface.write(weights, tmp_path / "back", Options())
    ids = torch.randint(90, (2, 40))
    one, other = (
        transformers.AutoModelForCausalLM.from_pretrained(each).eval()(ids).logits
        for each in (theirs, tmp_path / "back")
    )
    assert torch.equal(one, other) or (one - other).abs().max() < 1e-5
    again = formats.read(tmp_path / "back")
    assert form(again.config.model) == form(weights.config.model)


@pytest.mark.parametrize("name", ["gpt2", "llama, groups, tied"])
def test_bin_and_dtype(name: str, folder, tmp_path: pathlib.Path) -> None:
    theirs = folder(name)
    huggingface.write(
        formats.read(theirs), tmp_path / "back", Options(safetensors=False, dtype="bfloat16", max_shard_size=40_000)
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
    """As gpt2's on the hub: names without the beginning, and masks that are no weights."""
    theirs = folder(name)
    state = load_file(theirs / "model.safetensors")
    prefix = {"llama": "model."}.get(name, "transformer.")
    bare = {key.removeprefix(prefix): value for key, value in state.items()}
    extra = {"gpt2": "h.0.attn.bias", "llama": "layers.0.self_attn.rotary_emb.inv_freq", "bloom": "other"}[name]
    save_file({**bare, extra: torch.ones(1)}, theirs / "model.safetensors")
    found = formats.read(theirs)
    assert len(found) == len(parameter_shapes(found.config.model))
    assert found.notes == (("left out, as this model has no use for them: other",) if name == "bloom" else ())


def broken(theirs: pathlib.Path, **changes) -> None:
    content = json.loads((theirs / "config.json").read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value != "absent"}
    (theirs / "config.json").write_text(json.dumps(content))


ERRORS = [
    (
        {"model_type": "rwkv"},
        r"model_type: found 'rwkv'; the architectures known here are .*gpt2, .* Convert a model of one of these",
    ),
    ({"hidden_size": "absent"}, r"LlamaForCausalLM has hidden_size in it. Add what is missing"),
    (
        {"attention_bias": True},
        r"attention_bias: found True; of LlamaForCausalLM only attention_bias = False is built here",
    ),
    ({"hidden_act": "gelu_10"}, r"activation: found 'gelu_10'; the activations known here are silu"),
    (
        {"rope_parameters": {"rope_type": "longrope"}},
        r"rope_parameters: found \{'rope_type': 'longrope'\}; rope_type is one of default, dynamic",
    ),
    (
        {"rope_scaling": {"type": "linear"}, "rope_parameters": None},
        r"rope_scaling: found \{'type': 'linear'\}; .* with all their fields",
    ),
    (
        {"intermediate_size": 64},
        r"another shape: found \['model.layers.0.mlp.gate_proj.weight: found \[80, 48\], expected \[64, 48\]'",
    ),
    (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        r"weights: found 'bitsandbytes'; weights are quantized, .* Save the model dequantized",
    ),
    (
        {"num_hidden_layers": 4},
        r"missing tensors: found \['model.layers.3.input_layernorm.weight', .* has 9 more. Copy all",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[next(iter(changes)) for changes, _ in ERRORS])
def test_what_does_not_fit_is_named(changes: dict, message: str, folder) -> None:
    theirs = folder("llama")
    broken(theirs, **changes)
    with pytest.raises(CheckpointError, match=message):
        formats.read(theirs)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(dtype: torch.dtype, folder) -> None:
    theirs = folder("llama")
    state = load_file(theirs / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    save_file({**state, name: state[name].to(dtype), f"{name}_scale": torch.ones(1)}, theirs / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"weights: found '{name}: {dtype}'; weights are quantized, .* Save the model dequantized"
    ):
        formats.read(theirs)


@pytest.mark.parametrize("name", ["bloom", "gpt2", "t5", "mt5"])
def test_other_names_of_fields_are_those_of_transformers(name: str) -> None:
    family = FAMILIES.find(name)
    theirs = getattr(transformers, family.architecture).config_class
    assert theirs.attribute_map.items() <= family.aliases.items()
    given = {each: 8 + number for number, each in enumerate([*family.aliases, "vocab_size", "d_ff"])}
    config, values = theirs(**given), family.to_ours(given)
    for each in family.settings:
        if each.theirs in family.aliases.values():
            assert values[each.ours] == getattr(config, each.theirs), each


def test_a_bloom_with_other_names(folder, tmp_path: pathlib.Path) -> None:
    """Imported, and exported with another vocabulary: what is new is not hidden by the other names."""
    theirs = folder("bloom")
    names = {"n_layer": "absent", "n_head": "absent", "hidden_size": "absent"}
    broken(theirs, **names, num_hidden_layers=3, num_attention_heads=4, n_embed=48)
    weights = formats.read(theirs)
    assert (
        weights.config.model.num_layers,
        weights.config.model.num_attention_heads,
        weights.config.model.hidden_size,
    ) == (3, 4, 48)
    huggingface.write(
        replace(weights, config=weights.config.replace(max_position_embeddings=8, layernorm_epsilon=1e-3)),
        tmp_path / "back",
        Options(),
    )
    content = json.loads((tmp_path / "back/config.json").read_text())
    assert content["n_layer"] == 3 and content["layer_norm_epsilon"] == 1e-3 and "num_hidden_layers" not in content


LACKING = {  # fields of theirs that a config.json may lack -> attributes of our model
    "num_key_value_heads": "num_kv_heads", "head_dim": "head_dim", "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon", "tie_word_embeddings": "tied",
}  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"use_sliding_window": True}, {"num_key_value_heads": None}], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma"])
def test_what_config_json_lacks_is_as_in_transformers(name: str, more: dict) -> None:
    given = {
        "num_hidden_layers": 30,
        "hidden_size": 2048,
        "num_attention_heads": 64,
        "intermediate_size": 64,
        "vocab_size": 99,
        **more,
    }
    family = FAMILIES.find(name)
    try:
        config = getattr(transformers, family.architecture).config_class(**given)
    except huggingface_hub.errors.StrictDataclassError:
        pytest.skip("transformers refuses null here")
    model = RunConfig().replace(**family.to_ours(given)).model
    wanted = {theirs: getattr(config, theirs, None) for theirs in LACKING}
    wanted["head_dim"] = wanted["head_dim"] or 2048 // 64
    found = {theirs: getattr(model, ours, None) for theirs, ours in LACKING.items()}
    assert found | {"tie_word_embeddings": not model.untie_embeddings_and_output_weights} == wanted
    width = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * 30
    assert [model.window(layer) for layer in range(30)] == [
        width if kind == "sliding_attention" else None for kind in types
    ]


def test_falcon_counts_norms_in_the_new_architecture_alone() -> None:
    given = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "num_ln_in_parallel_attn": 2,
    }
    family = FAMILIES.find("falcon")
    assert [
        family.to_ours({**given, "new_decoder_architecture": new})["parallel_layernorm"] for new in (False, True)
    ] == [False, True]


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
        match="architecture: found 'qk_layernorm True'; GPT2LMHeadModel has no such form, nor has another",
    ):
        huggingface.write(weights, tmp_path / "a", Options())
    with pytest.raises(
        CheckpointError,
        match=r"architecture: found 'activation squared_relu'; LlamaForCausalLM has no such form. Export to megatron",
    ):
        huggingface.write(
            replace(weights, config=config.replace(position_embedding_type="rope")),
            tmp_path / "a",
            Options(architecture="llama"),
        )


def test_not_a_format(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"source: found '.*nothing'; there is no such file or folder. Correct the path"
    ):
        formats.read(tmp_path / "nothing")
    (tmp_path / "a").touch()
    with pytest.raises(
        CheckpointError, match=r"found \['a'\]; no known format looks like this \(megalith: a folder with manifest.json"
    ):
        formats.read(tmp_path)


def test_a_model_trained_here_with_its_tokenizer(tmp_path: pathlib.Path) -> None:
    """From a checkpoint as a run leaves it to transformers' model and tokenizer."""
    make_corpus(tmp_path)
    tokenizer = build_tokenizer(
        "GPT2BPETokenizer", vocab_file=str(tmp_path / "vocab.json"), merge_file=str(tmp_path / "merges.txt")
    )
    tokenizer.save(tmp_path / "tokenizer")
    config = RunConfig().replace(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=tokenizer.vocab_size, max_position_embeddings=32, seq_length=32,
        init_method_std=0.3,
    )  # fmt: skip
    model = plain(config.model, torch.device("cpu"), seed=1)
    files = {f"tokenizer/{file.name}": file for file in (tmp_path / "tokenizer").iterdir()}
    checkpoint.save(tmp_path / "run", 5, weights_of(model), train_state={}, config_yaml=to_yaml(config), files=files)
    huggingface.write(own(tmp_path / "run"), tmp_path / "out", Options())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words("def main():").input_ids == list(tokenizer.encode("def main():"))
    assert theirs.config.eos_token_id == tokenizer.eod == theirs.generation_config.eos_token_id
    ids = torch.tensor([words("def main():").input_ids])
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-5
    loaded = megalith.load(tmp_path / "out", device="cpu")
    assert torch.equal(loaded(ids), model(ids)) and loaded.tokenizer.encode("def") == tokenizer.encode("def")


def test_dynamic_stretching_is_noted(folder) -> None:
    (note,) = formats.read(folder("llama, dynamic")).notes
    assert note.startswith("rope_type dynamic is left out: it acts beyond max_position_embeddings alone")


FORMS = {
    name: MODELS[name] for name in ("gpt2", "llama 3.1", "qwen2, half slides", "gemma", "bloom", "falcon 40b", "neox")
}
FORMS |= {"bert": BERTS["bert"], "t5": lambda: original("t5")}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([10**9, 2**40, -(2**70), "2", "0.5", "x", "", [], {}, [3], ["a"]]),
    st.floats(), st.dictionaries(st.sampled_from(["rope_type", "factor", "rope_theta", "a"]), st.integers(-1, 2) | st.text(max_size=2)),
)  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    folders = {name: tmp_path_factory.mktemp("forms") for name in FORMS}
    for name, folder in folders.items():
        FORMS[name]().save_pretrained(folder)
        (folder / "original.json").write_text((folder / "config.json").read_text())
    return folders


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(list(FORMS)))
def test_any_value_of_any_field_is_read_or_told(data, name: str, saved: dict) -> None:
    folder = saved[name]
    content = json.loads((folder / "original.json").read_text())
    family = FAMILIES.find(content["model_type"])
    names = sorted(
        {*KINDS, *content, *family.aliases, *(each.theirs for each in family.settings)} - {"transformers_version"}
    )
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    (folder / "config.json").write_text(json.dumps({**content, **changes}))
    try:
        found = formats.read(folder)
    except (CheckpointError, ConfigError) as error:
        assert "found" in str(error) and len(str(error)) < 4000
        return
    assert not [each.text for each in form_problems(found.config)]
    assert all(tuple(each.read().shape) == each.shape for each in found.tensors.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers: found -1; it is at least 1. Correct it there"),
        ({"num_hidden_layers": "2"}, r"found '2'; it is a whole number \(without quotation marks\)"),
        ({"num_hidden_layers": True}, "found True; it is a whole number"),
        ({"num_hidden_layers": 10**6}, r"found 1000000; a layer has tensors, and this folder has \d+ in all"),
        (
            {"num_attention_heads": 5},
            "config.json: num_key_value_heads: found 2; num_attention_heads, 5, must be a multiple of it",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads: found 3; num_attention_heads, 4, must be a multiple of it"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: found 'LlamaForCausalLM'; it is a list"),
        ({"model_type": ["llama"]}, r"model_type: found \['llama'\]; it is text"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "4"}},
            "rope_parameters: factor: found '4'; it is a finite number",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": "4"}},
            "rope_scaling: factor: found '4'",
        ),
        ({"rope_parameters": {"rope_type": "other"}}, "config.json: rope_parameters: found {'rope_type': 'other'}"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: found 'false'; it is true or false"),
        ({"transformers_weights": 3}, "transformers_weights: found 3; it is text"),
    ],
    ids=str,
)
def test_fields_of_wrong_types_are_told(changes: dict, message: str, saved: dict, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved["llama 3.1"], tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs/original.json", tmp_path / "theirs/config.json")
    broken(tmp_path / "theirs", **changes)
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path / "theirs")


def test_ids_beyond_the_vocabulary_are_told(saved: dict, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved["llama 3.1"], tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs/original.json", tmp_path / "theirs/config.json")
    words = formats.read(tmp_path / "theirs").config.model.vocab_size
    broken(tmp_path / "theirs", bos_token_id=words - 1, eos_token_id=[2, words + 7], pad_token_id=words)
    told = [note for note in formats.read(tmp_path / "theirs").notes if note.startswith("config.json")]
    assert told == [
        f"config.json: {name} {number} is beyond the vocabulary of {words}: nothing ever has that id"
        for name, number in (("eos_token_id", words + 7), ("pad_token_id", words))
    ]


def test_null_is_the_default_and_a_whole_float_is_whole(saved: dict, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved["llama 3.1"], tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs/original.json", tmp_path / "theirs/config.json")
    broken(
        tmp_path / "theirs", hidden_size=48.0, rope_theta=None, rope_parameters=None, hidden_act=None, rms_norm_eps=None
    )
    model = formats.read(tmp_path / "theirs").config.model
    assert (model.hidden_size, model.rotary_base, model.activation, model.layernorm_epsilon) == (
        48,
        10000.0,
        "swiglu",
        1e-6,
    )
    assert isinstance(model.hidden_size, int)


def test_other_files_of_the_folder_are_judged_too(folder) -> None:
    theirs = folder("neox")
    (theirs / "generation_config.json").write_text('{"bos_token_id": "0"}')
    with pytest.raises(CheckpointError, match=r"generation_config.json: bos_token_id: found '0'; it is a whole number"):
        formats.read(theirs)
    (theirs / "generation_config.json").unlink()
    broken(
        theirs, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    )  # 3 of 12 channels
    with pytest.raises(
        CheckpointError, match=r"rotated channels of a head: found 3; .* which is odd. Write --rotary-percent"
    ):
        formats.read(theirs)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "neox", "bert", "t5"])
def test_layers_that_config_json_does_not_count_are_no_smaller_model(name: str, folder, tmp_path: pathlib.Path) -> None:
    """They were left out with a note, as transformers leaves them out: two sources that disagree."""
    if name in MODELS:
        theirs = folder(name)
    else:
        theirs = tmp_path / "theirs"
        (BERTS["bert"]() if name == "bert" else original("t5")).save_pretrained(theirs)
    field = {"gpt2": "n_layer", "bloom": "n_layer", "t5": "num_decoder_layers"}.get(name, "num_hidden_layers")
    layers = json.loads((theirs / "config.json").read_text())[field]
    broken(theirs, **{field: layers - 1})
    told = (
        rf"tensors of further layers: found \['.*\.{layers - 1}\..*; .*config.json, or a flag, says that there are \d"
    )
    with pytest.raises(CheckpointError, match=told):
        formats.read(theirs)
