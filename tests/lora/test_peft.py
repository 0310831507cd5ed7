"""Adapters against the library peft, on transformers' own models: loss, gradients, folders out and in."""

import dataclasses
import pathlib
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from megalith.checkpoint import formats
from megalith.checkpoint.formats import PeftOptions, adapters
from megalith.checkpoint.formats import peft as peft_format
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights
from megalith.common.errors import CheckpointError
from megalith.config.adapters import A, B, M, adapter_shapes, is_adapter
from megalith.runtime.load import load_model
from tests.originals.families import BERTS, MODELS, t5

TOLERANCE = 1e-5  # of the largest element
FAST = ("gpt2", "llama, groups, tied")
FAMILIES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in (*FAST, "bloom", "falcon 40b", "neox", "qwen3", "t5")
]


def original(name: str, folder: pathlib.Path) -> transformers.PreTrainedModel:
    """transformers' model without dropout, saved in `folder`."""
    torch.manual_seed(1)
    model = {**MODELS, **BERTS, "t5": t5(feed_forward_proj="gated-gelu")}[name]().eval()
    model.save_pretrained(folder)
    return model


def draw_adapters(base: Weights, **lora: Any) -> Weights:
    """The base with adapters of random numbers, B too."""
    config = base.config.replace(lora_rank=4, lora_alpha=6.0, **lora)
    generator, tensors = torch.Generator().manual_seed(2), {}
    for parameter, shape in adapter_shapes(config.model, config.lora).items():
        tensors[f"model/{parameter}"] = Lazy.of(torch.randn(shape, generator=generator) * 0.2)
    return adapters.attach(base, Weights(config=config, tensors=tensors, source="drawn"))


def ids_of(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """Ids, and labels as transformers takes them."""
    ids = torch.randint(3, model.config.vocab_size, (2, 11), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


def gradients_of_peft(model: peft.PeftModel, base: Weights) -> dict[str, Tensor]:
    """The gradients of peft's adapters under our names; of a fused layer each of ours has its block."""
    named = {name.replace(".default", ""): parameter.grad for name, parameter in model.named_parameters()}
    found = {}
    for layer in peft_format.layers_of(base):
        a, b = (named.get(f"{peft_format.PREFIX}{layer.name}{end}") for end in peft_format.ENDS)
        if a is not None and b is not None:
            count, m = len(layer.modules), named.get(f"{peft_format.PREFIX}{layer.name}{peft_format.MAGNITUDE}.weight")
            if m is not None:
                magnitudes = zip(layer.modules, layer.split(m[:, None]), strict=True)
                found |= {f"{module}{M}": part[:, 0] for module, part in magnitudes}
            for number, (module, part) in enumerate(zip(layer.modules, layer.split(b), strict=True)):
                found |= {f"{module}{A}": a.chunk(count)[number], f"{module}{B}": part.chunk(count, dim=1)[number]}
    return found


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert float((found - expected).abs().max()) <= TOLERANCE * float(expected.abs().max()), what


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_peft(name: str, dora: bool, tmp_path: pathlib.Path) -> None:
    reference = original(name, tmp_path / "base")
    weights = draw_adapters(formats.read(tmp_path / "base"), use_dora=dora)
    formats.FORMATS.find("peft").write(weights, tmp_path / "adapters", PeftOptions())
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapters", is_trainable=True).eval()
    batch = ids_of(reference)
    expected = theirs(**batch)
    expected.loss.backward()
    model, _, _ = load_model(weights, device="cpu", merge_adapter=False)
    if model.config.decoder_layers:
        labels = batch["labels"]
        decoder_ids = torch.cat((torch.zeros_like(labels[:, :1]), labels[:, :-1]), dim=1)
        logits, targets = model(batch["input_ids"], decoder_input_ids=decoder_ids), labels
    else:
        logits, targets = model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    assert_close(loss.detach(), expected.loss.detach(), "loss")
    own = {parameter: value for parameter, value in model.named_parameters() if value.requires_grad}
    grads = gradients_of_peft(theirs, weights)
    assert own.keys() == grads.keys() and all(map(is_adapter, own))
    for parameter, value in own.items():
        assert_close(value.grad, grads[parameter], parameter)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_peft_folder_is_read_back_and_merged(name: str, dora: bool, tmp_path: pathlib.Path) -> None:
    """What was written comes back exactly; peft's own merge of it and our export compute the same."""
    reference = original(name, tmp_path / "base")
    targets = ["q", "v", "mlp.down"]
    if dora:  # one of three layers that transformers has as one gets magnitudes of its own there
        targets.append("k")
    weights = draw_adapters(formats.read(tmp_path / "base"), lora_target_modules=targets, use_dora=dora)
    formats.FORMATS.find("peft").write(weights, tmp_path / "adapters", PeftOptions())
    again = formats.read(tmp_path / "adapters")
    assert again.config.lora.scale == weights.config.lora.scale
    assert adapter_shapes(again.config.model, again.config.lora).keys() == {
        name.removeprefix("model/") for name in weights if is_adapter(name)
    }
    assert again.keys() == weights.keys()
    for each in filter(is_adapter, weights):
        assert torch.equal(again[each], weights[each]), each
    merged = adapters.merge(again)
    formats.FORMATS.find("huggingface").write(merged, tmp_path / "merged", formats.HuggingFaceOptions())
    exported = type(reference).from_pretrained(tmp_path / "merged").eval()
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapters").merge_and_unload().eval()
    with torch.no_grad():
        batch = ids_of(reference)
        expected = theirs(**batch).logits
        assert_close(exported(**batch).logits, expected, "logits")
        assert float((expected - type(reference).from_pretrained(tmp_path / "base")(**batch).logits).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "lora_alpha": 12, "fan_in_fan_out": True}),
        (
            "llama, groups, tied",
            {
                "target_modules": ["q_proj", "up_proj"], "r": 6, "use_rslora": True,
                "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 0},
            },
        ),
        ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "r": 4, "use_dora": True, "fan_in_fan_out": True}),
    ],
)  # fmt: skip
def test_what_peft_has_saved_is_read(name: str, settings: dict[str, Any], tmp_path: pathlib.Path) -> None:
    """One A for q, k and v of a fused layer, ranks and scales that differ by module."""
    reference = original(name, tmp_path / "base")
    reference.name_or_path = reference.config._name_or_path = str(tmp_path / "base")
    theirs = peft.get_peft_model(reference, peft.LoraConfig(init_lora_weights=False, **settings)).eval()
    theirs.save_pretrained(tmp_path / "adapters")
    batch = ids_of(reference)
    with torch.no_grad():
        expected = theirs(**batch).logits
        for merge_adapter in (False, True):
            model, _, _ = load_model(tmp_path / "adapters", device="cpu", merge_adapter=merge_adapter)
            assert_close(model(batch["input_ids"]), expected, f"merge_adapter={merge_adapter}")


