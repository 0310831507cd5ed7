"""BERT from and to Hugging Face: bits, names of old files, what it has no place for."""

import json
import pathlib
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalith.checkpoint import formats
from megalith.checkpoint.formats import HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.family import architecture_fields
from megalith.checkpoint.weights import read_megalith, write
from megalith.common.errors import CheckpointError, ConfigError
from megalith.runtime.load import load_model
from megalith.workflows import conversion
from tests.originals.families import BERTS, HEADED


@pytest.fixture(params=BERTS)
def theirs(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A saved model."""
    torch.manual_seed(0)
    BERTS[request.param]().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def logits(folder: pathlib.Path) -> tuple[torch.Tensor, ...]:
    """Of both heads, by transformers."""
    ids = torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0))
    return transformers.AutoModelForPreTraining.from_pretrained(folder).eval()(ids).to_tuple()


def test_there_and_back(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write(formats.read(theirs), tmp_path / "ours")
    huggingface.write(read_megalith(tmp_path / "ours"), tmp_path / "back", HuggingFaceOptions(max_shard_size=40_000))
    before, after = load_file(theirs / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    wanted = logits(theirs)
    assert all(torch.equal(one, other) for one, other in zip(wanted, logits(tmp_path / "back"), strict=True))
    model, *_ = load_model(tmp_path / "ours", device="cpu")
    found = model(torch.randint(90, (2, 20), generator=torch.Generator().manual_seed(0)))
    assert all((one - other).abs().max() < 1e-5 for one, other in zip(wanted, found, strict=True))
    assert conversion.verify(theirs, tmp_path / "ours") < 1e-5


def test_a_config_of_our_own_making_is_the_same_model(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    weights = replace(formats.read(theirs), files={})
    huggingface.write(weights, tmp_path / "back", HuggingFaceOptions())
    assert all(torch.equal(one, other) for one, other in zip(logits(theirs), logits(tmp_path / "back"), strict=True))
    exported = formats.read(tmp_path / "back")
    assert architecture_fields(exported.config.model) == architecture_fields(weights.config.model)


def test_names_of_files_from_tensorflow(tmp_path: pathlib.Path) -> None:
    """As in bert-base-uncased: gamma and beta, and the tied weight once more."""
    BERTS["bert"]().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    wanted = formats.read(tmp_path)["model/layers.1.mlp_norm.bias"]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value.clone()
        for name, value in tensors.items()
    } | {"cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone()}
    save_file(old, tmp_path / "model.safetensors", {"format": "pt"})
    weights = formats.read(tmp_path)
    assert torch.equal(weights["model/layers.1.mlp_norm.bias"], wanted) and not weights.notes


@pytest.mark.parametrize("changes", [{"normalization": "RMSNorm"}, {"swiglu": True}])
def test_models_that_bert_cannot_represent_are_refused(changes: dict, tmp_path: pathlib.Path) -> None:
    BERTS["bert"]().save_pretrained(tmp_path)
    weights = formats.read(tmp_path)
    other = replace(weights, config=weights.config.replace(**changes), files={})
    with pytest.raises(CheckpointError, match=r"BertForPreTraining cannot represent"):
        huggingface.write(other, tmp_path / "back", HuggingFaceOptions())


def save_as(kind: str, folder: pathlib.Path) -> transformers.PreTrainedModel:
    """A model of this class, its vectors not as they begin."""
    torch.manual_seed(0)
    prefix = "MegatronBert" if kind.startswith("Megatron") else "Bert"
    model = getattr(transformers, kind)(BERTS["megatron-bert" if prefix == "MegatronBert" else "bert"]().config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


NO_TOKENIZER = (
    "no tokenizer is converted along, and text needs one: add --tokenizer FOLDER, "
    "or --vocab-file FILE --merge-file FILE"
)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "MegatronBertForMaskedLM"])
def test_a_masked_lm_is_a_model_without_binary_head(kind: str, tmp_path: pathlib.Path) -> None:
    original = save_as(kind, tmp_path / "theirs")
    weights = conversion.convert(tmp_path / "theirs", tmp_path / "ours", to="megalith")
    assert weights.config.model.bert_no_binary_head
    assert weights.notes == (
        "no binary head in it: imported without, for one segment, whose embedding was added to those of the positions",
        NO_TOKENIZER,
    )
    ids = torch.randint(90, (2, 20))
    found = load_model(tmp_path / "ours", device="cpu")[0](ids)
    assert (found - original(ids).logits).abs().max() < 1e-5
    assert conversion.verify(tmp_path / "theirs", tmp_path / "ours") < 1e-5
    for name, files in (("kept", weights.files), ("made", {})):
        huggingface.write(replace(read_megalith(tmp_path / "ours"), files=files), tmp_path / name, HuggingFaceOptions())
        back, told = getattr(transformers, kind).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(told.values()) and json.loads((tmp_path / name / "config.json").read_text())[
            "architectures"
        ] == [kind]
        assert (back.eval()(ids).logits - original(ids).logits).abs().max() < 1e-5


def test_the_name_masked_lm_does_not_cost_the_other_head(tmp_path: pathlib.Path) -> None:
    """bert-base-uncased has a pooler and a binary head, and calls itself BertForMaskedLM."""
    BERTS["bert"]().save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    weights = formats.read(tmp_path / "theirs")
    assert not weights.config.model.bert_no_binary_head and not weights.notes
    huggingface.write(weights, tmp_path / "back", HuggingFaceOptions())
    assert json.loads((tmp_path / "back/config.json").read_text()) == config
    assert all(
        torch.equal(one, other)
        for one, other in zip(logits(tmp_path / "theirs"), logits(tmp_path / "back"), strict=True)
    )


def test_a_masked_lm_can_keep_its_segments(tmp_path: pathlib.Path) -> None:
    original = save_as("BertForMaskedLM", tmp_path)
    weights = formats.read(tmp_path, options=HuggingFaceOptions(overrides={"bert_no_binary_head": False}))
    (note,) = weights.notes
    assert (
        note
        == "not in this folder, so new and untrained: pooler.weight, pooler.bias, order_head.weight, order_head.bias"
    )
    write(weights, tmp_path / "ours")
    ids, types = torch.randint(90, (2, 20)), torch.randint(2, (2, 20))
    tokens, _ = load_model(tmp_path / "ours", device="cpu")[0](ids, token_types=types)
    assert (tokens - original(ids, token_type_ids=types).logits).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["BertModel", "BertForSequenceClassification", "MegatronBertModel"])
def test_heads_that_are_not_there_are_new(kind: str, tmp_path: pathlib.Path) -> None:
    """The encoder and the pooler are the original's; the classifier is left out."""
    original = save_as(kind, tmp_path / "theirs")
    options = dict(overrides={"model_type": "bert"} if "Classification" in kind else {})
    weights = conversion.convert(tmp_path / "theirs", tmp_path / "ours", to="megalith", options=options)
    assert weights.notes[0].startswith(
        "not in this folder, so new and untrained: head_dense.weight, head_dense.bias, head_norm.weight"
    )
    left = ["left out, as this model has no use for them: classifier.bias, classifier.weight"]
    assert list(weights.notes[1:]) == [*left * ("Classification" in kind), NO_TOKENIZER]
    model = load_model(tmp_path / "ours", device="cpu")[0]
    pooled = []
    model.order_head.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    ids = torch.randint(90, (2, 20))
    model(ids)
    assert (pooled[0] - getattr(original, "bert", original)(ids).pooler_output).abs().max() < 1e-5
    message = f"--verify compares the logits of bert, and this class of transformers has none; found '{kind}'"
    with pytest.raises(ConfigError, match=message):
        conversion.verify(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("name", HEADED)
def test_heads_that_classify_there_and_back(name: str, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    original = HEADED[name]().eval()
    original.save_pretrained(tmp_path / "theirs")
    weights = conversion.convert(tmp_path / "theirs", tmp_path / "ours", to="megalith")
    kind = "bert_multiple_choice" if "choices" in name else "bert_classification"
    assert weights.config.model.model_type == kind and weights.config.data.loss == "classification"
    assert weights.config.model.num_classes == (3 if name == "bert classes" else 2)
    assert weights.notes == (NO_TOKENIZER,)
    assert conversion.verify(tmp_path / "theirs", tmp_path / "ours") < 1e-5
    for folder, files in (("kept", weights.files), ("made", {})):
        imported = replace(read_megalith(tmp_path / "ours"), files=files)
        huggingface.write(imported, tmp_path / folder, HuggingFaceOptions())
        back, told = type(original).from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(told.values())
        assert all(torch.equal(one, back.get_parameter(each)) for each, one in original.named_parameters())
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architectures"] == [type(original).__name__]


def test_a_pretrained_bert_begins_a_classifier(tmp_path: pathlib.Path) -> None:
    original = save_as("BertForPreTraining", tmp_path)
    options = HuggingFaceOptions(overrides={"model_type": "bert_classification", "num_classes": 5})
    weights = formats.read(tmp_path, options=options)
    new, left = weights.notes
    assert new == "not in this folder, so new and untrained: classifier.weight, classifier.bias"
    assert "cls.predictions" in left
    assert weights["model/classifier.weight"].shape == (5, 48) and not weights["model/classifier.bias"].any()
    assert torch.equal(weights["model/pooler.weight"], original.bert.pooler.dense.weight)


def test_a_tensor_that_is_missing_is_an_error(tmp_path: pathlib.Path) -> None:
    for kind, name in (
        ("BertForMaskedLM", "cls.predictions.transform.dense.weight"),
        ("BertForPreTraining", "cls.seq_relationship.weight"),
        ("BertModel", "encoder.layer.1.output.dense.bias"), ("BertModel", "pooler.dense.bias"),
    ):  # fmt: skip
        save_as(kind, tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors[name]
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"tensors must be all .*; found 1 missing: (bert\.)?{name}\. Copy"):
            formats.read(tmp_path)


def test_an_activation_of_the_head_alone_is_named(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Megatron's fused GELU is the tanh approximation in the MLP and exact in the head."""
    weights = replace(formats.read(theirs), files={})
    for name, form in {"one": {"openai_gelu": True}, "two": {"openai_gelu": False, "bias_gelu_fusion": True}}.items():
        write(replace(weights, config=weights.config.replace(**form)), tmp_path / name)
        notes = conversion.convert(tmp_path / name, tmp_path / f"{name}-hf", to="huggingface").notes
        assert any("gelu_tanh in the head over the vocabulary too" in note for note in notes) == (name == "two")
