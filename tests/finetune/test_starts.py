"""What a finetuning run starts from: a BERT without the head, a classifier of other classes, other programs' files."""

import json
import pathlib

import pytest
import torch

from megalith import checkpoint
from megalith.checkpoint.formats import foreign
from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.run import RunConfig
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from megalith.training.resume.labels import compare_labels
from megalith.training.resume.source import Source
from megalith.workflows.conversion import convert
from megalith.workflows.parity import check_finetuning
from tests.finetune.files import table, task_config
from tests.tiny import tiny_bert, write_sentences

NEW = "the head (classifier) is new and untrained, as the weights are of a bert without it"


def stored(run: pathlib.Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The weights of a run."""
    tensors = checkpoint.read_full(checkpoint.find(run, step))
    return {name: each for name, each in tensors.items() if name.startswith("model/")}


@pytest.fixture(scope="module")
def pretrained(files, tmp_path_factory) -> pathlib.Path:
    """A BERT that was pretrained for a step, with the vocabulary of the tasks' files."""
    folder = tmp_path_factory.mktemp("pretrained")
    prefix = write_sentences(str(folder / "tiny"))
    config = tiny_bert(
        prefix, str(folder / "run"), train_iters=1, lr_warmup_iters=0, eval_iters=0,
        vocab_file=str(files / "vocab.txt"), vocab_size=64,
    )  # fmt: skip
    train(config)
    return folder / "run"


def still(config: RunConfig) -> RunConfig:
    """A run of one step that changes nothing but by rounding, so that its checkpoint shows what it began with."""
    return config.replace(lr=1e-30, train_iters=1, epochs=None, lr_warmup_fraction=None, weight_decay=0.0, eval_iters=0)


@pytest.mark.parametrize("format", ["megalith", "huggingface", pytest.param("megatron", marks=pytest.mark.slow)])
def test_a_new_head_on_a_pretrained_encoder(files, pretrained, tmp_path, capsys, monkeypatch, format):
    source, opened, read = pretrained, list[str](), foreign.read
    monkeypatch.setattr(foreign, "read", lambda load, options: opened.append(str(load)) or read(load, options))
    if format != "megalith":
        source = tmp_path / format
        convert(pretrained, source, to=format)
    config = task_config(files, tmp_path / "run", vocab_size=64, pretrained_checkpoint=str(source))
    train(still(config))
    said = capsys.readouterr().out
    assert NEW in said
    assert opened == [str(source)] * (2 if format != "megalith" else 0)  # to compare it, and to build the model from it
    found, before = stored(tmp_path / "run"), stored(pretrained)
    assert found.keys() - before.keys() == {"model/classifier.weight", "model/classifier.bias"}
    for name in found.keys() & before.keys():
        assert torch.allclose(found[name], before[name], atol=1e-6), name
    assert float(found["model/classifier.weight"].std()) == pytest.approx(0.02, rel=0.5)


@pytest.mark.slow
def test_the_same_start_in_another_layout(files, pretrained, tmp_path):
    config = task_config(files, tmp_path / "one", vocab_size=64, pretrained_checkpoint=str(pretrained))
    train(still(config))
    run_ranks(train, 2, still(config.replace(run_dir=str(tmp_path / "two"), pipeline_model_parallel_size=2)))
    one, two = stored(tmp_path / "one"), stored(tmp_path / "two")
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=1e-7) for name in one)


def test_parity_on_a_pretrained_encoder(files, pretrained, tmp_path):
    """The head is drawn, the same in both layouts; two steps are checked, whatever warm-up the run has."""
    config = task_config(
        files, tmp_path / "run", vocab_size=64, load=str(pretrained), lr_warmup_iters=100, lr_warmup_fraction=None,
        tensor_model_parallel_size=2,
    )  # fmt: skip
    results = check_finetuning(config, 2)
    assert len(results) == 3 and all(result.equal for result in results)
    assert "classifier.weight" in results[0].expected.weights
    before = stored(pretrained)["model/embedding.weight"].double()
    assert torch.equal(results[0].expected.weights["embedding.weight"], before)


