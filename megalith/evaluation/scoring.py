"""Scores of given tokens by a model in any layout: the one place where evaluation calls a model.

    scorer = Scorer(model)                        # a TextModel, on all processes
    scores = scorer([Sample(ids, scored=3)])      # [samples, 2]: summed loss, number of labels that are the likeliest

It runs the forward pass of training, from labels to per-token losses (Runtime.forward, models/): whole logits never
exist, tensor- and pipeline-parallel ranks need nothing more, and context-parallel ranks split each sequence as in
training. (The engine of generation would give the same numbers, but with all logits of every token, a cache that
nothing reads again, and context-parallel ranks as replicas.) Data-parallel ranks take batches in turn, each as many
as there are: none is doubled, none dropped. Nothing is exchanged before the end, so that the stages of a pipeline work
on different batches at a time.

A Retro with a retriever reads the neighbours of every whole chunk of a sample. Each process looks them up for itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalith.common.errors import CheckpointError, ConfigError, DataError, problem
from megalith.generation.model import TextModel, most_positions
from megalith.generation.retrieval.texts import neighbors_of_texts, warn_without_retriever
from megalith.layers.scores import TokenScores

CHUNKS_KEPT = 1 << 12  # whose neighbours are not looked up again, where windows overlap
Advance = Callable[[int], None]  # told how many samples have been read


class Sample(NamedTuple):
    """Tokens that are read at a time. The last `scored` of them are predicted, each from all before it."""

    ids: Sequence[int] | np.ndarray
    scored: int


class Scorer:
    """Scores samples by a model, which is left as it is. Every process of the model calls it with the same samples."""

    def __init__(self, model: TextModel, batch_size: int = 8):
        """batch_size: samples that a data-parallel process reads at a time.

        Raises ConfigError for a model that does not predict the next token, and for a Retro whose sequences are split.
        """
        if model.config.decoder_layers or not model.config.causal:
            rule = "must be decoder-only, and read from left to right, for its predictions of the next token to count"
            raise ConfigError(problem("The model", model.config.model_type, rule, "Evaluate a GPT"))
        contexts = 1 if model.runtime is None else model.runtime.mesh.size("cp")
        if model.config.retrieval_layers and contexts > 1:
            rule = "must be 1 for a Retro, whose chunks are not split among processes"
            raise ConfigError(problem("--context-parallel-size", contexts, rule, "Leave it out"))
        warn_without_retriever(model, "is measured")
        self.retriever = model.retriever and functools.lru_cache(CHUNKS_KEPT)(model.retriever)
        self.model, self.runtime, self.batch_size = model, model.runtime, batch_size
        self.limit = most_positions(model.config)

    @torch.no_grad()
    def __call__(self, samples: Sequence[Sample], advance: Advance = lambda number: None) -> np.ndarray:
        """Scores of the samples, float64 [samples, 2], equal on all processes: the sum of the losses of a sample's
        scored tokens, in nats, and how many of these are the model's likeliest.

        Raises CheckpointError where logits are not numbers, DataError for tokens that the model does not have. advance:
        called after each batch with the number of its samples on all data-parallel processes.
        """
        check_samples(samples, self.model.config.vocab_size, self.limit)
        mesh = None if self.runtime is None else self.runtime.mesh
        device = next(self.model.model.parameters()).device if mesh is None else mesh.device
        scores = torch.zeros(len(samples), 2, dtype=torch.float64, device=device)
        number, size = (0, 1) if mesh is None else (mesh.data_rank, mesh.data_size)
        counts_here = mesh is None or mesh.rank("tp") == 0
        batches = self.batches(samples)
        with self.model.evaluating(), predicting(self.model):
            for first in range(0, len(batches), size):
                for batch in batches[first : first + size][number : number + 1]:
                    output = self.forward([samples[each] for each in batch], device)
                    if output is not None and counts_here:
                        scores[torch.tensor(batch, device=device)] += output.double().sum(dim=1)
                advance(sum(map(len, batches[first : first + size])))
        if mesh is not None:
            mesh.all_reduce(scores)  # context-parallel ranks have a part of each sum, the others none
        result = scores.cpu().numpy()
        if (wrong := np.isnan(result[:, 0])).any():
            found = f"NaN for {wrong.sum()} of {len(samples)}, first for number {int(wrong.argmax())}"
            cure = "Look for damaged weights, or a run that had diverged; --dtype float32 rules out an overflow"
            raise CheckpointError(f"The scores of the model must be numbers; found {found}. {cure}.")
        return result

    def batches(self, samples: Sequence[Sample]) -> list[list[int]]:
        """The numbers of the samples of each batch: the longest first, so that little is padded, and what does not fit
        into the memory fails at once.
        """
        order = sorted(range(len(samples)), key=lambda number: -len(samples[number].ids))
        return [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]

    def forward(self, samples: Sequence[Sample], device: torch.device) -> Tensor | None:
        """Scores [b, s, 2] of a batch, under context parallelism of this rank's tokens; None without the last stage."""
        contexts = 1 if self.runtime is None else self.runtime.mesh.size("cp")
        unit = 2 * contexts if contexts > 1 else 1  # see parallel/context.py
        length = -(-max(len(sample.ids) - 1 for sample in samples) // unit) * unit
        inputs = torch.zeros(len(samples), length, dtype=torch.int64)
        labels = torch.full_like(inputs, -1)
        for row, (ids, scored) in enumerate(samples):
            tokens = torch.as_tensor(ids, dtype=torch.int64)
            inputs[row, : len(ids) - 1] = tokens[:-1]
            labels[row, len(ids) - 1 - scored : len(ids) - 1] = tokens[len(ids) - scored :]
        # What pads the end sees no label; it has a position all the same, which the model must have.
        positions = torch.arange(length).clamp(max=(self.limit or length) - 1).expand_as(inputs)
        batch = {"inputs": inputs, "labels": labels, "positions": positions}
        if self.retriever is not None:
            read = [torch.as_tensor(sample.ids, dtype=torch.int64)[:-1].tolist() for sample in samples]
            batch |= neighbors_of_texts(read, length, self.retriever, self.model.config)
        if self.runtime is None:
            arguments = {name: tensor.to(device) for name, tensor in batch.items()}
            return self.model.model(**arguments)
        arguments = self.runtime.prepare_batch(batch, {"inputs": "coordinates"})
        return self.runtime.forward(arguments.pop("inputs"), **arguments)


def check_samples(samples: Sequence[Sample], vocab_size: int, limit: int | None) -> None:
    """Raise DataError for tokens that the model does not have, ConfigError for more than it can read at a time."""
    for number, (ids, scored) in enumerate(samples):
        assert 0 < scored < len(ids), (number, scored, len(ids))
        if (largest := int(np.max(ids))) >= vocab_size or np.min(ids) < 0:
            rule = f"must be among the {vocab_size} tokens of the model's vocabulary"
            raise DataError(problem(f"Every token of sample {number}", largest, rule, "Use the model's own tokenizer"))
    if limit is not None and samples and (longest := max(len(ids) for ids, _ in samples) - 1) > limit:
        rule, cure = f"must be at most {limit}, the model's positions", f"Give --seq-length {limit}"
        raise ConfigError(problem("A sample's length", longest, rule, cure))


@contextlib.contextmanager
def predicting(model: TextModel) -> Iterator[None]:
    """Within the block a forward pass with labels gives scores (TokenScores) instead of losses."""
    modules = [model.model] if model.runtime is None else [stage.model for stage in model.runtime.stages]
    losses = [module.token_loss for module in modules]
    for module, loss in zip(modules, losses):
        module.token_loss = TokenScores(loss)
    try:
        yield
    finally:
        for module, loss in zip(modules, losses):
            module.token_loss = loss
