"""config.json: other names of fields, fields that are missing, and values of a wrong type or out of range."""

import json
import pathlib
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalith.checkpoint import formats
from megalith.checkpoint.formats import HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.family import CONFIG_SCHEMA, FAMILIES
from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.checks.model import form_problems
from megalith.config.run import RunConfig
from tests.checkpoint.formats.huggingface.folders import change_config
from tests.originals.families import BERTS, MODELS
from tests.originals.test_t5 import original


@pytest.mark.parametrize("name", ["bloom", "gpt2", "t5", "mt5"])
def test_other_names_of_fields_are_those_of_transformers(name: str) -> None:
    family = FAMILIES.find(name)
    theirs = getattr(transformers, family.architecture).config_class
    assert theirs.attribute_map.items() <= family.aliases.items()
    given = {each: 8 + number for number, each in enumerate([*family.aliases, "vocab_size", "d_ff"])}
    config, values = theirs(**given), family.config_from_hf(given)
    for each in family.config_fields:
        if each.hf_name in family.aliases.values():
            assert values[each.name] == getattr(config, each.hf_name), each


def test_a_bloom_with_other_names(folder, tmp_path: pathlib.Path) -> None:
    """Imported, and exported with another vocabulary: what is new is not hidden by the other names."""
    theirs = folder("bloom")
    names = {"n_layer": "absent", "n_head": "absent", "hidden_size": "absent"}
    change_config(theirs, **names, num_hidden_layers=3, num_attention_heads=4, n_embed=48)
    weights = formats.read(theirs)
    assert (
        weights.config.model.num_layers,
        weights.config.model.num_attention_heads,
        weights.config.model.hidden_size,
    ) == (3, 4, 48)
    huggingface.write(
        replace(weights, config=weights.config.replace(max_position_embeddings=8, layernorm_epsilon=1e-3)),
        tmp_path / "back",
        HuggingFaceOptions(),
    )
    content = json.loads((tmp_path / "back/config.json").read_text())
    assert content["n_layer"] == 3 and content["layer_norm_epsilon"] == 1e-3 and "num_hidden_layers" not in content


LACKING = {  # fields that a config.json may lack -> attributes of ModelConfig
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
    model = RunConfig().replace(**family.config_from_hf(given)).model
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
        family.config_from_hf({**given, "new_decoder_architecture": new})["parallel_layernorm"] for new in (False, True)
    ] == [False, True]


def test_dynamic_rope_is_noted(folder) -> None:
    (note,) = formats.read(folder("llama, dynamic")).notes
    assert note.startswith("rope_type dynamic is left out: it acts beyond max_position_embeddings alone")


FORMS = {
    name: MODELS[name] for name in ("gpt2", "llama 3.1", "qwen2, half slides", "gemma", "bloom", "falcon 40b", "neox")
}
FORMS |= {"bert": BERTS["bert"], "t5": lambda: original("t5")}
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(),
    st.sampled_from([10**9, 2**40, -(2**70), "2", "0.5", "x", "", [], {}, [3], ["a"]]),
    st.dictionaries(
        st.sampled_from(["rope_type", "factor", "rope_theta", "a"]), st.integers(-1, 2) | st.text(max_size=2)
    ),
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
def test_any_value_of_any_field_is_read_or_refused(data, name: str, saved: dict) -> None:
    folder = saved[name]
    content = json.loads((folder / "original.json").read_text())
    family = FAMILIES.find(content["model_type"])
    fields = {*CONFIG_SCHEMA, *content, *family.aliases, *(each.hf_name for each in family.config_fields)}
    names = sorted(fields - {"transformers_version"})
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
        ({"num_hidden_layers": -1}, "config.json: num_hidden_layers must be at least 1; found -1. Correct it there"),
        ({"num_hidden_layers": "2"}, r"must be a whole number \(without quotation marks\); found '2'"),
        ({"num_hidden_layers": True}, "must be a whole number; found True"),
        ({"num_hidden_layers": 10**6}, r"must be at most \d+, the number of tensors in this folder; found 1000000"),
        (
            {"num_attention_heads": 5},
            "config.json: num_key_value_heads must divide num_attention_heads, 5; found 2",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads, 4; found 3"),
        ({"architectures": "LlamaForCausalLM"}, "architectures must be a list, .*; found 'LlamaForCausalLM'"),
        ({"model_type": ["llama"]}, r"model_type must be text; found \['llama'\]"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": "4"}},
            r"rope_parameters: factor must be a (finite )?number \(without quotation marks\); found '4'",
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "linear", "factor": "4"}},
            "rope_scaling: factor must be .*; found '4'",
        ),
        ({"rope_parameters": {"rope_type": "other"}}, "json: rope_parameters must .*; found {'rope_type': 'other'}"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false; found 'false'"),
        ({"transformers_weights": 3}, "transformers_weights must be text; found 3"),
    ],
    ids=str,
)
def test_fields_of_wrong_types_are_named(changes: dict, message: str, saved: dict, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved["llama 3.1"], tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs/original.json", tmp_path / "theirs/config.json")
    change_config(tmp_path / "theirs", **changes)
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path / "theirs")


def test_ids_beyond_the_vocabulary_are_noted(saved: dict, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved["llama 3.1"], tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs/original.json", tmp_path / "theirs/config.json")
    size = formats.read(tmp_path / "theirs").config.model.vocab_size
    change_config(tmp_path / "theirs", bos_token_id=size - 1, eos_token_id=[2, size + 7], pad_token_id=size)
    notes = [note for note in formats.read(tmp_path / "theirs").notes if note.startswith("config.json")]
    assert notes == [
        f"config.json: {name} {number} is beyond the vocabulary of {size}: nothing ever has that id"
        for name, number in (("eos_token_id", size + 7), ("pad_token_id", size))
    ]


def test_null_is_the_default_and_a_whole_float_is_whole(saved: dict, tmp_path: pathlib.Path) -> None:
    shutil.copytree(saved["llama 3.1"], tmp_path / "theirs")
    shutil.copy(tmp_path / "theirs/original.json", tmp_path / "theirs/config.json")
    change_config(
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


def test_other_files_of_the_folder_are_checked_too(folder) -> None:
    theirs = folder("neox")
    (theirs / "generation_config.json").write_text('{"bos_token_id": "0"}')
    message = "generation_config.json: bos_token_id must be a whole number .*; found '0'"
    with pytest.raises(CheckpointError, match=message):
        formats.read(theirs)
    (theirs / "generation_config.json").unlink()
    # 3 of 12 channels
    change_config(theirs, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25})
    with pytest.raises(
        CheckpointError, match=r"rotated channels of a head must be an even number, .*; found 3. Write --rotary-percent"
    ):
        formats.read(theirs)
