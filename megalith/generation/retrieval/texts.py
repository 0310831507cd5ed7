"""What a retriever finds for the chunks of texts, as a Retro takes it.

Shapes: b texts, l chunks of m tokens, k neighbours of a chunk, r tokens of a neighbour.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from megalith.config.sections.model import ModelConfig
from megalith.generation.model import Retriever, TextModel


def retrieve(chunks: Sequence[Sequence[int]], retriever: Retriever, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Ids int64 and mask bool, both [l, k, r]: the first k neighbours of each chunk, the first r tokens of each."""
    shape = len(chunks), config.retro_num_neighbors, config.retrieved_length
    tokens, mask = torch.zeros(2, *shape, dtype=torch.int64)
    for number, chunk in enumerate(chunks):
        for place, neighbor in enumerate(retriever(chunk)[: shape[1]]):
            found = torch.as_tensor(neighbor, dtype=torch.int64)[: shape[2]]
            tokens[number, place, : len(found)], mask[number, place, : len(found)] = found, 1
    return tokens, mask.bool()


def neighbors_of_texts(
    texts: Sequence[Sequence[int]], length: int, retriever: Retriever, config: ModelConfig
) -> dict[str, Tensor]:  # fmt: skip
    """neighbor_tokens and neighbor_mask [b, l, k, r], l = floor(length / m); empty where there is no neighbour at all.

    length: to which the texts are padded; no chunk has padding in it.
    """
    m = config.retro_gpt_chunk_length
    shape = len(texts), length // m, config.retro_num_neighbors, config.retrieved_length
    tokens, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    for row, ids in enumerate(texts):
        chunks = [tuple(ids[first : first + m]) for first in range(0, len(ids) // m * m, m)]
        tokens[row, : len(chunks)], mask[row, : len(chunks)] = retrieve(chunks, retriever, config)
    return {"neighbor_tokens": tokens, "neighbor_mask": mask} if mask.any() else {}


def warn_without_retriever(model: TextModel, does: str) -> None:
    """Warn of a Retro that reads no neighbours. does: what it does nevertheless."""
    if model.config.retrieval_layers and model.retriever is None:
        text = f"a Retro without a database reads no neighbours, and {does} as a GPT: give --retro-workdir and "
        warnings.warn(text + "--retro-bert-load, or from Python set `model.retriever`", stacklevel=3)
