"""A tensor-parallel model decodes with the same ModelRunner, each process with a cache of its heads.

An engine over several processes would build on this.
"""

import pytest
import torch

from megalith.config.run import RunConfig
from megalith.generation.cache import KVCache
from megalith.generation.cached_attention import PrefillChunk
from megalith.generation.runner import ModelRunner
from megalith.parallel.sequence import unsharded_sequences
from megalith.runtime.build import build_mesh, build_runtime
from megalith.testing.ranks import run_ranks

FORMS = {
    "alibi": {"position_embedding_type": "alibi"},
    "rotary, groups": {"position_embedding_type": "rope", "num_query_groups": 2},
}
PROMPTS = [[5, 9, 20, 17, 3], [25], list(range(40, 60))]


def logits(config: RunConfig) -> torch.Tensor:
    """Logits of a prefill and of four greedy decoding steps, on one rank."""
    runtime = build_runtime(config, build_mesh(config.parallel, torch.device("cpu")), torch.float64)
    model, ranks = runtime.model.eval(), config.parallel.tensor_model_parallel_size
    cache = KVCache(model, len(PROMPTS), 64, kv_heads=config.model.num_kv_heads // ranks)
    runner, lengths = ModelRunner(model, cache), [len(prompt) for prompt in PROMPTS]
    with unsharded_sequences(model):
        made = [runner.prefill([PrefillChunk(row, ids) for row, ids in enumerate(PROMPTS)])]
        for step in range(4):
            tokens = made[-1].argmax(dim=-1).tolist()
            made.append(runner.decode(range(len(PROMPTS)), tokens, [length + step for length in lengths]))
    return torch.stack(made)


@pytest.mark.parametrize("form", FORMS)
def test_tensor_parallel_decoding_gives_the_logits_of_one_process(form: str) -> None:
    config = RunConfig().replace(
        num_layers=2, hidden_size=32, num_attention_heads=4, max_position_embeddings=64, vocab_size=64,
        init_method_std=0.3, micro_batch_size=1, global_batch_size=1, seq_length=64, **FORMS[form],
    )  # fmt: skip
    (expected,) = run_ranks(logits, 1, config)
    for found in run_ranks(logits, 2, config.replace(tensor_model_parallel_size=2, sequence_parallel=True)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
