"""The parameter counts of Megatron's log for a split model, counted on the model: built on meta, cut and split."""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import (
    FakeStore,  # stands for any rank of any world, without the others
)

from megalith.config.megatron.counts import padded_vocabulary, rank_parameters
from megalith.config.run import RunConfig
from megalith.config.stages import layers_of
from megalith.parallel import plan
from megalith.parallel.collectives import Axis
from megalith.parallel.mesh import build_mesh
from megalith.parallel.pipeline.split import Cut
from megalith.runtime.build import meta_model

GPT2_LARGE = RunConfig().replace(
    num_layers=36, hidden_size=1280, num_attention_heads=20, max_position_embeddings=1024, seq_length=1024,
    vocab_size=50257,
    tensor_model_parallel_size=2, pipeline_model_parallel_size=2, pipeline_split="even",
)  # fmt: skip


@pytest.mark.parametrize(
    ("rank", "parameters"), [(0, 210_753_280), (1, 210_753_280), (2, 209_445_120), (3, 209_445_120)]
)
def test_gpt2_large_on_two_by_two(rank: int, parameters: int):
    vocabulary = padded_vocabulary(50257, GPT2_LARGE.model.make_vocab_size_divisible_by, 2)
    assert vocabulary - 50257 == 175
    config = GPT2_LARGE.replace(vocab_size=vocabulary)  # megalith itself trains the unpadded size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = build_mesh(config.parallel, torch.device("cpu"))
        model = meta_model(config.model)
        Cut(config.model.architecture.find("stages"), layers_of(config), config.model).apply(model, mesh.rank("pp"))
        plan.apply(model, config.model.architecture.find("plan"), Axis(mesh.device_mesh["tp"]))
        found = sum(parameter.to_local().numel() for parameter in model.parameters())
        assert all(parameter.to_local().is_meta for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
    assert found == rank_parameters(GPT2_LARGE, rank // 2) == parameters
