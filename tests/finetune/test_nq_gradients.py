"""`finetune nq` with hard negatives: every gradient is that of the whole batch in one piece of autograd."""

import json

import pytest
import torch
import torch.nn.functional as F

from megalith.parallel import mesh as meshes
from megalith.testing import run_ranks
from megalith.testing.finetuning import measure_steps
from megalith.testing.parity import TOLERANCE, LayoutResult, compare, merge
from megalith.training.build import build_loaders, open_datasets, open_tokenizer, trainer_from
from megalith.training.pretrain import with_vocabulary
from megalith.training.resume.start import read_weights
from tests.finetune.files import task_config

BATCH = 8
LAYOUTS = {
    "micro-batches of 2": (1, {"micro_batch_size": 2}),
    "dp2": (2, {"micro_batch_size": 2}),
    "dp4": (4, {"micro_batch_size": 1}),
    "dp2 full": (2, {"micro_batch_size": 4, "data_parallel_sharding": "full"}),
    "tp2 dp2": (4, {"micro_batch_size": 2, "tensor_model_parallel_size": 2}),
    "pp2 dp2": (4, {"micro_batch_size": 1, "pipeline_model_parallel_size": 2}),
}
COVERING = ("micro-batches of 2", "dp2", "tp2 dp2")


def at_once(config) -> tuple[LayoutResult, dict[str, int]]:
    """The definition, all of the first batch in one piece; and how many contexts are missing, or masked."""
    torch.manual_seed(0)
    mesh, (tokenizer, _) = meshes.init_mesh(config.parallel), open_tokenizer(config)
    (batch,) = build_loaders(config, mesh, open_datasets(config, mesh, tokenizer))["train"].step(0, BATCH)
    runtime = trainer_from(read_weights(config), config, mesh, tokenizer, torch.float64).runtime
    runtime.begin_step(0)
    queries, contexts = runtime.model(
        batch["query_ids"], padding_mask=batch["query_padding_mask"], context_ids=batch["context_ids"],
        context_padding_mask=batch["context_padding_mask"], samples=batch["samples"], step=torch.tensor(0),
    )  # fmt: skip
    right = torch.arange(BATCH) * contexts.shape[1]
    absent = (batch["context_mask"].flatten() == 0).expand(BATCH, -1)
    same = batch["document"][:, :1] == batch["document"].flatten()
    excluded = (absent | same).index_put((torch.arange(BATCH), right), torch.tensor(False))
    scores = queries @ contexts.flatten(0, 1).t()
    loss = F.cross_entropy(scores.masked_fill(excluded, -torch.inf), right)
    loss.backward()
    gradients = {name: each.grad for name, each in runtime.named_parameters()}
    found = {"absent": int(absent[0].sum()), "same": int((same & ~absent).sum()) - BATCH}
    return LayoutResult(loss.item(), {}, gradients), found


@pytest.fixture(scope="module")
def config(files, tmp_path_factory):
    """Four hard negatives are asked for, more than some questions have, and two questions share their passage."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "vocab.txt").write_text((files / "vocab.txt").read_text())
    passages = [{"title": f"w{number}", "text": f"w{number} w{number + 1} w{number + 2}"} for number in range(12)]
    entries = [
        {
            "question": f"w{number} w{number + 1}", "answers": ["w"], "positive_ctxs": [passages[number % 7]],
            "hard_negative_ctxs": passages[number : number + 1 + number % 4], "negative_ctxs": [],
        }
        for number in range(BATCH)
    ]  # fmt: skip
    (folder / "nq-train.json").write_text(json.dumps(entries))
    made = task_config(
        files, folder / "run", "nq", train_data=[str(folder / "nq-train.json")], train_hard_neg=4, epochs=None,
        train_iters=1, micro_batch_size=BATCH, retriever_mask_same_document=True, retriever_chunk_queries=3,
        hidden_dropout=0.1, attention_dropout=0.1, clip_grad=0.0, num_layers=4,
    )  # fmt: skip
    return with_vocabulary(made, open_tokenizer(made)[0])


@pytest.fixture(scope="module")
def expected(config) -> LayoutResult:
    """With dropout, contexts that are missing, and passages that another question's is equal to."""
    result, found = run_ranks(at_once, 1, config)[0]
    assert found["absent"] > 0 and found["same"] > 0
    return result


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in COVERING)) for n in LAYOUTS])
def test_every_gradient_is_that_of_the_batch_in_one_piece(config, expected, name):
    ranks, changes = LAYOUTS[name]
    parts = [part.steps[0] for part in run_ranks(measure_steps, ranks, config.replace(**changes), torch.float64, 1)]
    for found in [*parts, merge(parts)]:  # what a stage has not, another has
        here = LayoutResult(found.loss, {}, expected.gradients | found.gradients)
        loss, worst, *_ = compare(expected, here, torch.float64)
        assert loss.error <= TOLERANCE[torch.float64] and worst.error <= TOLERANCE[torch.float64], (loss, worst)
    assert merge(parts).gradients.keys() == expected.gradients.keys()
