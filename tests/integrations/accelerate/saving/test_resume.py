"""A script that stops in the middle of an epoch, resumes in another layout, and exports: with prepare and all."""

import pathlib
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from transformers import get_scheduler

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import MegatronLMPlugin, set_seed
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import VOCABULARY, accelerating, toy_model

BATCH, LENGTH, BATCHES, STOP, STEPS = 8, 16, 5, 3, 12
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # processes, fields of the plugin
    "one": (1, {}),
    "dp2 sharded": (2, {"use_distributed_optimizer": True}),
    "tp2": (2, {"tp_degree": 2, "sequence_parallelism": True}),
    "pp2": (2, {"pp_degree": 2, "num_micro_batches": 2}),
    "tp2 pp2": (4, {"tp_degree": 2, "pp_degree": 2, "num_micro_batches": 2}),
}


def samples(kind: str) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(4, VOCABULARY, (BATCH * BATCHES, LENGTH), generator=torch.Generator().manual_seed(3))
    found = [{"input_ids": row, "labels": row} for row in ids]
    if kind == "megatron-bert":
        found = [each | {"next_sentence_label": torch.tensor(number % 2)} for number, each in enumerate(found)]
    return found


def first_batch(kind: str) -> dict[str, torch.Tensor]:
    return default_collate(samples(kind)[:BATCH])


def script(kind: str, layout: str, folder: str, resumes: bool) -> dict[str, Any]:
    """Losses and rates after step STOP, and the last loss of an evaluation; it saves at STOP unless it resumes."""
    world, plugin = LAYOUTS[layout]
    share = plugin.get("num_micro_batches", 1) * world // (plugin.get("tp_degree", 1) * plugin.get("pp_degree", 1))
    with accelerating():
        accelerator = Accelerator(cpu=True, megatron_lm_plugin=MegatronLMPlugin(**{"tp_degree": 1, **plugin}))
        set_seed(5 if resumes else 1)
        model, loader = (
            toy_model(kind, seed=7 * resumes),
            DataLoader(samples(kind), batch_size=BATCH // share, shuffle=True),
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=STEPS)
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        if resumes:
            accelerator.load_state(folder)
        losses, rates, done = [], [], STOP if resumes else 0
        model.train()
        while done < STEPS:
            for batch in accelerator.skip_first_batches(loader, done % BATCHES) if done % BATCHES else loader:
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
                done += 1
                losses.append(loss.item())
                rates.append(scheduler.get_last_lr()[0])
                if done == STOP and not resumes:
                    accelerator.save_state(folder)
                if done == STEPS:
                    break
        after = STEPS - STOP
        is_main = accelerator.is_main_process
        accelerator.unwrap_model(model).save_pretrained(f"{folder}/{resumes}", is_main_process=is_main)
        state = accelerator.get_state_dict(model)
        assert bool(state) == is_main
        model.eval()
        with torch.no_grad():
            evaluated = model(**first_batch(kind)).loss.item()
        return {"losses": losses[-after:], "rates": rates[-after:], "evaluated": evaluated}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"), [("tp2", "pp2"), ("dp2 sharded", "one"), ("one", "tp2 pp2"), ("tp2 pp2", "dp2 sharded")]
)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "megatron-bert", "t5"])
def test_a_script_resumes_in_another_layout_and_exports(
    kind: str, first: str, second: str, tmp_path: pathlib.Path
) -> None:  # fmt: skip
    expected = run_ranks(script, LAYOUTS[first][0], kind, first, str(tmp_path), False, timeout=240)[0]
    for found in run_ranks(script, LAYOUTS[second][0], kind, second, str(tmp_path), True, timeout=240):
        for name, values in expected.items():
            assert found[name] == pytest.approx(values, rel=1e-4), name
    model = type(toy_model(kind)).from_pretrained(tmp_path / "True", dtype=torch.float32).eval()
    with torch.no_grad():
        assert model(**first_batch(kind)).loss.item() == pytest.approx(found["evaluated"], rel=1e-5)
