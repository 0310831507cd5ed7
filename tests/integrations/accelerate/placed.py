"""A transformers model and megalith's with its weights, to compare what they make of one batch."""

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megalith.integrations.accelerate.batches import keep_padding_idx, to_batch
from megalith.runtime.load import load_model, weights_of
from megalith.training.tasks import TASKS
from tests.originals.families import bert, make

LENGTH, IGNORED, TOLERANCE = 17, -100, 1e-5
LOSSES = {"gpt": "lm", "bert": "bert", "bert_classification": "classification", "t5": "t5"}
PADDED = {  # families whose embedding of padding transformers does not train
    "llama, padding": make("Llama", pad_token_id=3, num_key_value_heads=2),
    "gemma, padding": make("Gemma", pad_token_id=0, num_key_value_heads=1, head_dim=16, rms_norm_eps=1e-6),
}


def masked_lm(kind: str) -> Callable[[], transformers.PreTrainedModel]:
    """A BERT with the head over the vocabulary alone."""
    config = bert(kind)().config
    return lambda: getattr(transformers, f"{kind}ForMaskedLM")(config)


class Placed:
    """A transformers model with random norms and biases, and megalith's with its weights, without dropout."""

    def __init__(self, kind: str, make_model: Callable[[], transformers.PreTrainedModel]):
        torch.manual_seed(0)
        self.kind, self.original = kind, make_model().float().train()
        with torch.no_grad():
            for parameter in self.original.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        for module in self.original.modules():  # in training mode, as scripts have it
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self.model, config, _ = load_model(self.original, device="cpu")
        keep_padding_idx(types.SimpleNamespace(stages=[types.SimpleNamespace(model=self.model)]), self.original)
        self.config, self.hf_config = config.replace(loss_chunk_tokens=13), self.original.config
        self.task = TASKS.find(LOSSES[kind])()

    def batch(self, given: dict[str, Any]) -> dict[str, Tensor]:
        return to_batch(self.kind, given, self)

    def loss(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """Of the micro-batches of a call, as run_micro_batches adds it up."""
        counts = [self.task.counts(batch) for batch in batches]
        total = {name: torch.stack([each[name] for each in counts]).sum() for name in counts[0]}
        outputs = [self.model(**self.task.inputs(batch, total)) for batch in batches]
        losses = [self.task.losses(output, batch, total) for output, batch in zip(outputs, batches)]
        return torch.stack([value for each in losses for value in each.values()]).sum()

    def check(self, given: dict[str, Any], *, but: tuple[str, ...] = ()) -> None:
        """Loss and every gradient equal transformers'; but: our names of those that are not compared."""
        self.model.zero_grad(), self.original.zero_grad()
        theirs = self.original(**given).loss
        loss = self.loss([self.batch(given)])
        assert abs(loss - theirs) < TOLERANCE
        theirs.backward()
        loss.backward()
        expected = gradients(self.original)
        assert expected.keys() == dict(self.model.named_parameters()).keys()
        for name, parameter in self.model.named_parameters():
            assert torch.isfinite(parameter.grad).all(), name
            if name not in but:
                difference = (parameter.grad - expected[name]).abs().max()
                assert difference < TOLERANCE * max(1.0, float(expected[name].norm())), (name, difference)


def gradients(original: nn.Module) -> dict[str, Tensor]:
    """The gradients of a transformers model under megalith's names: those of a model that has them as its weights."""
    clone = copy.deepcopy(original)
    named = dict(original.named_parameters())
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            gradient = named[name].grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    tensors = weights_of(clone).tensors
    return {name.removeprefix("model/"): lazy.read().float() for name, lazy in tensors.items()}


def drawn(padding: str, pad: int = 0, rows: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """Ids and a mask with padding on a side of all rows but the first, at both sides, or anywhere; labels elsewhere."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 97, (rows, LENGTH), generator=random)
    length = torch.tensor([LENGTH, 11, 5, 9, 16])[:rows, None]
    positions = torch.arange(LENGTH).expand(rows, -1)
    mask = {
        "right": positions < length,
        "left": positions >= LENGTH - length,
        "both": (positions >= 2) & (positions < 2 + length),
        "gaps": torch.rand(rows, LENGTH, generator=random) < 0.7,
    }[padding]
    ids = torch.where(mask, ids, pad)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, IGNORED)}
