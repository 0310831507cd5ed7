"""GPT-2, Llama, Mistral, Qwen2, Qwen3, Bloom and NeoX against Hugging Face's models: logits, losses, every gradient."""

import pytest
import torch

VOCAB, LENGTH = 97, 33


def test_logits_losses_and_gradients_equal_the_original(each_pair) -> None:
    original, model = each_pair.original, each_pair.model
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    logits = original(ids).logits
    assert (model(ids) - logits).abs().max() < 1e-5
    labels = ids.roll(-1, dims=1)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, LENGTH)
    losses = model(ids, labels=labels)
    assert (losses - wanted).abs().max() < 1e-5
    wanted.mean().backward()
    (losses / losses.numel()).sum().backward()
    theirs = each_pair.renamed({name: parameter.grad for name, parameter in original.named_parameters()})
    for name, parameter in model.named_parameters():
        # A key bias shifts all scores alike: its gradient is zero
        assert theirs[name].norm() > 1e-4 or name.endswith("k.bias"), name
        assert (parameter.grad - theirs[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("case", ["gpt2", "llama, groups", "bloom"])
def test_the_explicit_path_equals_the_original_too(case: str, pair) -> None:
    both = pair(case)
    for layer in both.model.layers.values():
        layer.attention.core.backend = "explicit"
    ids = torch.randint(VOCAB, (2, LENGTH))
    assert (both.model(ids) - both.original(ids).logits).abs().max() < 1e-5


def test_trains_like_the_original(pair) -> None:
    """Ten steps of AdamW from the same weights on the same batches."""
    both = pair("gpt2")
    mine, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (both.model, both.original))
    for step in range(10):
        ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(step))
        weights = torch.full((2, LENGTH - 1), 1 / (2 * LENGTH - 2))
        ours = both.model(ids[:, :-1], labels=ids[:, 1:], loss_weights=weights).sum()
        wanted = both.original(ids, labels=ids).loss
        assert abs(ours.item() - wanted.item()) < 1e-4
        for optimizer, loss in ((mine, ours), (theirs, wanted)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
