"""Adapters under the head of a classifier, which is trained whole beside them: against peft, and in runs."""

import json
import pathlib

import peft
import pytest
import torch
import transformers
from torch import Tensor

from megalith import checkpoint
from megalith.checkpoint import formats
from megalith.checkpoint.formats import HuggingFaceOptions, PeftOptions, adapters
from megalith.checkpoint.tensors.lazy import Lazy
from megalith.checkpoint.weights import Weights
from megalith.config.adapters import adapter_shapes, is_adapter
from megalith.runtime.load import load_model
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from megalith.workflows.conversion import convert
from tests.finetune.files import task_config, write_all
from tests.lora.test_peft import assert_close, gradients_of_peft
from tests.originals.families import BERTS, HEADED
from tests.tiny import losses, tiny_bert, write_sentences

HEAD = ("model/classifier.weight", "model/classifier.bias")


def drawn(base: Weights) -> Weights:
    """The base with adapters, and a head, of random numbers."""
    config, generator = base.config.replace(lora_rank=4, lora_alpha=6.0), torch.Generator().manual_seed(2)
    shapes = {f"model/{name}": shape for name, shape in adapter_shapes(config.model, config.lora).items()}
    shapes |= {name: tuple(base.tensors[name].shape) for name in HEAD}
    tensors = {name: Lazy.of(torch.randn(shape, generator=generator) * 0.2) for name, shape in shapes.items()}
    return adapters.attach(base, Weights(config=config, tensors=tensors, source="drawn"))


def ids_of(model: transformers.PreTrainedModel, choices: bool) -> Tensor:
    shape = (3, 4, 11) if choices else (3, 11)
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ["bert classes", pytest.param("bert choices", marks=pytest.mark.slow)])
def test_loss_gradients_and_merged_weights_are_those_of_peft(name: str, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(1)
    reference = HEADED[name]().eval()
    reference.save_pretrained(tmp_path / "base")
    weights = drawn(formats.read(tmp_path / "base"))
    formats.FORMATS.find("peft").write(weights, tmp_path / "adapters", PeftOptions())
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapters", is_trainable=True).eval()
    ids, labels = ids_of(reference, "choices" in name), torch.tensor([0, 2, 1])
    expected = theirs(input_ids=ids, labels=labels)
    expected.loss.backward()
    model, _, _ = load_model(weights, device="cpu", merge_adapter=False)
    loss = torch.nn.functional.cross_entropy(model(ids), labels)
    loss.backward()
    assert_close(loss.detach(), expected.loss.detach(), "loss")
    grads = gradients_of_peft(theirs, weights)
    for each, parameter in theirs.named_parameters():
        if ".classifier.modules_to_save." in each:
            grads[f"classifier.{each.rpartition('.')[2]}"] = parameter.grad
    own = {each: value for each, value in model.named_parameters() if value.requires_grad}
    assert own.keys() == grads.keys()
    if "choices" in name:  # a bias that all choices have changes no loss: its gradient is rounding
        rounding = own.pop("classifier.bias").grad, grads.pop("classifier.bias")
        assert all(float(each.abs().max()) < 1e-6 for each in rounding)
    for each, value in own.items():
        assert_close(value.grad, grads[each], each)

    again = formats.read(tmp_path / "adapters")
    assert again.keys() == weights.keys() and all(torch.equal(again[each], weights[each]) for each in weights)
    merged = adapters.merge(again)
    formats.FORMATS.find("huggingface").write(merged, tmp_path / "merged", HuggingFaceOptions())
    with torch.no_grad():
        exported = type(reference).from_pretrained(tmp_path / "merged").eval()(ids).logits
        assert_close(exported, theirs.merge_and_unload().eval()(ids).logits, "logits")
        assert_close(exported, expected.logits, "logits")


def test_what_peft_has_trained_on_a_bare_encoder_is_read(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(1)
    BERTS["bert"]().save_pretrained(tmp_path / "base")
    made = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    settings = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "r": 4, "init_lora_weights": False}
    theirs = peft.get_peft_model(made, peft.LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path / "adapters")
    ids = ids_of(made, False)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        for merge_adapter in (False, True):
            model, config, _ = load_model(tmp_path / "adapters", device="cpu", merge_adapter=merge_adapter)
            assert config.model.model_type == "bert_classification" and config.model.num_classes == 5
            assert_close(model(ids), expected, f"merge_adapter={merge_adapter}")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """The files of the tasks, and beside them a pretrained BERT."""
    folder = write_all(tmp_path_factory.mktemp("tasks"))
    values = {"train_iters": 1, "lr_warmup_iters": 0, "eval_iters": 0, "vocab_size": 64}
    train(tiny_bert(write_sentences(str(folder / "tiny")), str(folder / "bert"), vocab_file=str(folder / "vocab.txt"),
                    **values))  # fmt: skip
    return folder


def lora_config(files: pathlib.Path, run: pathlib.Path, **changes):
    start = {"pretrained_checkpoint": str(files / "bert"), "lora_rank": 2, "lora_dropout": 0.1, "vocab_size": 64}
    return task_config(files, run, **start | changes)


def stored(path: pathlib.Path) -> dict[str, Tensor]:
    return checkpoint.read_full(checkpoint.find(path))


def test_a_run_trains_adapters_and_head_is_resumed_and_exported(files, tmp_path) -> None:
    config = lora_config(files, tmp_path / "whole", epochs=1.0)
    train(config)
    tensors = stored(tmp_path / "whole")
    model = {name for name in tensors if name.startswith("model/")}
    assert {name for name in model if not is_adapter(name)} == {*HEAD}
    assert model == {f"model/{name}" for name in adapter_shapes(config.model, config.lora)} | {*HEAD}
    train(config.replace(run_dir=str(tmp_path / "parts"), exit_interval=2))
    train(config.replace(run_dir=str(tmp_path / "parts")))
    again = stored(tmp_path / "parts")
    assert losses(str(tmp_path / "parts")) == losses(str(tmp_path / "whole"))
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())

    base = stored(files / "bert")
    merged, _, _ = load_model(tmp_path / "whole", device="cpu")
    found = dict(merged.named_parameters())
    assert torch.equal(found["classifier.weight"], tensors[HEAD[0]])
    assert torch.equal(found["pooler.weight"], base["model/pooler.weight"])
    convert(tmp_path / "whole", tmp_path / "peft", to="peft")
    apart = formats.read(tmp_path / "peft")
    assert all(torch.equal(apart[name], tensors[name]) for name in model)
    measure = {"run_dir": str(tmp_path / "measured"), "pretrained_checkpoint": str(tmp_path / "whole"), "epochs": 0.0}
    train(config.replace(**measure))
    before, after = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "measured"))
    assert after["validation"] == pytest.approx(before["validation"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {"data_parallel_sharding": "full"}],
)
def test_a_layout_gives_the_losses_of_one_process(files, tmp_path, layout) -> None:
    config = lora_config(files, tmp_path / "one", epochs=1.0)
    train(config)
    run_ranks(train, 2, config.replace(run_dir=str(tmp_path / "two"), **layout))
    assert losses(str(tmp_path / "two")) == pytest.approx(losses(str(tmp_path / "one")), rel=1e-4)
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert one.keys() == two.keys() and torch.allclose(one[HEAD[0]], two[HEAD[0]], atol=1e-5)
