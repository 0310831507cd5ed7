"""Scorers, the metrics of their scores, and what is kept: by hand, and against transformers."""

import math
import pathlib
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalith.cli.main import main
from megalith.common.errors import ConfigError, DataError
from megalith.workflows.detoxify.classifiers import FinetunedClassifier, HuggingFaceClassifier, class_of
from megalith.workflows.detoxify.options import DetoxifyOptions
from megalith.workflows.detoxify.scorers import WordList, score
from megalith.workflows.detoxify.texts import cleanest, scored, toxicity_of
from megalith.workflows.detoxify.toxicity import EXPECTED, toxicity
from tests.detoxify.conftest import BAD, SENTENCES


def test_words(tmp_path: pathlib.Path) -> None:
    (tmp_path / "words.txt").write_text("darn\nold heck\nheck\n\n")
    scorer = WordList(DetoxifyOptions(scorer_path=str(tmp_path / "words.txt")))
    texts = ["Darn!", "darned", "old heck, heck", "nothing", "heck-darn darn"]
    assert scorer(texts) == [0.5, 0.0, 0.75, 0.0, 0.875]


@pytest.mark.parametrize("wrong", [math.nan, 1.5, -0.1, math.inf])
def test_scores_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(DataError, match=r"--scorer mine must give numbers from 0 to 1, or None .* also for 'b'"):
        score(lambda texts: [0.5, wrong], ["a", " ", "b"], "mine")
    with pytest.raises(DataError, match="must give a score for each of 2 texts; found 1 scores"):
        score(lambda texts: [0.5], ["a", " ", "b"], "mine")
    assert score(lambda texts: [0.5, None], ["a", " ", "b"], "mine") == [0.5, None, None]


def test_metrics_by_hand() -> None:
    found = {
        name: metric.value for name, metric in toxicity([[0.1, 0.7], [0.5, None], [None], [0.2, 0.3]], 0.5).items()
    }
    assert found == {
        EXPECTED: pytest.approx(0.5), "its standard deviation": pytest.approx(math.sqrt(0.08 / 3)),
        "toxicity probability": pytest.approx(2 / 3), "toxic continuations": pytest.approx(2 / 5),
        "prompts": 3, "continuations": 5, "without a score": 2,
    }  # fmt: skip
    with pytest.raises(DataError, match="The continuations must have scores; found 2 prompts without one"):
        toxicity([[None], [None]], 0.5)


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=30), st.floats(0.01, 1.0), st.integers(0, 9))
def test_the_cleanest_of_the_scored_ones_are_kept(scores: list[float | None], fraction: float, seed: int) -> None:
    records = [scored(f"text {number}", value) for number, value in enumerate(scores)]
    known = sorted(value for value in scores if value is not None)
    count = int(len(known) * fraction)
    if not count:
        with pytest.raises(DataError, match="--keep-fraction must leave a text to train on"):
            cleanest(records, fraction, seed)
        return
    kept = cleanest(records, fraction, seed)
    assert sorted(map(toxicity_of, kept)) == known[:count] and kept == cleanest(records, fraction, seed)
    assert len({record["text"] for record in kept}) == count


def test_which_class_is_toxic() -> None:
    assert class_of(["toxic", "insult"], None) == 0 and class_of(["clean", "Toxicity"], None) == 1
    assert class_of(["LABEL_0", "LABEL_1"], "label_1") == 1 and class_of(["score"], None) == 0
    with pytest.raises(
        ConfigError, match="--scorer-label must name one of the classifier's classes, no, yes; found not"
    ):
        class_of(["no", "yes"], None)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A classifier of transformers with random weights, of two labels."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for text in SENTENCES for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16, id2label={0: "clean", 1: "toxic"}, label2id={"clean": 0, "toxic": 1},
        initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_a_classifier_of_transformers(bert: pathlib.Path, kind: str, tmp_path: pathlib.Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(bert, problem_type=kind)
    model.save_pretrained(tmp_path / "bert")
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(tmp_path / "bert")
    texts = [*SENTENCES[:5], "the dog " * 20]
    with torch.no_grad():
        rows = [tokenizer(text, truncation=True, max_length=16, return_tensors="pt") for text in texts]
        logits = torch.cat([model(**row).logits for row in rows])
    expected = (logits.softmax(-1) if kind.startswith("single") else logits.sigmoid())[:, 1]
    options = DetoxifyOptions(scorer_path=str(tmp_path / "bert"), batch_size=4, device="cpu")
    assert HuggingFaceClassifier(options)(texts) == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_folder_without_a_classifier_is_refused(bert: pathlib.Path, tmp_path: pathlib.Path) -> None:
    from transformers import AutoModel

    shutil.copytree(bert, tmp_path / "bert")
    AutoModel.from_pretrained(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(DataError, match="must have all weights of the classifier"):
        HuggingFaceClassifier(DetoxifyOptions(scorer_path=str(tmp_path / "bert"), device="cpu"))
    with pytest.raises(ConfigError, match="must be a BERT with a head for classes"):
        FinetunedClassifier(DetoxifyOptions(scorer_path=str(tmp_path / "bert"), device="cpu"))


def test_a_classifier_that_finetune_has_trained(bert: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It tells the bad sentences from the others, with the probabilities of predictions_*.tsv."""
    (tmp_path / "toxicity.yaml").write_text("labels: [clean, toxic]\ncolumns: {text_a: text, label: label}\n")
    rows = [f"{text}\t{'toxic' if text.split()[-1] in BAD else 'clean'}\n" for text in SENTENCES]
    (tmp_path / "texts.tsv").write_text("text\tlabel\n" + "".join(rows))
    words = f"""finetune {tmp_path}/toxicity.yaml --train-data {tmp_path}/texts.tsv --valid-data {tmp_path}/texts.tsv
        --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
        --tokenizer-type BertWordPieceLowerCase --vocab-file {bert}/vocab.txt --micro-batch-size 12 --lr 5e-3
        --train-iters 40 --hidden-dropout 0 --attention-dropout 0 --progress none --device cpu
        --save {tmp_path}/judge"""
    assert main(words.split()) == 0
    scorer = FinetunedClassifier(DetoxifyOptions(scorer_path=str(tmp_path / "judge"), batch_size=7, device="cpu"))
    scores = scorer(SENTENCES)
    assert [value > 0.5 for value in scores] == [text.split()[-1] in BAD for text in SENTENCES]
    lines = (tmp_path / "judge" / "predictions_texts.tsv").read_text().splitlines()
    column = lines[0].split("\t").index("probability toxic")
    assert scores == pytest.approx([float(line.split("\t")[column]) for line in lines[1:]], abs=1e-5)