def test_a_head_of_other_labels_is_not_resumed_nor_measured(files, tmp_path, capsys):
    """As many classes in another order: the head would be right by chance alone."""
    for name, labels in (("mine", "a, b, c"), ("turned", "b, a, c")):
        text = f"labels: [{labels}]\ncolumns: {{text_a: text, label: label}}\n"
        (tmp_path / f"{name}.yaml").write_text(text)
    rows = [json.dumps({"text": f"w{at}", "label": "abc"[at % 3]}) for at in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def config(name: str, run: str, **changes) -> RunConfig:
        task, data = str(tmp_path / f"{name}.yaml"), [str(tmp_path / "rows.jsonl")]
        values = {"train_data": data, "valid_data": data, "vocab_size": 64, **changes}
        return task_config(files, tmp_path / run, task, **values)

    train(still(config("mine", "run")))
    state = checkpoint.read_train_state(checkpoint.find(tmp_path / "run"))
    assert state["labels"] == ["a", "b", "c"] and str(tmp_path / "mine.yaml") in state["data"]
    words = "The labels of the task .*turned.yaml must be those that the head of .* has learned, in this order: a, b, c"
    with pytest.raises(CheckpointError, match=words):
        train(still(config("turned", "run")).replace(train_iters=2))
    start = {"pretrained_checkpoint": str(tmp_path / "run")}
    with pytest.raises(CheckpointError, match=words):
        train(config("turned", "measured", epochs=0.0, **start))
    capsys.readouterr()
    train(still(config("turned", "new", **start)))
    said = capsys.readouterr().out
    assert "the classes of the head were a, b, c, and are b, a, c now" in said
    assert "turned.yaml, and was " in said


def test_a_head_of_another_task_with_the_same_labels_is_told(files, tmp_path):
    """It may be meant: a head of QQP on pairs of MRPC."""
    config = task_config(files, tmp_path, "mrpc", epochs=0.0, skip_train=True)
    source = Source("run", task_config(files, tmp_path, "qqp"), None, {"labels": ["0", "1"]})
    told = ["the task is mrpc, and was qqp when the head was trained"]
    assert compare_labels(source, config, new_run=True) == told
    assert compare_labels(source, source.config, new_run=True) == []
    turned = source._replace(train_state={"labels": ["1", "0"]})
    with pytest.raises(CheckpointError, match="labels of the task mrpc must be those that the head of run has learned"):
        compare_labels(turned, config, new_run=True)
    assert compare_labels(source._replace(train_state={}), config, new_run=True) == told  # of an older release


def test_epochs_0_measures_a_finetuned_model_and_not_one_without_its_head(files, pretrained, tmp_path):
    config = task_config(files, tmp_path / "run", epochs=1.0, vocab_size=64)
    train(config)
    measure = config.replace(epochs=0.0, run_dir=str(tmp_path / "measured"), global_batch_size=4)
    train(measure.replace(pretrained_checkpoint=str(tmp_path / "run")))
    before, after = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "measured")
    )  # fmt: skip
    assert after["validation"] == pytest.approx(before["validation"], rel=1e-5)
    rows = [table(tmp_path / name / "predictions_dev_matched.tsv") for name in ("run", "measured")]
    assert [row[:3] for row in rows[0]] == [row[:3] for row in rows[1]]
    assert not checkpoint.iterations(tmp_path / "measured/checkpoints")
    for name in ("run", "measured"):  # the weights at the end of the run, and what was measured before
        run, source = tmp_path / name, str(tmp_path / "run") if name == "measured" else None
        with pytest.raises(ConfigError, match=f"{run} holds predictions and results.json, which --epochs 0 would"):
            train(measure.replace(run_dir=str(run), pretrained_checkpoint=source))
        assert json.loads((run / "results.json").read_text()) == (before if name == "run" else after)
    alone = measure.replace(run_dir=str(tmp_path / "other"), pretrained_checkpoint=str(pretrained))
    with pytest.raises(CheckpointError, match="must be of a bert_classification with its head to be measured"):
        train(alone)
    # Its classes are others: the head is new, the encoder is not.
    (tmp_path / "two.yaml").write_text(
        "labels: [contradiction, other]\ncolumns: {text_a: sentence1, text_b: sentence2, label: gold_label}"
    )
    two = task_config(files, tmp_path / "two", str(tmp_path / "two.yaml"), train_data=[str(files / "train.tsv")])
    train(still(two.replace(pretrained_checkpoint=str(tmp_path / "run"), vocab_size=64)))
    found = stored(tmp_path / "two")
    assert found["model/classifier.weight"].shape == (2, 32)
    assert torch.allclose(
        found["model/embedding.weight"], stored(tmp_path / "run")["model/embedding.weight"], atol=1e-6
    )
