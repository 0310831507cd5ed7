"""Steps on chats: the loss of a hand computation, packed or not, the same gradients and weights in every layout."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy

from megalith.config.adapters import is_adapter
from megalith.config.run import RunConfig
from megalith.data.instructions.factory import chat
from megalith.models.gpt import GPT
from megalith.testing.finetuning import masks_of_rank, measure_steps
from megalith.training.build import open_tokenizer
from megalith.training.pretrain import with_vocabulary
from megalith.training.tasks import Task
from megalith.workflows.parity import compare_ranks, compare_steps, same_masks
from tests.chats import make_config, write_chats

ROTARY = {"position_embedding_type": "rope", "untie_embeddings_and_output_weights": True}
LAYOUTS = {  # the gradient is that of one process
    "accumulated": {"micro_batch_size": 1, "processes": 1},
    "data": {"micro_batch_size": 1},
    "sharded data": {"micro_batch_size": 2, "data_parallel_sharding": "full"},
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2, "micro_batch_size": 1},
    "context": {"context_parallel_size": 2},
}
LORA = {"lora_rank": 2}
TIMEOUT = 900.0  # seconds; a machine that others use takes many times as long as alone


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> RunConfig:
    """Eight chats in four rows, two files, weights of their lines."""
    folder = tmp_path_factory.mktemp("chats")
    paths = [write_chats(folder / "a.jsonl"), write_chats(folder / "b.jsonl", (3, 8), weight=0.5)]
    made = make_config(folder, train_data=paths, global_batch_size=4, micro_batch_size=4, train_iters=2, **ROTARY)
    return with_vocabulary(made, open_tokenizer(made)[0])


def by_hand(config: RunConfig, weights: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the tokens that are trained, each chat run alone, and its gradients."""
    tokenizer, _ = open_tokenizer(config)
    stores = chat.open_files(config, tokenizer)[0].stores
    model = GPT(config.model).double().eval()
    model.load_state_dict(weights, strict=False)
    total = count = 0.0
    for sample in range(len(stores)):
        ids, trained = (torch.from_numpy(each.copy()) for each in stores.sample(sample))
        logits = model(ids[None, :-1].long())[0]
        losses = cross_entropy(logits, ids[1:].long(), reduction="none")
        weight = float(stores.weights[sample])
        total = total + weight * losses[trained[1:]].sum()
        count += weight * float(trained[1:].sum())
    loss = total / count
    loss.backward()
    return loss.item(), {name: each.grad for name, each in model.named_parameters()}


@pytest.mark.parametrize("packing", [True, False])
def test_loss_and_gradients_are_those_of_each_chat_alone(config, ranks, packing):
    rows = len(chat.open_files(config.replace(packing=packing), open_tokenizer(config)[0])[0])
    whole = config.replace(packing=packing, global_batch_size=rows, micro_batch_size=1, clip_grad=0.0, train_iters=1)
    without_dropout = whole.replace(hidden_dropout=0.0, attention_dropout=0.0)
    (found,) = ranks(measure_steps, 1, without_dropout, torch.float64, 1, timeout=TIMEOUT)
    loss, gradients = by_hand(config, found.steps[0].weights)
    assert found.steps[0].loss == pytest.approx(loss, rel=1e-7)  # weights of tokens are float32
    assert found.steps[0].gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(found.steps[0].gradients[name], gradient, rtol=1e-6, atol=1e-9), name
    assert rows == len(found.masks[0]) and (rows == 10) != packing


@pytest.fixture(scope="module")
def on_one_process(config, ranks):
    """{lora or not: the result of one process}."""
    changes = {False: {}, True: LORA}
    return {lora: ranks(measure_steps, 1, config.replace(**changes[lora]), timeout=TIMEOUT)[0] for lora in changes}


CASES = [(name, False) for name in LAYOUTS] + [("tensor", True), ("pipeline", True)]


@pytest.mark.parametrize(("layout", "lora"), CASES)
def test_masks_losses_gradients_and_weights_are_those_of_one_process(config, ranks, on_one_process, layout, lora):
    changes = dict(LAYOUTS[layout])
    size = changes.pop("processes", 2)
    parts = ranks(measure_steps, size, config.replace(**changes, **(LORA if lora else {})), timeout=TIMEOUT)
    results = compare_steps(on_one_process[lora], parts, torch.float64)
    assert len(results) == 3
    for result in results:
        assert result.equal, [difference for difference in result.differences if difference.error > result.tolerance]
    assert results[0].masks.tokens == 47 and not results[0].masks.wrong


def test_weights_move(on_one_process):
    for lora, found in on_one_process.items():
        before, after = found.steps[0].weights, found.steps[-1].gradients
        moved = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
        if lora:
            assert all(is_adapter(name) for name in found.steps[0].gradients)
            assert moved and all(name.startswith("layers.") for name in moved)
        else:
            assert moved == after.keys()


class HalfOfEach:
    """Stands for the runtime of a context-parallel rank. wrong: its masks are those of other tokens."""

    def __init__(self, rank, wrong=False):
        self.places, self.taken = torch.tensor([[0, 3], [1, 2]][rank]), torch.tensor([[0, 3], [1, 2]][rank ^ wrong])

    def prepare_batch(self, batch, sequences):
        return {"loss_mask": batch["loss_mask"][:, self.taken], "coordinates": self.places}


def test_masks_are_compared_as_context_parallel_ranks_have_them():
    batch = {"samples": torch.tensor([4]), "input_ids": torch.zeros(1, 4), "loss_mask": torch.tensor([[0.0, 1, 0, 1]])}
    task, expected = SimpleNamespace(sequences=Task.sequences), {4: batch["loss_mask"][0]}
    right, also, wrong = (masks_of_rank(HalfOfEach(*rank), task, [batch]) for rank in ((0,), (1,), (1, True)))
    assert same_masks(expected, [right, also]).wrong == []
    for found in ([right, wrong], [right], [right, also | {5: also[4]}]):  # of other tokens, missing, of no sample
        assert same_masks(expected, found).wrong in ([4], [5])


def test_a_wrong_mask_is_found(on_one_process):
    one = on_one_process[False]
    masks = [{sample: mask.clone() for sample, mask in step.items()} for step in one.masks]
    masks[1][next(iter(masks[1]))][3] = 7.0
    wrong = type(one)(one.steps, masks)
    first, second, weights = compare_steps(one, [wrong], torch.float64)
    assert first.equal and weights.equal and not second.equal and len(second.masks.wrong) == 1
    assert compare_ranks(one.steps[0], [one.steps[0]], torch.float64, 1e-10).equal
