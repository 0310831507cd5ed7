"""What a call of a prepared model means, and what is done with the gradient that reaches its loss, in every layout."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from megalith.accelerate import Accelerator
from megalith.accelerate.utils import MegatronLMPlugin
from megalith.common.errors import ConfigError, TrainingError
from megalith.integrations.accelerate.saving.export import gather
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import VOCABULARY, accelerating, toy_model

ROWS, LENGTH = 8, 16
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, fields of the plugin
    "one": (1, {}),
    "micro-batches": (1, {"num_micro_batches": 4}),
    "dp2": (2, {}),
    "dp2, micro-batches": (2, {"num_micro_batches": 2}),
    "tp2": (2, {"tp_degree": 2, "sequence_parallelism": True}),
    "cp2": (2, {"context_parallel_size": 2}),
    "pp2": (2, {"pp_degree": 2, "num_micro_batches": 4}),
    "tp2 pp2": (4, {"tp_degree": 2, "pp_degree": 2, "num_micro_batches": 2}),
    "dp2 pp2": (4, {"pp_degree": 2, "num_micro_batches": 2}),
    "dp2 sharded": (2, {"use_distributed_optimizer": True}),
    "dp2 pp2 sharded": (4, {"pp_degree": 2, "num_micro_batches": 2, "use_distributed_optimizer": True}),
}
FAST = ("dp2", "tp2", "pp2")
every_layout = pytest.mark.parametrize(
    "layout", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
SCHEDULED = ("micro-batches", "pp2", "dp2 pp2 sharded")


def rows(seed: int = 0) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCABULARY, (ROWS, LENGTH), generator=draw)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.3, -100)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels)]


def plain(kind: str = "gpt2") -> tuple[Any, dict[str, Tensor]]:
    """transformers' model and the whole batch."""
    return toy_model(kind), {name: torch.stack([row[name] for row in rows()]) for name in ("input_ids", "labels")}


def prepared(layout: str, kind: str = "gpt2", **options: Any) -> tuple[Accelerator, Any, Any, dict[str, Tensor]]:
    """Accelerator, model, optimizer, and this process's part of the batch."""
    world, plugin = LAYOUTS[layout]
    parts = world // (plugin.get("tp_degree", 1) * plugin.get("pp_degree", 1) * plugin.get("context_parallel_size", 1))
    size = ROWS // parts // plugin.get("num_micro_batches", 1)
    accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(**{"tp_degree": 1, **plugin, **options}))
    model = toy_model(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=size))
    (batch,) = loader
    return accelerator, model, optimizer, batch


def on_rank(work: Callable, layout: str, *args: Any, **options: Any) -> Any:
    with accelerating():
        return work(*prepared(layout, **options), *args)


def in_layout(work: Callable, layout: str, *args: Any) -> list[Any]:
    return run_ranks(on_rank, LAYOUTS[layout][0], work, layout, *args)


def gradients(model: Any) -> dict[str, Tensor]:
    """The complete gradients by megalith's names, on the last rank."""
    runtime = model.session.runtime
    model.session.finish_gradients()
    with torch.no_grad():
        for parameter in model.session.parameters:
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return gather(runtime)


def expected_gradients(loss: Callable[[Any, dict[str, Tensor]], Tensor]) -> dict[str, Tensor]:
    """The same of transformers' model: its gradients as a model of megalith has its weights."""
    from megalith.runtime.load import load_model

    model, batch = plain()
    loss(model, batch).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    found, _, _ = load_model(model, device="cpu")
    return {name: each.detach() for name, each in found.named_parameters()}


def scaled(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> Any:
    unused = model(**batch).loss * 100.0
    first, second = model(**batch).loss, model(**batch).loss
    (first * 3.0 + second / 2.0).backward()
    assert unused.requires_grad
    return first.item(), second.item(), gradients(model)


@every_layout
def test_the_loss_and_what_is_done_with_it_reach_the_gradients(layout: str) -> None:
    model, batch = plain()
    value = model(**batch).loss.item()
    results = in_layout(scaled, layout)
    for first, second, _ in results:
        assert first == pytest.approx(value, rel=1e-5) and second == pytest.approx(value, rel=1e-5)
    expected = expected_gradients(lambda model, batch: model(**batch).loss * 3.5)
    found = results[-1][2]
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert (found[name] - each).norm() <= 2e-5 * each.norm() + 1e-7, name


def own_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Label smoothing over this process's samples."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)


def from_logits(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor], labelled: bool) -> Any:
    given = batch if labelled else {"input_ids": batch["input_ids"]}
    output = model(**given)
    assert (output.loss is None) != labelled
    accelerator.backward(own_loss(output.logits, batch["input_ids"]))
    return gradients(model)


