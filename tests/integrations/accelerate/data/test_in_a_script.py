"""Loaders in scripts: the samples of plain Accelerate, and runs that are resumed in the middle of an epoch."""

import importlib

import pytest
import torch
from torch.utils.data import DataLoader

from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import VOCABULARY, accelerating, toy_model
from tests.tiny import write_corpus

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, {"tp_degree": 2}),
    "pp2": (2, {"pp_degree": 2, "num_micro_batches": 2}),
}
BATCH, STEPS = 4, 14  # samples of a step on all processes; steps of a run, of seven an epoch


def masked(samples: list) -> dict:
    """Draws labels at random, as collate functions of masked models do."""
    ids = torch.stack(samples)
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)}


def texts() -> list:
    draw = torch.Generator().manual_seed(2)
    return list(torch.randint(3, VOCABULARY, (7 * BATCH, 8), generator=draw))


def shuffled(library: str, plugin: dict, share: int, collate=None, folder=None, save=None, resume=None) -> list[float]:
    """Losses of a script that shuffles. share: of the batch that its loader reads; save, resume: after this step."""
    accelerate = importlib.import_module(library)
    given = {"megatron_lm_plugin": accelerate.utils.MegatronLMPlugin(gradient_clipping=0.0, **plugin)} if plugin else {}
    accelerator = accelerate.Accelerator(cpu=True, **given)
    torch.manual_seed(4)
    model = toy_model("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(texts(), batch_size=BATCH // share, shuffle=True, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    done, losses = 0, []
    if resume is not None:
        torch.manual_seed(88)
        accelerator.load_state(folder)
        done = resume
    first = done // len(loader)
    for epoch in range(first, STEPS // len(loader)):
        skips = resume is not None and epoch == first
        for batch in accelerator.skip_first_batches(loader, done % len(loader)) if skips else loader:
            ids = batch if collate is None else batch["input_ids"]
            loss = model(**({"input_ids": ids, "labels": ids} if collate is None else batch)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            done += 1
            if done == save:
                accelerator.save_state(folder)
                return losses
    return losses


def in_layout(layout: str, *how) -> list[float]:
    world, plugin = LAYOUTS[layout]
    share = world // (plugin.get("tp_degree", 1) * plugin.get("pp_degree", 1)) * plugin.get("num_micro_batches", 1)
    with accelerating():
        return shuffled("megalith.accelerate", {"tp_degree": 1, **plugin}, share, *how)


def plain() -> list[float]:
    with accelerating():
        return shuffled("accelerate", {}, 1)


def test_one_process_shuffles_as_accelerate_does():
    assert in_layout("one") == pytest.approx(plain(), rel=1e-4)


def test_an_epoch_is_resumed(tmp_path):
    """Also in the second epoch, and with labels drawn at random up to where it was interrupted."""
    whole = in_layout("one")
    for step in (3, 7, 9):
        folder = str(tmp_path / str(step))
        first = in_layout("one", None, folder, step)
        assert first + in_layout("one", None, folder, None, step) == pytest.approx(whole, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_layouts_shuffle_as_accelerate_does(layout):
    expected = plain()
    for found in run_ranks(in_layout, LAYOUTS[layout][0], layout):
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("dp2", "tp2"), ("tp2", "one"), ("one", "pp2"), ("pp2", "dp2")])
def test_an_epoch_is_resumed_in_another_layout(before, after, tmp_path):
    folder, step = str(tmp_path / "state"), 5
    whole = in_layout("one")
    (first, *_) = run_ranks(in_layout, LAYOUTS[before][0], before, None, folder, step)
    for rest in run_ranks(in_layout, LAYOUTS[after][0], after, None, folder, None, step):
        assert first + rest == pytest.approx(whole, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_random_labels_are_those_of_one_process(layout):
    """Masks that are drawn without a seed of their own are the same in all stages and ranks of a model."""
    expected = in_layout("one", masked)
    for found in run_ranks(in_layout, LAYOUTS[layout][0], layout, masked):
        assert found == pytest.approx(expected, rel=1e-3)


def indexed(prefix: str, plugin: dict, steps: int, folder: str | None = None, resumed: bool = False) -> list[float]:
    """The guide's loop over indexed datasets."""
    from megalith.accelerate import Accelerator
    from megalith.accelerate.utils import MegatronLMDummyDataLoader, MegatronLMDummyScheduler, MegatronLMPlugin

    with accelerating():
        accelerator = Accelerator(cpu=True, megatron_lm_plugin=MegatronLMPlugin(eval_iters=1, **plugin))
        accelerator.state.megatron_lm_plugin.megatron_dataset_flag = True
        model = toy_model("gpt2")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = MegatronLMDummyScheduler(optimizer=optimizer, total_num_steps=8, warmup_num_steps=1)
        data = MegatronLMDummyDataLoader(
            data_path=prefix, splits_string="80,20,0", seq_length=16, micro_batch_size=2, num_workers=0
        )
        model, optimizer, scheduler, train, valid, _ = accelerator.prepare(
            model, optimizer, scheduler, data, data, data
        )
        if resumed:
            accelerator.load_state(folder)
        losses = []
        for _ in range(steps):
            model.train()
            batch = next(train) if train is not None else {}
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                losses += [loss.item(), model(**next(valid)).loss.item()]
        if folder is not None and not resumed:
            accelerator.save_state(folder)
        return losses


def test_indexed_datasets_are_resumed(tmp_path):
    prefix, folder = write_corpus(str(tmp_path / "texts")), str(tmp_path / "state")
    whole = indexed(prefix, {"tp_degree": 1}, 8)
    first = indexed(prefix, {"tp_degree": 1}, 3, folder)
    rest = indexed(prefix, {"tp_degree": 1}, 5, folder, True)
    assert first + rest == pytest.approx(whole, rel=1e-5) and len(set(whole)) == 16


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_indexed_datasets_in_layouts(layout, tmp_path):
    prefix = write_corpus(str(tmp_path / "texts"))
    expected = indexed(prefix, {"tp_degree": 1, "num_micro_batches": 2}, 6)
    plugin = {"num_micro_batches": 2} | LAYOUTS[layout][1]
    for found in run_ranks(indexed, 2, prefix, plugin, 6):
        assert found == pytest.approx(expected, rel=1e-3)
