"""One training script, with Accelerate in one process and with megalith.accelerate in layouts: the same curve."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import get_scheduler

from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import VOCABULARY, accelerating, toy_model

STEPS, BATCH, LENGTH = 50, 8, 16
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, fields of the plugin
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp_degree": 2, "sequence_parallelism": True}),
    "pp2": (2, {"pp_degree": 2, "num_micro_batches": 2}),
    "tp2 pp2": (4, {"tp_degree": 2, "pp_degree": 2, "num_micro_batches": 2, "sequence_parallelism": True}),
    "dp2 pp2 sharded": (4, {"pp_degree": 2, "num_micro_batches": 2, "use_distributed_optimizer": True}),
}
MODELS = ("gpt2", "megatron-bert", "t5", "llama")
SCRIPTS: dict[str, dict[str, Any]] = {  # name -> what differs from the plain script
    "plain": {},
    "accumulation and clipping": {"accumulation": 2, "clip": 0.5, "scheduler": "cosine"},
    "torch's scheduler": {"scheduler": "step"},
    "masked labels, padding": {"padded": True},
}
# The plain script with every model in every layout, and one of the others with each of these, each script in every
# layout and with every model but one: all of the product passed once, and takes half an hour.
OTHERS = list(SCRIPTS)[1:]
CASES = [("plain", kind, layout) for kind in MODELS for layout in LAYOUTS] + [
    (OTHERS[(i + j) % len(OTHERS)], kind, layout) for i, kind in enumerate(MODELS) for j, layout in enumerate(LAYOUTS)
]
CASES.remove(("masked labels, padding", "megatron-bert", "dp2"))  # BERT's labels are masked in every script
CASES.remove(("masked labels, padding", "megatron-bert", "tp2 pp2"))


def samples(kind: str, padded: bool) -> list[dict[str, torch.Tensor]]:
    """What a loader collates; of a few patterns, so that there is something to learn."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for number in range(BATCH * 12):
        ids = (torch.arange(LENGTH) * (1 + number % 3) + number) % (VOCABULARY - 4) + 4
        mask = torch.ones(LENGTH, dtype=torch.int64)
        if padded:
            mask[LENGTH - number % 5 :] = 0 if number % 5 else 1
        labels = ids.masked_fill(mask == 0, -100)
        sample = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if kind == "megatron-bert":
            chosen = torch.rand(LENGTH, generator=draw) < 0.3
            chosen[1] = True
            sample |= {
                "input_ids": ids.masked_fill(chosen, 3), "labels": labels.masked_fill(~chosen, -100),
                "token_type_ids": (torch.arange(LENGTH) > 7).long(), "next_sentence_label": torch.tensor(number % 2),
            }  # fmt: skip
        found.append(sample)
    return found


def script(
    library: str, kind: str, plugin: dict[str, Any], share: int, *, accumulation: int = 1, clip: float | None = None,
    scheduler: str = "linear", padded: bool = False, steps: int = STEPS,
) -> dict[str, Any]:  # fmt: skip
    """A script as people write it. library: the package that it imports. share: of the batch that one loader reads."""
    accelerate = importlib.import_module(library)
    options = (
        {"megatron_lm_plugin": accelerate.utils.MegatronLMPlugin(gradient_clipping=0.0, **plugin)} if plugin else {}
    )
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **options)
    model = toy_model(kind)
    decayed = [each for each in model.parameters() if each.dim() > 1]
    others = [each for each in model.parameters() if each.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    data = samples(kind, padded)
    loader = DataLoader(data, batch_size=BATCH // share)
    if scheduler == "step":
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.5)
    else:
        schedule = get_scheduler(scheduler, optimizer, num_warmup_steps=5, num_training_steps=steps)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses, norms, rates, done = [], [], [], 0
    model.train()
    while done < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients and clip is not None:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), clip)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            done += accelerator.sync_gradients
            rates.append(schedule.get_last_lr()[0])
            if done == steps:
                break
    model.eval()
    with torch.no_grad():
        evaluated = [model(**batch).loss.item() for batch in loader]
    return {"losses": losses, "norms": norms, "rates": rates, "evaluated": evaluated}


def in_layout(kind: str, layout: str, how: dict[str, Any]) -> dict[str, Any]:
    """The script with megalith.accelerate, on one rank."""
    world, plugin = LAYOUTS[layout]
    micro_batches = plugin.get("num_micro_batches", 1)
    ranks = world // (plugin.get("tp_degree", 1) * plugin.get("pp_degree", 1))
    with accelerating():
        return script("megalith.accelerate", kind, {"tp_degree": 1, **plugin}, ranks * micro_batches, **how)


def check(kind: str, layout: str, how: dict[str, Any]) -> None:
    with accelerating():
        expected = script("accelerate", kind, {}, 1, **how)
    for found in run_ranks(in_layout, LAYOUTS[layout][0], kind, layout, how, timeout=280):
        assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        assert found["rates"] == pytest.approx(expected["rates"], rel=1e-9)
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-3)
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-3)
    assert max(expected["losses"]) - min(expected["losses"]) > 0.2 and all(map(math.isfinite, expected["losses"]))


@pytest.mark.parametrize(
    ("kind", "layout"), [("llama", "dp2"), pytest.param("megatron-bert", "tp2", marks=pytest.mark.slow), ("t5", "pp2")]
)
def test_some_models_in_some_layouts(kind: str, layout: str) -> None:
    """Of the cases below, those that the covering set runs."""
    check(kind, layout, {})


@pytest.mark.slow
@pytest.mark.parametrize(("how", "kind", "layout"), CASES)
def test_every_model_in_every_layout(how: str, kind: str, layout: str) -> None:
    check(kind, layout, SCRIPTS[how])
