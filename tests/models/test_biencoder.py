"""The bi-encoder against its definition: each tower is a BERT, and the loss is a softmax over the whole batch."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megalith.config.parameter_kinds import tower_name
from megalith.models.bert import Encoder
from megalith.models.biencoder import BiEncoder
from megalith.parallel import mesh as meshes
from megalith.runtime.build import build_model, build_runtime
from megalith.testing import batches, parity, run_ranks
from megalith.training.tasks import build_task
from tests.parity.cases import SMALL

CONFIG = SMALL.replace(model_type="ict", dataset="ict", loss="ict", biencoder_projection_dim=12, global_batch_size=6)


def reference(model: BiEncoder, batch: dict, scale: float = 1.0) -> torch.Tensor:
    """The loss of the whole batch in plain torch, from the vectors of the texts."""
    queries, contexts = model(
        batch["query_ids"], padding_mask=batch["query_padding_mask"], context_ids=batch["context_ids"],
        context_padding_mask=batch["context_padding_mask"], samples=batch["samples"], step=torch.tensor(0),
    )  # fmt: skip
    scores = queries.double() @ contexts.double().t() * scale
    return -F.log_softmax(scores, dim=1).diagonal().mean()


def step(config):
    """(loss, gradients) of one training step, and those of the reference."""
    runtime = build_runtime(config, meshes.init_mesh(config.parallel), torch.float64)
    loss = parity.forward_backward_once(runtime)
    found = {name: parameter.grad.clone() for name, parameter in runtime.named_parameters()}
    runtime.model.zero_grad()
    scale = config.model.hidden_size**-0.5 if config.retriever.retriever_score_scaling else 1.0
    expected = reference(runtime.model, parity.batch(config), scale)
    expected.backward()
    return loss, found, expected.item(), {name: each.grad for name, each in runtime.named_parameters()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"biencoder_shared_query_context_model": True, "retriever_score_scaling": True, "micro_batch_size": 2},
        {"hidden_dropout": 0.1, "attention_dropout": 0.1, "micro_batch_size": 3, "retriever_chunk_queries": 4},
    ],
)
def test_loss_and_gradients_are_those_of_the_definition(changes) -> None:
    loss, found, expected, gradients = run_ranks(step, 1, CONFIG.replace(**changes))[0]
    assert loss == pytest.approx(expected, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"norm_after_residual": True}, {"bert_no_binary_head": True}])
def test_a_tower_is_a_bert(changes) -> None:
    """A text's vector is the last hidden state of its first token in models/bert.py (equal to transformers')."""
    config = dataclasses.replace(CONFIG.model, biencoder_projection_dim=0, **changes)
    model, bert = build_model(config, torch.device("cpu"), seed=3), Encoder(config)
    batch = batches.ict(CONFIG)
    for tower in ("query", "context"):
        ids, mask, state = f"{tower}_ids", f"{tower}_padding_mask", model.state_dict()
        bert.load_state_dict({name: state[tower_name(tower, name)] for name in bert.state_dict()})
        hidden = bert.eval().encode(batch[ids], None, None, batch[mask], None, torch.arange(batch[ids].shape[1]))
        arguments = {"context_ids": batch[ids], "context_padding_mask": batch[mask]}
        if tower == "query":
            arguments = {"padding_mask": batch[mask]}
        vectors = model(batch[ids] if tower == "query" else None, **arguments)[tower == "context"]
        torch.testing.assert_close(vectors, hidden[:, 0])


def test_one_kind_of_text_alone_and_several_contexts() -> None:
    model = build_model(CONFIG.model, torch.device("cpu"), seed=3)
    batch = batches.ict(CONFIG, contexts=3)
    queries, contexts = model(batch["query_ids"], context_ids=batch["context_ids"])
    assert queries.shape == (6, 12) and contexts.shape == (6, 3, 12)
    assert model(batch["query_ids"])[1] is None
    absent, alone = model(None, context_ids=batch["context_ids"][:, 1])
    assert absent is None
    torch.testing.assert_close(alone, contexts[:, 1])


def ranked(changes, tensors):
    """(loss, ranks) of a pool of the global batch."""
    config = CONFIG.replace(**changes)
    task = build_task(config, meshes.init_mesh(config.parallel))
    pool = {name: torch.as_tensor(value) for name, value in tensors.items()}
    counts = {"ict loss": torch.tensor(float(len(pool["queries"])))}
    metrics = {name: float(total) for name, (total, _) in task.metrics(pool, {}).items()}
    return float(task.losses(pool, {}, counts)["ict loss"]), task.ranks(pool).tolist(), metrics


def one_rank(changes, **tensors):
    return run_ranks(ranked, 1, changes, tensors)[0]


@pytest.mark.parametrize("chunk", [1, 2, 1024])
def test_what_is_masked_is_no_candidate(chunk) -> None:
    queries = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]
    contexts = [[[2.0, 0.0], [9.0, 9.0]], [[0.0, 2.0], [3.0, 0.0]], [[1.0, 1.0], [2.0, 0.0]]]
    documents, there = [[5, 6], [7, 5], [5, 8]], [[1, 0], [1, 1], [1, 1]]
    base = {"queries": queries, "contexts": contexts, "document": documents, "context_mask": there}
    scores = torch.tensor(queries) @ torch.tensor(contexts).flatten(0, 1).t()
    scores[:, 1] = -torch.inf
    loss, ranks, metrics = one_rank({"retriever_chunk_queries": chunk}, **base)
    assert loss == pytest.approx(float(F.cross_entropy(scores, torch.tensor([0, 2, 4]))), rel=1e-6)
    # Of equal scores the own context counts as the last: 2 = 2 for the first and the last query.
    assert ranks == [2, 0, 4] and metrics == {"top1_acc": 1.0, "top5_acc": 3.0}
    scores[0, [3, 4]], scores[2, [0, 3]] = -torch.inf, -torch.inf  # of document 5, as the own contexts
    loss, ranks, _ = one_rank({"retriever_chunk_queries": chunk, "retriever_mask_same_document": True}, **base)
    assert loss == pytest.approx(float(F.cross_entropy(scores, torch.tensor([0, 2, 4]))), rel=1e-6)
    assert ranks == [1, 0, 2]


def test_equal_vectors_earn_nothing() -> None:
    same = torch.ones(6, 4)
    _, ranks, metrics = one_rank({}, queries=same, contexts=same[:, None])
    assert ranks == [5] * 6 and metrics == {"top1_acc": 0.0, "top5_acc": 0.0}
