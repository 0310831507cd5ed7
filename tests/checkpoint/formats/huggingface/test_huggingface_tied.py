"""Tied tensors stored more than once: equal, different, or one under the other's name; read as transformers does."""

import json
import pathlib

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalith.checkpoint import formats
from megalith.checkpoint.formats import HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.common.errors import CheckpointError
from megalith.runtime.load import load_model
from megalith.workflows import conversion
from tests.originals.families import BERTS, MODELS, make
from tests.originals.test_t5 import original

HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
TIED = {  # name -> what makes it, its head, its embedding
    "gpt2": (MODELS["gpt2"], "lm_head.weight", "transformer.wte.weight"),
    "llama": (MODELS["llama, groups, tied"], "lm_head.weight", "model.embed_tokens.weight"),
    "gemma": (MODELS["gemma"], "lm_head.weight", "model.embed_tokens.weight"),
    "qwen3": (
        make("Qwen3", num_key_value_heads=2, head_dim=20, tie_word_embeddings=True),
        "lm_head.weight",
        "model.embed_tokens.weight",
    ),
    "bloom": (MODELS["bloom"], "lm_head.weight", "transformer.word_embeddings.weight"),
    "falcon": (MODELS["falcon 7b"], "lm_head.weight", "transformer.word_embeddings.weight"),
    "neox": (
        make("GPTNeoX", rope_parameters=HALF, tie_word_embeddings=True),
        "embed_out.weight",
        "gpt_neox.embed_in.weight",
    ),
    "bert": (BERTS["bert"], "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    "megatron-bert": (
        BERTS["megatron-bert"],
        "cls.predictions.decoder.weight",
        "bert.embeddings.word_embeddings.weight",
    ),
    "t5": (lambda: original("t5"), "lm_head.weight", "shared.weight"),
}


def logits(folder: pathlib.Path) -> torch.Tensor:
    """By transformers."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    ids = torch.randint(80, (2, 9), generator=torch.Generator().manual_seed(0))
    more = {"decoder_input_ids": ids.flip(1)} if "T5" in name else {}
    return getattr(transformers, name).from_pretrained(folder).eval()(ids, **more)[0]


def megalith_logits(folder: pathlib.Path) -> torch.Tensor:
    """The same, by megalith."""
    model, config, _ = load_model(folder, device="cpu")
    ids = torch.randint(80, (2, 9), generator=torch.Generator().manual_seed(0))
    found = model(ids, **({"decoder_input_ids": ids.flip(1)} if config.model.decoder_layers else {}))
    return found[0] if isinstance(found, tuple) else found


def store(folder: pathlib.Path, state: dict) -> None:
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_is_kept_and_noted(name: str, tmp_path: pathlib.Path) -> None:
    build, head, embedding = TIED[name]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert head not in state
    store(tmp_path, {**state, head: state[embedding].clone()})
    found = formats.read(tmp_path)
    assert not found.notes and not found.config.model.untie_embeddings_and_output_weights
    store(tmp_path, {**state, head: torch.randn_like(state[embedding])})
    found = formats.read(tmp_path)
    assert found.config.model.untie_embeddings_and_output_weights
    assert found.notes == (
        f"config.json ties {head} to {embedding}, but they differ: they are two here, as in transformers 5",
    )
    wanted = logits(tmp_path)
    assert (megalith_logits(tmp_path) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    huggingface.write(found, tmp_path / "back", HuggingFaceOptions())
    assert torch.equal(logits(tmp_path / "back"), wanted)
    assert torch.equal(megalith_logits(tmp_path / "back"), megalith_logits(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bloom"])
def test_a_single_tensor_under_the_name_of_the_head_is_the_embedding(name: str, tmp_path: pathlib.Path) -> None:
    build, head, embedding = TIED[name]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    wanted = logits(tmp_path)
    store(tmp_path, {head if key == embedding else key: tensor for key, tensor in state.items()})
    assert formats.read(tmp_path).notes == (
        f"{embedding} is not in this folder: it is read from {head}, which is tied to it",
    )
    assert torch.equal(logits(tmp_path), wanted)
    assert (megalith_logits(tmp_path) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_an_override_decides_whether_they_are_tied(tmp_path: pathlib.Path) -> None:
    MODELS["llama, groups, tied"]().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    store(tmp_path, {**state, "lm_head.weight": torch.randn(97, 48)})
    found = formats.read(tmp_path, options=HuggingFaceOptions(overrides={"untie_embeddings_and_output_weights": False}))
    assert not found.config.model.untie_embeddings_and_output_weights
    assert found.notes[1:] == ("left out, as this model has no use for them: lm_head.weight",)


def test_the_bias_of_a_bert_is_the_one_that_computes(tmp_path: pathlib.Path) -> None:
    BERTS["bert"]().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    store(tmp_path, {**state, "cls.predictions.decoder.bias": torch.randn(97)})
    wanted = logits(tmp_path)
    (note,) = formats.read(tmp_path).notes
    assert note.startswith("cls.predictions.decoder.bias and cls.predictions.bias differ: the first is read")
    assert (megalith_logits(tmp_path) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_an_embedding_of_one_stack_alone_is_refused(tmp_path: pathlib.Path) -> None:
    original("t5").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    store(tmp_path, {**state, "decoder.embed_tokens.weight": torch.randn_like(state["shared.weight"])})
    with pytest.raises(
        CheckpointError, match=r"has one for both; found decoder.embed_tokens.weight and shared.weight, which differ"
    ):
        formats.read(tmp_path)


def test_norms_under_both_names_are_refused(tmp_path: pathlib.Path) -> None:
    BERTS["bert"]().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    store(tmp_path, {**state, "bert.embeddings.LayerNorm.gamma": torch.ones(48)})
    with pytest.raises(
        CheckpointError, match=r"gamma and beta .*, and not both; found \['bert.embeddings.LayerNorm.gamma'\]"
    ):
        formats.read(tmp_path)


def test_verify_names_the_cause(tmp_path: pathlib.Path) -> None:
    theirs = tmp_path / "theirs"
    torch.manual_seed(0)
    MODELS["llama, groups, tied"]().save_pretrained(theirs)
    conversion.convert(theirs, tmp_path / "rounded", to="megalith", options=dict(dtype="bfloat16"))
    with pytest.raises(
        CheckpointError, match=r"Weights of one side were rounded to bfloat16: .* Leave out --dtype to compare"
    ):
        conversion.verify(theirs, tmp_path / "rounded")
    conversion.convert(theirs, tmp_path / "ours", to="megalith")
    state = load_file(theirs / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    store(theirs, {**state, name: state[name].flip(0)})
    with pytest.raises(
        CheckpointError, match=r"These tensors differ: model/layers.1.attention.q.weight. If the source is of Megatron"
    ):
        conversion.verify(theirs, tmp_path / "ours")
    store(theirs, {**state, "lm_head.weight": torch.randn(97, 48)})
    with pytest.raises(
        CheckpointError, match=r"different models \(untie_embeddings_and_output_weights True and False\); convert once"
    ):
        conversion.verify(theirs, tmp_path / "ours")
