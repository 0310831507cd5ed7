"""`megalith.load` and `megalith generate` on several processes: any source, straight into the layout."""

import contextlib
import io
import json
import pathlib
import re
import shlex
from typing import Any

import pytest
import torch
import torch.distributed as dist

import megalith
from megalith import checkpoint
from megalith.cli.main import main
from megalith.common.errors import CheckpointError, ConfigError
from megalith.config.flags.loading import to_yaml
from megalith.generation.generate import complete
from megalith.parallel.sharding import to_local
from megalith.runtime.state import weights
from megalith.testing.ranks import run_ranks
from megalith.workflows.conversion import convert
from tests.generation.parallel.layouts import config_of, model_of

SIZES = {"tp2": (2, None), "pp2": (1, 2), "dp2": (1, 1), "tp2 pp2": (2, 2)}
OPTIONS: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 6, "stop_at_eod": False}


@pytest.fixture
def folder(tokenizer, tmp_path: pathlib.Path) -> pathlib.Path:
    """A checkpoint of megalith, of a run in bfloat16 with a layout of its own."""
    llama = {"swiglu": True, "add_bias_linear": False, "vocab_size": tokenizer.vocab_size}
    config = config_of("rope, one key head", "tp2").replace(bf16=True, compile=True, **llama)
    tokenizer.save(tmp_path / "tokenizer")
    files = {f"tokenizer/{path.name}": path for path in (tmp_path / "tokenizer").iterdir()}
    tensors = weights(model_of(config).model)
    checkpoint.save(tmp_path / "run", 10, tensors, train_state={}, config_yaml=to_yaml(config), files=files)
    return tmp_path / "run"


def loaded(
    path: str, sizes: tuple[int | None, int | None], options: dict[str, Any] | None = None
) -> tuple[list[str], list[int], str]:  # fmt: skip
    """Texts, the numbers of elements that this process holds of each parameter, and what it printed."""
    (tensor, pipeline), options = sizes, options or {}
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        model = megalith.load(
            path, device="cpu", tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, **options
        )
    assert model.runtime is not None and not model.training
    assert {parameter.dtype for _, parameter in model.runtime.named_parameters()} == {
        options.get("dtype", torch.float32)
    }
    elements = [to_local(parameter).numel() for _, parameter in model.runtime.named_parameters()]
    return megalith.generate(model, ["Once", "Z", "upon"], **OPTIONS), elements, printed.getvalue()


@pytest.mark.parametrize("layout", [layout if layout in ("tp2", "pp2") else
                                    pytest.param(layout, marks=pytest.mark.slow) for layout in SIZES])  # fmt: skip
def test_every_process_loads_its_part(layout: str, folder: pathlib.Path) -> None:
    model = megalith.load(folder, device="cpu")
    assert model.runtime is None
    expected, whole = (
        megalith.generate(model, ["Once", "Z", "upon"], **OPTIONS),
        [p.numel() for p in model.parameters()],
    )
    ranks, parts = 4 if " " in layout else 2, (SIZES[layout][0] or 1) * (SIZES[layout][1] or 1)
    for texts, elements, _ in run_ranks(loaded, ranks, str(folder), SIZES[layout]):
        assert texts == expected and sum(elements) < (1.2 / parts + 0.01 * (parts == 1)) * sum(whole)


@pytest.mark.parametrize("format", ["huggingface", "megatron"])
def test_other_formats_and_16_bits(format: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What the user should know of the files is printed by one process."""
    convert(folder, tmp_path / "other", to=format)
    options = {"dtype": torch.bfloat16, "tokenizer": str(folder / "iter_0000010/tokenizer")}
    model = megalith.load(tmp_path / "other", device="cpu", **options)
    expected = megalith.generate(model, ["Once", "Z", "upon"], **OPTIONS)
    results = run_ranks(loaded, 2, str(tmp_path / "other"), SIZES["pp2"], options)
    assert [texts for texts, *_ in results] == [expected] * 2
    assert [bool(printed) for *_, printed in results] == [bool(model.notes), False]


def of_a_module(form: str) -> list[list[int]]:
    """Texts of a model in memory, after it was put into a layout."""
    model = megalith.load(model_of(config_of(form)), tensor_model_parallel_size=2, device="cpu")
    return [each.ids for each in complete(model, [[5, 6], [7]], **OPTIONS)]


def test_a_model_in_memory() -> None:
    expected = [each.ids for each in complete(model_of(config_of("alibi")), [[5, 6], [7]], **OPTIONS)]
    assert run_ranks(of_a_module, 2, "alibi") == [expected] * 2


def test_layouts_that_do_not_fit_are_refused(folder: pathlib.Path) -> None:
    rule = r"tensor 2 x pipeline 1 .* must divide the number of processes"
    with pytest.raises(ConfigError, match=rule):
        run_ranks(loaded, 1, str(folder), SIZES["tp2"])
    with pytest.raises(
        ConfigError, match=r"--pipeline-model-parallel-size must be at most --num-layers, 4, .* found 5"
    ):
        run_ranks(loaded, 5, str(folder), (1, 5))
    with pytest.raises(CheckpointError, match="nowhere"):
        run_ranks(loaded, 2, str(folder / "nowhere"), SIZES["tp2"])


def command(*words: object) -> tuple[int, str, str]:
    """Exit status, and what this process printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as error:
        status = main(["generate", "--device", "cpu", *map(str, words)])
    return status, out.getvalue(), error.getvalue()


@pytest.mark.parametrize("size", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow), None])
def test_one_process_writes_the_texts_of_all(size: str | None, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["--load", folder, "--greedy", "--max-new-tokens", 6, "--prompt", "Once", "--prompt", "Z"]
    parallel = [f"--{size}-model-parallel-size", 2] if size else []
    for more in (["--stream"], ["--no-stream"], ["--out-file", tmp_path / "texts.jsonl"]):
        expected = command(*words, *more)
        assert expected[0] == 0 and expected[1]
        records = (tmp_path / "texts.jsonl").read_text() if more[0] == "--out-file" else ""
        first, second = run_ranks(command, 2, *words, *more, *parallel, *["--overwrite"] * bool(records))
        assert first == expected and second == (0, "", "")
        if records:
            assert json.loads(records.splitlines()[0])["prompt"] == "Once"
            assert (tmp_path / "texts.jsonl").read_text() == records


def run_blocks(folder: str, blocks: list[str]) -> list[str]:
    """The texts that the last of these pieces of Python leaves; each is for the same names."""
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        for block in blocks:
            exec(block, names)
    return names["texts"] if dist.get_rank() == 0 else []


@pytest.mark.slow
def test_what_docs_generation_says_of_processes_runs(folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    pathlib.Path("runs").mkdir()
    pathlib.Path("runs/first").symlink_to(folder)
    _, _, text = (
        (pathlib.Path(__file__).parents[3] / "docs/generation.md").read_text().partition("## Several processes")
    )
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["sh", "python", "python"]
    launcher, _, words = blocks[0][1].partition(" generate ")
    assert launcher == "torchrun --nproc-per-node 4 -m megalith"
    first, *others = run_ranks(command, 4, *shlex.split(words.replace("runs/first", str(folder))))
    assert first[:1] == (0,) and first[1].startswith("Once") and others == [(0, "", "")] * 3
    texts, *others = run_ranks(run_blocks, 4, str(tmp_path), [body for _, body in blocks[1:]])
    assert [text[:6] for text in texts] == ["The va", "If the"] and others == [[]] * 3