@pytest.mark.parametrize(
    "layout", ["tp2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "dp2", "dp2 sharded"))]
)
def test_a_loss_from_logits_without_a_pipeline(layout: str) -> None:
    expected = expected_gradients(lambda model, batch: own_loss(model(**batch).logits, batch["input_ids"]))
    found = in_layout(from_logits, layout, False)[-1]
    for name, each in expected.items():
        assert (found[name] - each).norm() <= 2e-5 * each.norm() + 1e-7, name


def logits_of(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        return [accelerator.gather(model(input_ids=batch["input_ids"]).logits)]


@every_layout
def test_logits_are_on_every_process(layout: str) -> None:
    model, batch = plain()
    with torch.no_grad():
        expected = model(input_ids=batch["input_ids"]).logits
    for (found,) in in_layout(logits_of, layout):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def returned_logits(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> Any:
    output = model(**batch)
    output.loss.backward()
    return output.loss.item(), accelerator.gather(output.logits.detach()), gradients(model)


def on_rank_with_logits(layout: str, kind: str) -> Any:
    with accelerating():
        return returned_logits(*prepared(layout, kind, return_logits=True))


@pytest.mark.parametrize("layout", ["tp2", "pp2", pytest.param("cp2", marks=pytest.mark.slow)])
def test_loss_and_logits_of_one_call(layout: str) -> None:
    model, batch = plain()
    output = model(**batch)
    expected = expected_gradients(lambda model, batch: model(**batch).loss)
    for loss, logits, found in run_ranks(on_rank_with_logits, LAYOUTS[layout][0], layout, "gpt2"):
        assert loss == pytest.approx(output.loss.item(), rel=1e-5)
        torch.testing.assert_close(logits, output.logits, rtol=1e-4, atol=1e-5)
        for name, each in found.items():
            assert (each - expected[name]).norm() <= 2e-5 * expected[name].norm() + 1e-7, name


def refusals(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> list[str]:
    """What each thing that needs a graph says."""
    texts = []

    def raises(work: Callable[[], Any]) -> None:
        with pytest.raises(TrainingError) as caught:
            work()
        texts.append(str(caught.value))

    loss = model(**batch).loss
    loss.backward()
    raises(loss.backward)
    raises(lambda: model(**batch).loss.backward(create_graph=True))
    trained = [each for each in model.parameters() if each.requires_grad]
    raises(lambda: torch.autograd.grad(model(**batch).loss, trained))
    raises(lambda: torch.autograd.grad(model(**batch).loss, trained[-1:]))
    if dist.get_world_size() > 1:
        raises(lambda: (model(**batch).loss * (1 + dist.get_rank())).backward())
    if model.session.runtime.pipeline is not None:
        raises(lambda: own_loss(model(input_ids=batch["input_ids"]).logits, batch["input_ids"]).backward())
    return texts


@pytest.mark.parametrize(
    "layout", [name if name == "pp2" else pytest.param(name, marks=pytest.mark.slow) for name in SCHEDULED]
)
def test_what_needs_a_graph_says_what_to_do(layout: str) -> None:
    for texts in in_layout(refusals, layout):
        assert all("custom train step" in text for text in texts) and len(texts) >= 4


def graph_refusals(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> list[str]:
    """What the loss of an ordinary graph says, and a loss of one's own from logits."""
    texts = []
    loss, trained = model(**batch).loss, [each for each in model.parameters() if each.requires_grad]
    loss.backward(retain_graph=True)
    whole = trained[-1].grad
    for work in (
        loss.backward,
        lambda: model(**batch).loss.backward(create_graph=True),
        lambda: own_loss(model(input_ids=batch["input_ids"]).logits, batch["input_ids"]).backward(create_graph=True),
    ):
        with pytest.raises(TrainingError) as caught:
            work()
        texts.append(str(caught.value))
    for wanted in (trained, trained[-1:]):
        if dist.get_world_size() > 1:
            with pytest.raises(TrainingError, match="this process's part"):
                torch.autograd.grad(model(**batch).loss, wanted)
        else:
            torch.testing.assert_close(torch.autograd.grad(model(**batch).loss, wanted)[-1], whole)
    model.zero_grad()
    model(**batch).loss.backward(inputs=trained[-1:])
    assert [each.grad is not None for each in trained] == [False] * (len(trained) - 1) + [True]
    return texts


@pytest.mark.parametrize("layout", ["one", "dp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_what_a_graph_has_not(layout: str) -> None:
    for texts in in_layout(graph_refusals, layout):
        assert all("custom train step" in text for text in texts) and "create_graph" in texts[1] and "once" in texts[0]


def norms(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> list[float]:
    found = []
    for _ in range(3):
        accelerator.backward(model(**batch).loss)
        found.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        assert all(each.grad is None for each in model.parameters())
    return found


@every_layout
def test_norms_and_clipping_do_not_depend_on_the_layout(layout: str) -> None:
    model, batch = plain()
    optimizer, expected = torch.optim.SGD(model.parameters(), lr=1.0), []
    for _ in range(3):
        model(**batch).loss.backward()
        expected.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    for found in in_layout(norms, layout):
        assert found == pytest.approx(expected, rel=1e-4)


def misuse(accelerator: Accelerator, model: Any, optimizer: Any, batch: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="empty batch"):
        model()
    with pytest.raises(ConfigError, match="by name"):
        model(batch["input_ids"], batch["labels"])
    with pytest.raises(ConfigError, match="several optimizers"):
        accelerator.prepare(torch.optim.SGD(toy_model("gpt2").parameters(), lr=1.0))
    with pytest.raises(ConfigError, match="get_state_dict"):
        model.state_dict()
    with pytest.raises(ConfigError, match="before accelerator"):
        model.gradient_checkpointing_enable()
    accelerator.backward(model(**batch).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(TrainingError, match="mix two steps"):
        model(**batch).loss.backward()
    model.zero_grad()
    model(batch["input_ids"], labels=batch["labels"]).loss.backward()


def test_misuse_says_what_to_do() -> None:
    with accelerating():
        misuse(*prepared("one"))


def seeds_that_differ() -> tuple[str, float]:
    with accelerating(), contextlib.redirect_stdout(io.StringIO()) as printed:
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(tp_degree=1))
        model, loader = accelerator.prepare(toy_model("gpt2", seed=dist.get_rank()), DataLoader(rows(), batch_size=4))
        (batch,) = loader
        return printed.getvalue(), model(**batch).loss.item()


def test_all_processes_have_the_weights_of_the_first() -> None:
    model, batch = plain()
    (_, first), (printed, last) = run_ranks(seeds_that_differ, 2)
    assert "weights differed between processes" in printed
    assert first == last == pytest.approx(model(**batch).loss.item(), rel=1e-5)


def freeze(model: Any) -> list[Tensor]:
    """Freeze the embeddings and the lower half, as finetuning does; returns what is trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("transformer.h.2", "transformer.h.3", "transformer.ln_f")))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def frozen(layout: str) -> tuple[list[float], dict[str, Tensor]]:
    with accelerating():
        plugin = {"tp_degree": 1, **LAYOUTS[layout][1]}
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(gradient_clipping=0.0, **plugin))
        model = toy_model("gpt2")
        optimizer = torch.optim.SGD(freeze(model), lr=0.1)
        size = ROWS // plugin.get("num_micro_batches", 1)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=size))
        (batch,), losses = loader, []
        for _ in range(3):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, gather(model.session.runtime)


@pytest.mark.parametrize("layout", ["one", "pp2"])
def test_a_stage_without_a_parameter_that_is_trained(layout: str) -> None:
    model, batch = plain()
    optimizer, expected = torch.optim.SGD(freeze(model), lr=0.1), []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for losses, _ in run_ranks(frozen, LAYOUTS[layout][0], layout):
        assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0]


def classes(layout: str) -> Tensor:
    with accelerating():
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(**{"tp_degree": 1, **LAYOUTS[layout][1]}))
        data = [{"input_ids": row["input_ids"], "labels": number % 2} for number, row in enumerate(rows())]
        model, loader = accelerator.prepare(toy_model("bert", "classification"), DataLoader(data, batch_size=ROWS))
        (batch,) = loader
        return model(**batch).logits.detach()


@pytest.mark.parametrize("layout", ["cp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_logits_of_classes_are_on_every_process(layout: str) -> None:
    ids = torch.stack([row["input_ids"] for row in rows()])
    with torch.no_grad():
        expected = toy_model("bert", "classification")(input_ids=ids).logits
    for found in run_ranks(classes, LAYOUTS[layout][0], layout):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def pretraining(layout: str) -> tuple[float, Tensor, Tensor]:
    with accelerating():
        plugin = {"tp_degree": 1, **LAYOUTS[layout][1]}
        accelerator = Accelerator(megatron_lm_plugin=MegatronLMPlugin(return_logits=True, **plugin))
        size = ROWS // plugin.get("num_micro_batches", 1)
        model, loader = accelerator.prepare(toy_model("bert"), DataLoader(ordered_rows(), batch_size=size))
        (batch,) = loader
        output = model(**batch)
        return output.loss.item(), output.prediction_logits.detach(), output.seq_relationship_logits.detach()


def ordered_rows() -> list[dict[str, Tensor]]:
    return [row | {"next_sentence_label": torch.tensor(number % 2)} for number, row in enumerate(rows())]


@pytest.mark.parametrize("layout", ["one", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cp2", "pp2"))])
def test_both_losses_of_pretraining_beside_logits(layout: str) -> None:
    batch = torch.utils.data.default_collate(ordered_rows())
    with torch.no_grad():
        expected = toy_model("bert")(**batch)
    for loss, *logits in run_ranks(pretraining, LAYOUTS[layout][0], layout):
        assert loss == pytest.approx(expected.loss.item(), rel=1e-5)
        for each, theirs in zip(logits, (expected.prediction_logits, expected.seq_relationship_logits), strict=True):
            torch.testing.assert_close(each, theirs, rtol=1e-4, atol=1e-5)
