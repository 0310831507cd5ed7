"""Models whose probabilities were set by hand have the perplexity and the accuracy that arithmetic says."""

import itertools
import json
import math
import pathlib

import pytest
import torch

from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.sections.model import ModelConfig
from megalith.data.tokenizers.tokenizer import build_tokenizer
from megalith.evaluation.evaluate import evaluate
from megalith.generation.model import TextModel
from megalith.runtime.build import build_model

V = 8  # tokens


def bigram_model(probabilities: torch.Tensor) -> TextModel:
    """A GPT that gives token j after token i with probabilities[i, j], whatever was before.

    Layers add nothing; embeddings are one-hot; the final norm is set so that it leaves one-hot vectors as they are.
    """
    config = ModelConfig(
        num_layers=1, hidden_size=V, num_attention_heads=2, vocab_size=V, max_position_embeddings=16,
        untie_embeddings_and_output_weights=True,
    )  # fmt: skip
    model = build_model(config, torch.device("cpu"), torch.float64, seed=0)
    deviation = math.sqrt((1 / V) * (1 - 1 / V) + config.layernorm_epsilon)
    with torch.no_grad():
        for parameter in model.layers.parameters():
            parameter.zero_()
        model.position_embedding.weight.zero_()
        model.embedding.weight.copy_(torch.eye(V))
        model.final_norm.weight.fill_(deviation)
        model.final_norm.bias.fill_(1 / V)
        model.head.weight.copy_(probabilities.log().T)
    return TextModel(model, build_tokenizer("NullTokenizer", vocab_size=V - 1))


def test_perplexity(tmp_path: pathlib.Path) -> None:
    probabilities = torch.rand(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    ids = torch.randint(0, V - 1, (50,), generator=torch.Generator().manual_seed(4)).tolist()
    (tmp_path / "wiki.txt").write_text(" ".join(map(str, ids)))
    average = -sum(math.log(probabilities[a, b]) for a, b in itertools.pairwise(ids)) / 49
    for stride in (1, 5, 16):
        result = evaluate(
            bigram_model(probabilities), "wikitext103", [str(tmp_path / "wiki.txt")], detokenizer="none",
            overlapping_eval=stride,
        )  # fmt: skip
        assert result.metrics["perplexity"].value == pytest.approx(math.exp(average), rel=1e-12)
        assert result.metrics["adjusted perplexity"].value == pytest.approx(math.exp(average), rel=1e-12)


def lambada(tmp_path: pathlib.Path, model: TextModel, passages: list[str], strict: bool) -> dict[str, float]:
    path = tmp_path / "lambada.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
    found = evaluate(model, "lambada", [str(path)], strict_lambada=strict).metrics
    return {name: metric.value for name, metric in found.items()}


@pytest.mark.parametrize("strict", [False, True])
def test_lambada_of_models_that_know_all_and_nothing(strict: bool, tmp_path: pathlib.Path) -> None:
    passages = [f"{n} {(n + 1) % 7} {(n + 2) % 7}" for n in range(7)]
    step = torch.full((V, V), 0.01, dtype=torch.float64)
    for n in range(7):
        step[n, (n + 1) % 7] = 0.93
    found = lambada(tmp_path, bigram_model(step), passages, strict)
    assert found["accuracy"] == 1.0 and found["answer perplexity"] == pytest.approx(1 / 0.93)
    found = lambada(tmp_path, bigram_model(step.roll(1, dims=1)), passages, strict)
    assert found["accuracy"] == 0.0 and found["answer perplexity"] == pytest.approx(1 / 0.01)


def test_of_equally_likely_tokens_the_first_is_the_answer(tmp_path: pathlib.Path) -> None:
    """A model that knows nothing must not be right everywhere."""
    model = bigram_model(torch.full((V, V), 1 / V, dtype=torch.float64))
    assert lambada(tmp_path, model, [f"1 {n}" for n in range(7)], False)["accuracy"] == 1 / 7


def test_what_is_impossible_costs_infinitely_much_and_what_is_no_number_is_an_error(tmp_path: pathlib.Path) -> None:
    model, path = bigram_model(torch.eye(V, dtype=torch.float64) + 1e-300), tmp_path / "a.txt"
    path.write_text("1 1 1 1 2 3")
    with torch.no_grad():
        model.model.head.weight.clamp_(min=-1e5)  # zero times -inf would be no number
    assert evaluate(model, "ppl", [str(path)]).metrics["perplexity"].value == math.exp(20)
    with torch.no_grad():
        model.model.head.weight[3] = float("nan")
    with pytest.raises(CheckpointError, match=r"must be numbers; found NaN for 1 of 1, first for number 0\. Look for"):
        evaluate(model, "ppl", [str(path)])


def test_what_regularises_training_is_no_part_of_the_loss(tmp_path: pathlib.Path) -> None:
    model, path = bigram_model(torch.full((V, V), 1 / V, dtype=torch.float64)), tmp_path / "a.txt"
    path.write_text("1 2 3")
    model.model.token_loss.z_loss = 1.0
    assert evaluate(model, "ppl", [str(path)]).metrics["average loss"].value == pytest.approx(math.log(V))
    assert type(model.model.token_loss).__name__ == "TokenLoss"  # as it was


def test_models_and_lengths_that_cannot_work(tmp_path: pathlib.Path) -> None:
    model, path = bigram_model(torch.full((V, V), 1 / V, dtype=torch.float64)), tmp_path / "a.txt"
    path.write_text("1 2 3")
    with pytest.raises(ConfigError, match=r"--seq-length must be at most 16, the model's max_pos.*; found 17"):
        evaluate(model, "ppl", [str(path)], seq_length=17)
    with pytest.raises(ConfigError, match="--overlapping-eval must be at most 4, the length of a window"):
        evaluate(model, "ppl", [str(path)], seq_length=4, overlapping_eval=5)
    with pytest.raises(ConfigError, match=r"The model must have one; found no tokenizer"):
        evaluate(TextModel(model.model), "ppl", [str(path)])
    bert = build_model(
        ModelConfig(model_type="bert", num_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=V,
                    max_position_embeddings=16), torch.device("cpu"), seed=0,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="must be decoder-only"):
        evaluate(TextModel(bert, model.tokenizer), "ppl", [str(path)])
