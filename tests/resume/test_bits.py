"""Promise 2 of docs/architecture.md: the same command twice, and stop-and-resume at any step, give identical bits.

This holds on the CPU, in one layout.
"""

import functools

import pytest
import torch

from megalith import checkpoint
from megalith.training.pretrain import train
from tests.tiny import losses, records, tiny_bert, tiny_config, tiny_t5

FORMS = {
    "dropout": {},
    "bf16": {"bf16": True},
    "llama": {
        "position_embedding_type": "rope",
        "swiglu": True,
        "normalization": "RMSNorm",
        "num_query_groups": 2,
        "add_bias_linear": False,
    },
    "documents": {"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True},
    "cyclic": {"dataloader_type": "cyclic"},
}


@pytest.mark.parametrize("form", FORMS)
def test_twice_and_resumed(form, corpus, tmp_path):
    check_bits(functools.partial(tiny_config, corpus, **FORMS[form]), tmp_path)


@pytest.mark.parametrize("google", [False, True])
def test_bert_twice_and_resumed(google, sentences, tmp_path):
    check_bits(
        functools.partial(tiny_bert, sentences, norm_after_residual=google, bert_no_binary_head=google), tmp_path
    )


@pytest.mark.slow
def test_bert_resumes_in_another_layout(ranks, sentences, tmp_path):
    """Tensor 2 x pipeline 2, then one process, then two with everything sharded."""
    train(tiny_bert(sentences, str(tmp_path / "one")))
    moved = tiny_bert(sentences, str(tmp_path / "moved"))
    split = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
    ranks(data_parallel, 4, moved.replace(exit_interval=4, **split))
    train(moved.replace(exit_interval=8))
    ranks(data_parallel, 2, moved.replace(data_parallel_sharding="full"))
    assert losses(str(tmp_path / "moved")) == pytest.approx(losses(str(tmp_path / "one")), rel=1e-4)


RELATIVE = {"position_embedding_type": "relative", "softmax_scale": 1.0, "bf16": True}


@pytest.mark.parametrize("form", [{}, pytest.param(RELATIVE, marks=pytest.mark.slow)])
def test_t5_twice_and_resumed(form, sentences, tmp_path):
    check_bits(functools.partial(tiny_t5, sentences, **form), tmp_path)


def check_bits(make, tmp_path):
    """make: a config of 12 steps from a folder."""
    for name in ("once", "again"):
        train(make(str(tmp_path / name)))
    stopped = make(str(tmp_path / "stopped"))
    assert train(stopped.replace(exit_interval=5)).stop
    assert train(stopped.replace(exit_interval=9)).iteration == 9
    assert train(stopped).iteration == 12
    expected = losses(str(tmp_path / "once"))
    assert len(expected) == 12
    assert losses(str(tmp_path / "again")) == expected
    assert losses(str(tmp_path / "stopped")) == expected
    norms = [
        [line["grad_norm"] for line in records(str(tmp_path / name)) if "grad_norm" in line]
        for name in ("once", "stopped")
    ]
    assert norms[0] == norms[1]
    one, two = (checkpoint.read_full(tmp_path / name / "checkpoints" / "iter_0000012") for name in ("once", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def data_parallel(config):
    """On each rank of a pool."""
    train(config)


@pytest.mark.parametrize(
    "sharding", ["none", *(pytest.param(name, marks=pytest.mark.slow) for name in ("optimizer", "full"))]
)
def test_one_process_and_two_agree(ranks, sharding, corpus, tmp_path):
    """50 steps with dropout; the order of additions differs, nothing else."""
    long = tiny_config(corpus, str(tmp_path / "one"), train_iters=50, lr=2e-3)
    train(long)
    ranks(data_parallel, 2, long.replace(run_dir=str(tmp_path / "two"), data_parallel_sharding=sharding))
    for a, b in zip(losses(str(tmp_path / "one")), losses(str(tmp_path / "two")), strict=True):
        assert b == pytest.approx(a, rel=1e-6)


def test_resume_with_other_numbers_of_processes(ranks, corpus, tmp_path):
    """1 -> 2 -> 3 -> 1 processes: the order of samples and the curve are those of one."""
    config = tiny_config(corpus, str(tmp_path / "one"), micro_batch_size=2, global_batch_size=12)
    train(config)
    moved = config.replace(run_dir=str(tmp_path / "moved"))
    train(moved.replace(exit_interval=3))
    ranks(data_parallel, 2, moved.replace(exit_interval=6))
    ranks(data_parallel, 3, moved.replace(exit_interval=9))
    train(moved)
    for a, b in zip(losses(str(tmp_path / "one")), losses(str(tmp_path / "moved")), strict=True):
        assert b == pytest.approx(a, rel=1e-5)
