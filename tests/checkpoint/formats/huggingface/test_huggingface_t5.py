"""T5, v1.1 and mT5 from and to Hugging Face: bits, old files, refused models; training starts with their loss."""

import json
import pathlib
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megalith.checkpoint import formats
from megalith.checkpoint.formats import HuggingFaceOptions
from megalith.checkpoint.formats.huggingface import conversion as huggingface
from megalith.checkpoint.formats.huggingface.family import architecture_fields
from megalith.checkpoint.weights import read_megalith, write
from megalith.common.errors import CheckpointError
from megalith.data.build import build_datasets
from megalith.data.tokenizers.tokenizer import tokenizer_from_config
from megalith.training.pretrain import train
from megalith.workflows import conversion
from tests.originals.test_t5 import CASES, original
from tests.tiny import losses, tiny_t5, write_sentences


@pytest.fixture(params=CASES)
def theirs(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A saved model."""
    original(request.param).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def logits(folder: pathlib.Path) -> torch.Tensor:
    """By transformers."""
    ids = torch.randint(80, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    return model(input_ids=ids[0], decoder_input_ids=ids[1]).logits


def test_there_and_back(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write(formats.read(theirs), tmp_path / "ours")
    huggingface.write(read_megalith(tmp_path / "ours"), tmp_path / "back", HuggingFaceOptions(max_shard_size=20_000))
    before, after = load_file(theirs / "model.safetensors"), {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    given, written = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "back"))
    assert written == given or "lm_head.weight" in before  # there transformers 5 writes that they are tied
    assert torch.equal(logits(theirs), logits(tmp_path / "back"))
    assert conversion.verify(theirs, tmp_path / "ours") < 1e-5


def test_a_config_of_our_own_making_is_the_same_model(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    weights = replace(formats.read(theirs), files={})
    architecture = json.loads((theirs / "config.json").read_text())["model_type"]
    huggingface.write(weights, tmp_path / "back", HuggingFaceOptions(architecture=architecture))
    assert torch.equal(logits(theirs), logits(tmp_path / "back"))
    exported = formats.read(tmp_path / "back")
    assert architecture_fields(exported.config.model) == architecture_fields(weights.config.model)


def test_files_of_transformers_4(tmp_path: pathlib.Path) -> None:
    """t5-small's: three more copies of the embedding, an unused tensor; and v1.1's older mark of being untied."""
    original("t5").save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    more = {name: tensors["shared.weight"].clone() for name in copies}
    more["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(8, 4)
    save_file(tensors | more, tmp_path / "a/model.safetensors", {"format": "pt"})
    weights = formats.read(tmp_path / "a")
    assert (
        not weights.notes
        and not weights.config.model.untie_embeddings_and_output_weights
        and weights.config.model.scale_output
    )
    original("t5 v1.1").save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "b/config.json").read_text())
    old = {name: value for name, value in config.items() if name != "scale_decoder_outputs"} | {
        "tie_word_embeddings": False
    }
    (tmp_path / "b/config.json").write_text(json.dumps(old))
    model = formats.read(tmp_path / "b").config.model
    assert model.untie_embeddings_and_output_weights and not model.scale_output and model.activation == "geglu_tanh"


@pytest.mark.parametrize(
    "changes", [{"normalization": "LayerNorm"}, {"softmax_scale": None}, {"position_embedding_type": "none"}]
)
def test_models_that_t5_cannot_represent_are_refused(changes: dict, tmp_path: pathlib.Path) -> None:
    original("t5").save_pretrained(tmp_path)
    weights = formats.read(tmp_path)
    other = replace(weights, config=weights.config.replace(**changes), files={})
    with pytest.raises(CheckpointError, match=r"T5ForConditionalGeneration cannot represent"):
        huggingface.write(other, tmp_path / "back", HuggingFaceOptions(architecture="t5"))


def test_training_starts_with_their_loss(theirs: pathlib.Path, tmp_path: pathlib.Path) -> None:
    write(formats.read(theirs), tmp_path / "ours")
    start = tiny_t5(
        write_sentences(str(tmp_path / "text")),
        str(tmp_path / "run"),
        load=str(tmp_path / "ours"),
        finetune=True,
        train_iters=3,
    )
    config = replace(start, model=read_megalith(tmp_path / "ours").config.model)
    train(config)
    data = build_datasets(config, tokenizer_from_config(config.data))["train"]
    rows = [data[number] for number in range(config.batch.global_batch_size)]
    batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(theirs).eval()
    labels = batch["labels"].masked_fill(batch["labels"] < 0, -100)
    with torch.no_grad():
        wanted = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["padding_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            labels=labels,
        ).loss
    assert losses(str(tmp_path / "run"))[0] == pytest.approx(float(wanted), rel=1e-5)


def test_an_encoder_alone_is_refused(tmp_path: pathlib.Path) -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=80)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    message = r"this folder has no decoder \(T5EncoderModel\); found .*\. Convert the whole model"
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path)
