"""Made-up global batches for checks of layouts: one for each kind of model, named by its record as `batch`.

Each gives what the model's dataset gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalith.config.run import RunConfig

Batch = dict[str, Tensor]


def gpt(config: RunConfig, step: int = 0) -> Batch:
    """Random ids and labels, a tenth of the tokens masked, unevenly over the samples."""
    drawn = torch.Generator().manual_seed(config.batch.seed + step)
    shape = config.batch.global_batch_size, config.data.seq_length
    ids = torch.randint(config.model.vocab_size, (shape[0], shape[1] + 1), generator=drawn)
    seen = torch.rand(shape, generator=drawn) > torch.linspace(0.0, 0.2, shape[0])[:, None]
    samples = torch.arange(shape[0]) + step * shape[0]
    made = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "loss_mask": seen.float()}
    made["samples"] = samples
    if config.data.reset_attention_mask:
        made["documents"] = (ids[:, :-1] % 7 == 0).cumsum(dim=1)
    return made


def t5(config: RunConfig, step: int = 0) -> Batch:
    """What GPT has for the decoder; for the encoder random ids and lengths."""
    target = config.data.decoder_seq_length or config.data.seq_length
    made = gpt(config.replace(seq_length=target), step)
    drawn = torch.Generator().manual_seed(config.batch.seed - 1 - step)
    b, s = shape = config.batch.global_batch_size, config.data.seq_length
    length = (s * (0.5 + 0.5 * torch.rand(b, 1, generator=drawn))).long()
    ids = torch.randint(config.model.vocab_size, shape, generator=drawn)
    padding = (torch.arange(s) < length).long()
    return made | {"decoder_input_ids": made["input_ids"], "input_ids": ids, "padding_mask": padding}


def bert(config: RunConfig, step: int = 0) -> Batch:
    """Random ids, lengths, second segments and masked tokens, and with the binary head orders."""
    drawn = torch.Generator().manual_seed(config.batch.seed + step)
    b, s = shape = config.batch.global_batch_size, config.data.seq_length
    place, draw = torch.arange(s), torch.rand(b, 2, 1, generator=drawn)
    length = (s * (0.5 + 0.5 * draw[:, 0])).long()
    tokens, masked = place < length, torch.rand(shape, generator=drawn) < 0.3
    ids = torch.randint(config.model.vocab_size, (2, *shape), generator=drawn)
    made = {"input_ids": ids[0], "padding_mask": tokens.long(), "samples": torch.arange(b) + step * b}
    made |= {"labels": torch.where(masked & tokens, ids[1], -1), "loss_mask": (masked & tokens).float()}
    if not config.model.bert_no_binary_head:
        made |= {"token_types": (tokens & (place >= length * draw[:, 1])).long()}
        made |= {"sentence_order": torch.arange(b) % 3 % 2, "order_weights": torch.full((b,), 1.0 / b)}
    return made


def classification(config: RunConfig, step: int = 0) -> Batch:
    """Random ids, lengths, second segments and classes."""
    return _classes(config, step, (), config.model.num_classes)


def multiple_choice(config: RunConfig, step: int = 0, choices: int = 3) -> Batch:
    """As `classification`, each sample with several choices, of which one is right."""
    return _classes(config, step, (choices,), choices)


def _classes(config: RunConfig, step: int, choices: tuple[int, ...], classes: int) -> Batch:
    drawn = torch.Generator().manual_seed(config.batch.seed + step)
    b, s = config.batch.global_batch_size, config.data.seq_length
    place, draw = torch.arange(s), torch.rand(b, *choices, 2, generator=drawn)
    length = (s * (0.5 + 0.5 * draw[..., :1])).long()
    tokens = place < length
    ids = torch.randint(config.model.vocab_size, (b, *choices, s), generator=drawn)
    made = {"input_ids": ids, "padding_mask": tokens.long(), "samples": torch.arange(b) + step * b}
    made["token_types"] = (tokens & (place >= length * draw[..., 1:])).long()
    return made | {"labels": torch.randint(classes, (b,), generator=drawn)}
