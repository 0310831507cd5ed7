"""A bi-encoder in training: one curve in every layout, a BERT to begin with, the same queries on resuming."""

import pytest
import torch

from megalith import checkpoint
from megalith.common.errors import CheckpointError
from megalith.testing import run_ranks
from megalith.training.pretrain import train
from tests.tiny import losses, tiny_bert, tiny_config, tiny_ict, write_corpus, write_sentences


@pytest.fixture(scope="module")
def sentences(tmp_path_factory) -> str:
    return write_sentences(str(tmp_path_factory.mktemp("sentences") / "words"))


@pytest.fixture(scope="module")
def one_process(sentences, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("one"))
    run_ranks(train, 1, tiny_ict(sentences, folder, train_iters=4, eval_iters=0, micro_batch_size=8))
    return losses(folder)


LAYOUTS = {
    "micro-batches of 2": (1, {"micro_batch_size": 2, "num_workers": 0}),
    "dp2": (2, {"micro_batch_size": 2}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "tp2 dp2": (4, {"tensor_model_parallel_size": 2}),
    "dp4": (4, {"micro_batch_size": 1}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("dp4", "tp2 dp2"))) for n in LAYOUTS]
)
def test_one_curve(sentences, tmp_path, one_process, name):
    ranks, changes = LAYOUTS[name]
    run_ranks(train, ranks, tiny_ict(sentences, str(tmp_path), train_iters=4, eval_iters=0, **changes))
    assert losses(str(tmp_path)) == pytest.approx(one_process, rel=1e-4)


@pytest.mark.slow
def test_one_curve_of_a_hundred_steps(sentences, tmp_path):
    curves = []
    for number, (ranks, changes) in enumerate(((1, {"micro_batch_size": 8}), (2, {"micro_batch_size": 1}))):
        folder = str(tmp_path / str(number))
        config = tiny_ict(sentences, folder, train_iters=100, eval_iters=0, lr=1e-3, **changes)
        run_ranks(train, ranks, config, timeout=800)
        curves.append(losses(folder))
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_resuming_draws_the_same_queries(sentences, tmp_path, one_process):
    values = dict(train_iters=4, eval_iters=0, micro_batch_size=8)
    run_ranks(train, 1, tiny_ict(sentences, str(tmp_path), exit_interval=2, num_workers=0, **values))
    run_ranks(train, 1, tiny_ict(sentences, str(tmp_path), num_workers=3, **values))
    assert losses(str(tmp_path)) == pytest.approx(one_process, rel=1e-6)


def weights(folder):
    """{parameter: values} of a run's newest checkpoint."""
    from megalith.checkpoint.weights import read_megalith

    found = read_megalith(checkpoint.find(folder, None))
    return {name.removeprefix("model/"): found[name] for name in found if name.startswith("model/")}


def test_towers_begin_with_a_bert(sentences, tmp_path):
    """With a rate of 0 they end with it too; a run that resumes takes its own weights."""
    short = dict(train_iters=2, eval_iters=0, lr_warmup_iters=1)
    run_ranks(train, 1, tiny_bert(sentences, str(tmp_path / "bert"), **short))
    run = dict(lr=0.0, min_lr=0.0, bert_load=str(tmp_path / "bert"), **short)
    run_ranks(train, 1, tiny_ict(sentences, str(tmp_path / "ict"), **run))
    bert, ict = weights(tmp_path / "bert"), weights(tmp_path / "ict")
    for tower in ("query", "context"):
        assert torch.equal(ict[f"{tower}_embeddings.embedding.weight"], bert["embedding.weight"])
        assert torch.equal(ict[f"layers.1.{tower}.mlp.up.weight"], bert["layers.1.mlp.up.weight"])
        assert torch.equal(ict[f"{tower}_head.final_norm.weight"], bert["final_norm.weight"])
        assert ict[f"{tower}_head.projection.weight"].shape == (16, 32)


def test_what_is_no_bert_is_refused(sentences, tmp_path):
    corpus = write_corpus(str(tmp_path / "corpus"))
    run_ranks(train, 1, tiny_config(corpus, str(tmp_path / "gpt"), train_iters=1, eval_iters=0, lr_warmup_iters=0))
    config = tiny_ict(sentences, str(tmp_path / "ict"), bert_load=str(tmp_path / "gpt"))
    with pytest.raises(CheckpointError, match="must be a BERT, as the towers are; found a gpt"):
        run_ranks(train, 1, config)
    with pytest.raises(CheckpointError, match="--bert-load"):
        run_ranks(train, 1, tiny_ict(sentences, str(tmp_path / "other"), bert_load=str(tmp_path / "nothing")))
