"""A small Retro with a retriever that needs no database, and one forward pass over a whole text with its neighbours."""

import torch

from megalith.config.sections.model import ModelConfig
from megalith.generation.model import TextModel
from megalith.runtime.build import build_model

M, VOCABULARY = 5, 40  # chunks that do not divide the 128 tokens that are read at one time
BASE = {
    "model_type": "retro", "num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "max_position_embeddings": 200, "retro_layer_numbers": [2, 3], "retro_gpt_chunk_length": M,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "init_method_std": 0.3,
}  # fmt: skip
FORMS = {
    "absolute": {},
    "rotary": {"position_embedding_type": "rope", "num_query_groups": 2, "normalization": "RMSNorm"},
}

LAYOUTS = {
    "tp2": (2, {"tensor_model_parallel_size": 2}), "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp3": (3, {"pipeline_model_parallel_size": 3}), "dp2": (2, {"tensor_model_parallel_size": 1}),
}  # fmt: skip


def neighbors_of(chunk: list[int]) -> list[list[int]]:
    """0 to 3 neighbours of 1 to 12 tokens, by the chunk alone: fewer and more than the model reads."""
    generator = torch.Generator().manual_seed(sum(token * 41**place for place, token in enumerate(chunk)) % 2**31)
    count = int(torch.randint(4, (), generator=generator))
    return [
        torch.randint(VOCABULARY, (int(torch.randint(1, 13, (), generator=generator)),), generator=generator).tolist()
        for _ in range(count)
    ]


def make(form: str) -> TextModel:
    model = build_model(ModelConfig(**BASE | FORMS[form]), torch.device("cpu"), torch.float64, seed=5)
    return TextModel(model, retriever=neighbors_of)


def teacher_forced(model: TextModel, ids: list[int]) -> torch.Tensor:
    """Logits [tokens, V] of a forward pass over all tokens, with the neighbours of every whole chunk."""
    c = model.config
    chunks = len(ids) // M
    tokens = torch.zeros(1, chunks, c.retro_num_neighbors, c.retrieved_length, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for number in range(chunks):
        for place, found in enumerate(neighbors_of(ids[number * M : (number + 1) * M])[: c.retro_num_neighbors]):
            found = found[: c.retrieved_length]
            tokens[0, number, place, : len(found)] = torch.tensor(found)
            mask[0, number, place, : len(found)] = 1
    with torch.no_grad():
        return model(torch.tensor([ids]), neighbor_tokens=tokens, neighbor_mask=mask)[0]
