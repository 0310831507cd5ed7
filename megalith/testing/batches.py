"""Random global batches for checks of layouts: a function for each kind of model, which its record names as `batch`.

Each returns the tensors that the model's dataset gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.config.run import RunConfig

Batch = dict[str, Tensor]


def gpt(config: RunConfig, step: int = 0) -> Batch:
    """Random ids and labels, a tenth of the tokens masked, unevenly over the samples."""
    generator = torch.Generator().manual_seed(config.batch.seed + step)
    shape = config.batch.global_batch_size, config.data.seq_length
    ids = torch.randint(config.model.vocab_size, (shape[0], shape[1] + 1), generator=generator)
    loss_mask = torch.rand(shape, generator=generator) > torch.linspace(0.0, 0.2, shape[0])[:, None]
    samples = torch.arange(shape[0]) + step * shape[0]
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": loss_mask.float()}
    batch["samples"] = samples
    if config.data.reset_attention_mask:
        batch["documents"] = (ids[:, :-1] % 7 == 0).cumsum(dim=1)
    return batch


def retro(config: RunConfig, step: int = 0) -> Batch:
    """As `gpt`, with random neighbours of random lengths, of which some are missing: all of some chunks."""
    m, batch = config.model, gpt(config, step)
    generator = torch.Generator().manual_seed(config.batch.seed - 1 - step)
    b, s = batch["input_ids"].shape
    shape = b, s // m.retro_gpt_chunk_length, m.retro_num_neighbors, m.retrieved_length
    ids = torch.randint(m.vocab_size, shape, generator=generator)
    lengths = torch.randint(-shape[-1] // 4, shape[-1] + 1, shape[:-1], generator=generator)
    lengths[0, 0] = 0
    return batch | {"neighbor_tokens": ids, "neighbor_mask": (torch.arange(shape[-1]) < lengths[..., None]).long()}


def t5(config: RunConfig, step: int = 0) -> Batch:
    """As `gpt` for the decoder; for the encoder random ids and lengths."""
    target = config.data.decoder_seq_length or config.data.seq_length
    batch = gpt(config.replace(seq_length=target), step)
    generator = torch.Generator().manual_seed(config.batch.seed - 1 - step)
    b, s = shape = config.batch.global_batch_size, config.data.seq_length
    length = (s * (0.5 + 0.5 * torch.rand(b, 1, generator=generator))).long()
    ids = torch.randint(config.model.vocab_size, shape, generator=generator)
    padding = (torch.arange(s) < length).long()
    return batch | {"decoder_input_ids": batch["input_ids"], "input_ids": ids, "padding_mask": padding}


def bert(config: RunConfig, step: int = 0) -> Batch:
    """Random ids, lengths, second segments and masked tokens, and with the binary head sentence orders."""
    generator = torch.Generator().manual_seed(config.batch.seed + step)
    b, s = shape = config.batch.global_batch_size, config.data.seq_length
    positions, uniform = torch.arange(s), torch.rand(b, 2, 1, generator=generator)
    length = (s * (0.5 + 0.5 * uniform[:, 0])).long()
    tokens, masked = positions < length, torch.rand(shape, generator=generator) < 0.3
    ids = torch.randint(config.model.vocab_size, (2, *shape), generator=generator)
    batch = {"input_ids": ids[0], "padding_mask": tokens.long(), "samples": torch.arange(b) + step * b}
    batch |= {"labels": torch.where(masked & tokens, ids[1], -1), "loss_mask": (masked & tokens).float()}
    if not config.model.bert_no_binary_head:
        batch |= {"token_types": (tokens & (positions >= length * uniform[:, 1])).long()}
        batch |= {"sentence_order": torch.arange(b) % 3 % 2, "order_weights": torch.full((b,), 1.0 / b)}
    return batch


def ict(config: RunConfig, step: int = 0, contexts: int = 1) -> Batch:
    """Random ids and lengths of queries and of their contexts; the first and the last are of one document."""
    generator = torch.Generator().manual_seed(config.batch.seed + step)
    b, s = config.batch.global_batch_size, config.data.seq_length
    batch = {"samples": torch.arange(b) + step * b}
    for name, shape in (("query", (b,)), ("context", (b,) if contexts == 1 else (b, contexts))):
        length = (s * (0.5 + 0.5 * torch.rand(*shape, 1, generator=generator))).long()
        batch[f"{name}_ids"] = torch.randint(config.model.vocab_size, (*shape, s), generator=generator)
        batch[f"{name}_padding_mask"] = (torch.arange(s) < length).long()
    return batch | {"document": torch.arange(b) % (b - 1)}


def classification(config: RunConfig, step: int = 0) -> Batch:
    """Random ids, lengths, second segments and classes."""
    return _classes(config, step, (), config.model.num_classes)


def multiple_choice(config: RunConfig, step: int = 0, choices: int = 3) -> Batch:
    """As `classification`, each sample with several choices, of which one is right."""
    return _classes(config, step, (choices,), choices)


def _classes(config: RunConfig, step: int, choices: tuple[int, ...], classes: int) -> Batch:
    generator = torch.Generator().manual_seed(config.batch.seed + step)
    b, s = config.batch.global_batch_size, config.data.seq_length
    positions, uniform = torch.arange(s), torch.rand(b, *choices, 2, generator=generator)
    length = (s * (0.5 + 0.5 * uniform[..., :1])).long()
    tokens = positions < length
    ids = torch.randint(config.model.vocab_size, (b, *choices, s), generator=generator)
    batch = {"input_ids": ids, "padding_mask": tokens.long(), "samples": torch.arange(b) + step * b}
    batch["token_types"] = (tokens & (positions >= length * uniform[..., 1:])).long()
    return batch | {"labels": torch.randint(classes, (b,), generator=generator)}