def test_a_magnitude_beside_an_adapter_that_ours_lacks(tmp_path: pathlib.Path) -> None:
    """Of GPT-2's q, k and v as one layer: k without an adapter has the lengths of its rows, and stays as it is."""
    reference = original("gpt2", tmp_path / "base")
    weights = draw_adapters(formats.read(tmp_path / "base"), lora_target_modules=["q"], use_dora=True)
    formats.FORMATS.find("peft").write(weights, tmp_path / "adapters", PeftOptions())
    theirs, batch = peft.PeftModel.from_pretrained(reference, tmp_path / "adapters").eval(), ids_of(reference)
    model, _, _ = load_model(weights, device="cpu", merge_adapter=False)
    with torch.no_grad():
        assert_close(model(batch["input_ids"]), theirs(**batch).logits, "logits")
        again, _, _ = load_model(tmp_path / "adapters", device="cpu")
        assert_close(again(batch["input_ids"]), theirs(**batch).logits, "read back")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"lora_magnitude_vector must be \[144\] with use_dora.*found none. Save the adapters"),
        ({"lora_bias": True}, r"lora_bias must be false, as nothing else is implemented; found True. Merge"),
        ({"base_model_name_or_path": "nowhere"}, r"the base must be on this machine.*found 'nowhere'. Name the base"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save must be null"),
        (
            {"lora_alpha": 0, "alpha_pattern": {}},
            r"lora_alpha must be above 0, or the adapters change nothing; found 0. Load the base",
        ),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights must be true, as nothing else is implemented"),
    ],
)
def test_what_cannot_be_read_is_named(settings: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    original("gpt2", tmp_path / "base")
    weights = draw_adapters(formats.read(tmp_path / "base"))
    formats.FORMATS.find("peft").write(weights, tmp_path / "adapters", PeftOptions())
    file = tmp_path / "adapters" / "adapter_config.json"
    content = peft_format.files.read_json(file) | settings
    file.write_text(peft_format.json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path / "adapters")


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_peft_adapts_the_layers_that_were_exported_alone(name: str, tmp_path: pathlib.Path) -> None:
    """Not others whose names end alike: `dense` of BERT's heads, `c_proj` of GPT-2's attention."""
    reference = original(name, tmp_path / "base")
    weights = draw_adapters(formats.read(tmp_path / "base"), lora_target_modules=["mlp.*"])
    formats.FORMATS.find("peft").write(weights, tmp_path / "adapters", PeftOptions())
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapters")
    adapted = {name for name, module in theirs.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    layers = [each for each in peft_format.layers_of(weights) if f"model/{each.modules[0]}{A}" in weights.tensors]
    assert adapted == {f"{peft_format.PREFIX}{each.name}" for each in layers}
    again = formats.read(tmp_path / "adapters")
    assert again.keys() == weights.keys() and all(torch.equal(again[each], weights[each]) for each in weights)


def test_an_adapter_of_another_base_is_refused(tmp_path: pathlib.Path) -> None:
    original("gpt2", tmp_path / "base")
    original("llama", tmp_path / "other")
    weights = draw_adapters(formats.read(tmp_path / "base"))
    formats.FORMATS.find("peft").write(weights, tmp_path / "adapters", PeftOptions())
    with pytest.raises(CheckpointError, match=r"must be of linear layers of the transformer blocks of this base alone"):
        formats.read(tmp_path / "other", None, {"adapter": tmp_path / "adapters"})
    other = formats.read(tmp_path / "other")
    changed = dataclasses.replace(other, train_state={"base": {"path": "p", "fingerprint": "f"}})
    with pytest.raises(
        CheckpointError, match=r"must have the weights that the adapters .* were trained on, those of p"
    ):
        adapters.attach(weights, changed)
