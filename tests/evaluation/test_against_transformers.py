"""WikiText, LAMBADA and perplexity equal transformers', window by window, on one process and in every layout."""

import dataclasses
import math
import pathlib
from typing import Any

import pytest

import megalith
from megalith.evaluation.evaluate import evaluate
from megalith.evaluation.result import Result
from megalith.generation.generate import score
from megalith.testing.ranks import run_ranks
from tests.evaluation import references
from tests.evaluation.conftest import POSITIONS

MEASUREMENTS: list[tuple[str, str, dict[str, Any]]] = [
    ("wikitext103", "wiki.txt", {"overlapping_eval": 4}),
    ("wikitext103", "wiki.txt", {"overlapping_eval": POSITIONS // 2}),
    ("wikitext103", "wiki.txt", {"overlapping_eval": POSITIONS}),
    ("wikitext103", "wiki.txt", {"overlapping_eval": 7, "seq_length": 21}),
    ("lambada", "lambada.jsonl", {}),
    ("lambada", "lambada.jsonl", {"strict_lambada": True}),
]
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {"tensor_model_parallel_size": 1},
    "cp2": {"context_parallel_size": 2},
    "tp2 pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "dp2 cp2": {"context_parallel_size": 2},
    "dp3": {"tensor_model_parallel_size": 1},
}
QUICK = ("tp2", "pp2", "dp2", "cp2")


def measured(
    folder: str, texts: str, layout: dict[str, int], number: tuple[int, ...] | None = None
) -> list[Result]:  # fmt: skip
    """The results of measurements (of these numbers) on one process of a layout, in batches of 3."""
    model = megalith.load(folder, device="cpu", **layout)
    return [
        evaluate(model, task, [f"{texts}/{file}"], **({"detokenizer": "wikitext"} if task == "wikitext103" else {}),
                 micro_batch_size=3, **options)
        for task, file, options in (MEASUREMENTS if number is None else [MEASUREMENTS[each] for each in number])
    ]  # fmt: skip


@pytest.fixture(scope="module")
def one_process(gpt2: pathlib.Path, texts: pathlib.Path) -> list[Result]:
    return measured(str(gpt2), str(texts), {})


def values(result: Result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


@pytest.mark.parametrize("number", range(4))
def test_wikitext(number: int, one_process: list[Result], gpt2: pathlib.Path, texts: pathlib.Path) -> None:
    options, result = MEASUREMENTS[number][2], one_process[number]
    stride, length = options["overlapping_eval"], options.get("seq_length", POSITIONS)
    losses, total, tokens, words = references.wikitext(gpt2, texts / "wiki.txt", stride, length)
    found = [example["loss"] for example in result.examples]
    assert found == pytest.approx(losses[: len(found)], rel=1e-4) and not any(losses[len(found) :])
    assert len(found) > 3
    average, ratio = total / tokens, tokens / words
    assert values(result)["average loss"] == pytest.approx(average, rel=1e-5)
    assert values(result)["perplexity"] == pytest.approx(math.exp(min(20, average)), rel=1e-4)
    assert values(result)["token ratio"] == pytest.approx(ratio)
    assert values(result)["adjusted perplexity"] == pytest.approx(math.exp(min(20, average * ratio)), rel=1e-4)
    assert values(result)["predicted tokens"] == tokens == sum(example["tokens"] for example in result.examples)


@pytest.mark.parametrize("strict", [False, True])
def test_lambada(strict: bool, one_process: list[Result], gpt2: pathlib.Path, texts: pathlib.Path) -> None:
    result = one_process[4 + strict]
    expected = references.lambada(gpt2, texts / "lambada.jsonl", strict, POSITIONS)
    assert [example["right"] for example in result.examples] == [right for right, _ in expected]
    assert [example["loss"] for example in result.examples] == pytest.approx([loss for _, loss in expected], rel=1e-4)
    right = sum(right for right, _ in expected)
    assert values(result)["accuracy"] == right / len(expected) and 0 < right < len(expected)
    assert [example["cut_off"] for example in result.examples] == [False] * (len(expected) - 1) + [True]
    assert "1 of 13 passages are longer than 32 tokens and were cut off at the left" in result.notes[0]
    assert result.settings == {"seq_length": POSITIONS}


@pytest.mark.parametrize(
    "layout",
    [
        "tp2",
        "pp2",
        "dp2",
        "cp2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2 pp2", "dp2 cp2", "dp3")),
    ],
)
def test_every_layout(layout: str, one_process: list[Result], gpt2: pathlib.Path, texts: pathlib.Path) -> None:
    ranks = 4 if " " in layout else int(layout[-1])
    chosen = (1, 5)
    for results in run_ranks(measured, ranks, str(gpt2), str(texts), LAYOUTS[layout], chosen, timeout=280):
        for found, expected in zip(results, [one_process[number] for number in chosen], strict=True):
            assert values(found) == pytest.approx(values(expected), rel=1e-5)
            for one, other in zip(found.examples, expected.examples, strict=True):
                assert one.pop("loss") == pytest.approx(other["loss"], rel=1e-4) and one.items() <= other.items()
            assert dataclasses.replace(found, examples=(), metrics={}) == dataclasses.replace(
                expected, examples=(), metrics={}
            )


def test_ppl_by_source(gpt2: pathlib.Path, texts: pathlib.Path) -> None:
    """Each text by itself; the sums of the sources are those of all."""
    model = megalith.load(gpt2, device="cpu")
    files = [str(texts / "a.txt"), str(texts / "mixed.jsonl")]
    result = evaluate(model, "ppl", files, source_key="from", overlapping_eval=4)
    assert list(result.sources) == [files[0], "rest", "songs"]
    tokens = {name: metrics["predicted tokens"].value for name, metrics in result.sources.items()}
    loss = sum(metrics["average loss"].value * tokens[name] for name, metrics in result.sources.items())
    assert sum(tokens.values()) == values(result)["predicted tokens"]
    assert values(result)["average loss"] == pytest.approx(loss / sum(tokens.values()))
    whole = evaluate(model, "ppl", files[:1])
    assert not whole.sources and whole.examples[0]["loss"] == pytest.approx(result.examples[0]["loss"])
    text = (texts / "a.txt").read_text()
    ids = model.tokenizer.encode(text)
    assert whole.examples[0]["loss"] == pytest.approx(-sum(score(model, ids)[0]), rel=1e-5)
    bits = whole.examples[0]["loss"] / math.log(2) / len(text)
    assert values(whole)["bits per byte"] == pytest.approx(bits)
    assert values(whole)["token ratio"] == pytest.approx((len(ids) - 1) / (len(text.split()) - 1))
    first = evaluate(model, "ppl", files[:1], add_bos=True)
    assert values(first)["predicted tokens"] == len(ids)
