"""The Python of the guide to Accelerate's Megatron-LM integration, as it is printed but for its import lines.

What the guide leaves to the reader (a model, `args`, the rest of a loop that it abbreviates) is in the namespace in
which its blocks are executed, or is put where it prints `...`.
"""

import argparse
import functools
import math
import os
import pathlib
import re
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

import megalith.accelerate
from megalith.accelerate.utils import MegatronLMPlugin, set_seed
from megalith.testing.ranks import run_ranks
from tests.integrations.accelerate.helpers import accelerating
from tests.toy import ROOT, make_corpus, run

GUIDE = next((ROOT.parent / "shared" / "seeds").glob("000*.txt"), None)
pytestmark = pytest.mark.skipif(GUIDE is None, reason="needs the guide in ../shared")
SPLIT = {"MEGATRON_LM_TP_DEGREE": "2", "MEGATRON_LM_SEQUENCE_PARALLELISM": "true"}
STAGES = {"MEGATRON_LM_PP_DEGREE": "2", "MEGATRON_LM_NUM_MICRO_BATCHES": "2"}
LAYOUTS = {"one": (1, {}), "tp2": (2, SPLIT), "pp2": (2, STAGES), "tp2 pp2": (4, SPLIT | STAGES)}
CASES = [pytest.param(name, marks=pytest.mark.slow if name != "one" else ()) for name in LAYOUTS]
STEPS = 6
WORDS = {  # name of a block -> words that it alone has
    "scheduler": "lr_scheduler = MegatronLMDummyScheduler(",
    "batch size": "total_batch_size =",
    "evaluation": "losses.append(loss)",
    "saving": "accelerator.save_state(args.output_dir)",
    "train step": "class GPTTrainStepWithCustomLoss",
    "indexed data": "megatron_dataloader_config",
    "preparing it": "train_dataloader, eval_dataloader, _ = accelerator.prepare(",
    "loop": "while completed_steps < args.max_train_steps:",
    "logits": "MegatronLMPlugin(return_logits=True)",
    "texts": "model.megatron_generate(",
    "alibi": '"position_embedding_type": "alibi"',
    "multi-query": '"attention_head_type": "multiquery"',
}


def blocks() -> list[str]:
    """The guide's blocks of Python, with megalith.accelerate for accelerate."""
    found = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(r"^from accelerate", "from megalith.accelerate", block, flags=re.MULTILINE) for block in found]


def block(name: str) -> str:
    """The block that has these words of WORDS."""
    (found,) = (each for each in blocks() if WORDS[name] in each)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder with `toy` (tokenizer and config of a small GPT-2) and an indexed data set `corpus_text_document`."""
    folder = tmp_path_factory.mktemp("guide")
    make_corpus(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", bos_token="<|endoftext|>"
    )
    tokenizer.add_tokens(["plt", "pd", "sk", "fit"])  # of which the guide makes key tokens
    tokenizer.save_pretrained(folder / "toy")
    end = tokenizer.eos_token_id
    transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=4, n_positions=160, bos_token_id=end, eos_token_id=end
    ).save_pretrained(folder / "toy")
    for name in ("vocab.json", "merges.txt"):
        (folder / "toy" / name).write_text((folder / name).read_text())
    command = "megalith data preprocess --input corpus.jsonl --output-prefix corpus --append-eod --workers 1"
    run([*command.split(), "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tokenizer.json"], folder)
    return folder


def namespace(folder: pathlib.Path) -> dict[str, Any]:
    """What a script has before the guide's blocks: an accelerator, a model, an optimizer, a tokenizer, `args`."""
    output = folder / "-".join(["output", *(name for name in os.environ if name.startswith("MEGATRON_LM_"))])
    args = argparse.Namespace(
        max_train_steps=STEPS, num_warmup_steps=2, lr_scheduler_type="linear", gradient_accumulation_steps=1,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, output_dir=str(output),
        data_path=[str(folder / "corpus_text_document")], splits_string="90,8,2", block_size=32,
        resume_from_checkpoint=str(folder / "toy"),
    )  # fmt: skip
    set_seed(3)
    accelerator = megalith.accelerate.Accelerator(megatron_lm_plugin=MegatronLMPlugin())
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder / "toy"))
    return {
        "accelerator": accelerator, "args": args, "math": math, "model": model, "os": os, "partial": partial,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3), "torch": torch,
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder / "toy"),
        "get_scheduler": transformers.get_scheduler,
        "DistributedType": megalith.accelerate.DistributedType, "MegatronLMPlugin": MegatronLMPlugin,
    }  # fmt: skip


def minimal_changes(folder: pathlib.Path, variables: dict[str, str]) -> dict[str, Any]:
    """The guide's four changes to run_clm_no_trainer.py, around its loop."""
    with accelerating(**variables):
        names = namespace(folder)
        exec(block("scheduler"), names)
        ids = torch.arange(32)
        rows = [{"input_ids": ids, "labels": ids}] * 24
        prepare = names["accelerator"].prepare
        names["model"], names["optimizer"], names["lr_scheduler"], loader, evaluation = prepare(
            names["model"], names["optimizer"], names["lr_scheduler"], DataLoader(rows, 4), DataLoader(rows, 4)
        )
        exec(block("batch size"), names)
        rates, losses = [], []
        for batch in loader:
            loss = names["model"](**batch).loss
            names["accelerator"].backward(loss)
            names["optimizer"].step()
            names["lr_scheduler"].step()
            names["optimizer"].zero_grad()
            losses.append(loss.item())
            rates.append(names["lr_scheduler"].get_last_lr()[0])
        names["model"].eval()
        # The block prints the body of the evaluation's loop, then what follows the loop.
        inside, _, after = block("evaluation").partition("\n\n")
        names["losses"] = []
        with torch.no_grad():
            for batch in evaluation:
                names["loss"] = names["model"](**batch).loss
                exec(inside, names)
        exec(after, names)
        exec(block("saving"), names)
        names["accelerator"].load_state(names["args"].output_dir)
        return {
            "total": names["total_batch_size"], "losses": losses, "rates": rates, "calls": len(loader),
            "evaluated": names["losses"].mean().item(), "main": names["accelerator"].is_main_process,
        }  # fmt: skip


REST_OF_THE_LOOP = """accelerator.backward(loss)
    optimizer.step()
    lr_scheduler.step()
    optimizer.zero_grad()
    trained.append(loss.item())
    completed_steps += 1
"""
REST_OF_THE_EVALUATION = """
                losses.append(outputs.loss)
                eval_completed_steps += 1
"""


def own_step_and_indexed_data(folder: pathlib.Path, variables: dict[str, str]) -> dict[str, Any]:
    """The guide's custom train step, on indexed data."""
    with accelerating(**variables):
        names = namespace(folder)
        exec(block("train step"), names)
        names["main"]()
        exec(block("indexed data"), names)
        scheduler = names["MegatronLMDummyScheduler"]
        names["lr_scheduler"] = scheduler(names["optimizer"], total_num_steps=STEPS, warmup_num_steps=2)
        exec(block("preparing it"), names)
        loop = block("loop")
        assert loop.count("...") == 1
        names |= {"completed_steps": 0, "eval_interval": 3, "eval_iters": 2, "trained": [], "losses": []}
        exec(loop.replace("...", REST_OF_THE_LOOP).rstrip() + REST_OF_THE_EVALUATION, names)
        evaluated = [each.item() for each in names["losses"]]
        step = names["accelerator"].state.megatron_lm_plugin.custom_train_step_class.__name__
        return {"trained": names["trained"], "evaluated": evaluated, "step": step}


def texts(folder: pathlib.Path, variables: dict[str, str]) -> dict[str, Any]:
    """megatron_generate, by every way that the guide shows."""
    with accelerating(**variables):
        names = namespace(folder)
        printed: list[list[str]] = []
        options, _, calls = block("texts").partition("# inference using")
        exec(options, names)
        names["accelerator"].free_memory()
    with accelerating(**variables):
        set_seed(3)
        accelerator = megalith.accelerate.Accelerator(megatron_lm_plugin=names["megatron_lm_plugin"])
        names |= {"accelerator": accelerator, "model": accelerator.prepare(names["model"])}
        accelerator.print = printed.append
        exec("# inference using" + calls, names)
        return {"texts": printed}


def forms(folder: pathlib.Path, variables: dict[str, str]) -> list[float]:
    """The first losses of the guide's forms of a model, which need the random start."""
    losses = []
    for form in ("alibi", "multi-query"):
        with accelerating(**variables):
            names: dict[str, Any] = {"MegatronLMPlugin": partial(MegatronLMPlugin, keep_weights=False)}
            exec(block(form), names)
            accelerator = megalith.accelerate.Accelerator(megatron_lm_plugin=names["megatron_lm_plugin"])
            config = transformers.AutoConfig.from_pretrained(folder / "toy")
            ids = torch.arange(8 * 32).view(8, 32) % 400
            loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], 4)
            model, loader = accelerator.prepare(transformers.AutoModelForCausalLM.from_config(config), loader)
            losses.append(model(**next(iter(loader))).loss.item())
    return losses


def logits(folder: pathlib.Path, variables: dict[str, str]) -> list[int]:
    """The shape of the logits that the guide's option asks for."""
    with accelerating(**variables):
        names: dict[str, Any] = {"MegatronLMPlugin": MegatronLMPlugin}
        exec(block("logits"), names)
        accelerator = megalith.accelerate.Accelerator(megatron_lm_plugin=names["megatron_lm_plugin"])
        config = transformers.AutoConfig.from_pretrained(folder / "toy")
        ids = torch.arange(4 * 32).view(4, 32) % 400
        loader = DataLoader([{"input_ids": row, "labels": row} for row in ids], 4)
        model, loader = accelerator.prepare(transformers.AutoModelForCausalLM.from_config(config), loader)
        with torch.no_grad():
            return list(model(**next(iter(loader))).logits.shape)


@functools.cache
def results(scenario: Any, layout: str, folder: pathlib.Path) -> list:
    """What each process returned."""
    world, variables = LAYOUTS[layout]
    return [scenario(folder, variables)] if world == 1 else run_ranks(scenario, world, folder, variables, timeout=280)


@pytest.mark.parametrize("layout", CASES)
def test_the_minimal_changes(layout: str, folder: pathlib.Path) -> None:
    found, micro_batches = results(minimal_changes, layout, folder), 2 if "pp2" in layout else 1
    for each in found:
        assert each["total"] == 4 * micro_batches
        assert each["calls"] == 6 // micro_batches == len(each["losses"])
        assert each["losses"] == found[0]["losses"] and each["evaluated"] == found[0]["evaluated"]
        assert 0.0 < each["rates"][0] < max(each["rates"]) <= 1.0001e-3  # warm-up
    assert found[0]["losses"][-1] < found[0]["losses"][0]
    if micro_batches == 1:  # with dropout
        (alone,) = results(minimal_changes, "one", folder)
        assert found[0]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert found[0]["evaluated"] == pytest.approx(alone["evaluated"], rel=1e-4)
    assert [each["main"] for each in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize("layout", CASES)
def test_a_train_step_of_ones_own_on_indexed_data(layout: str, folder: pathlib.Path) -> None:
    found = results(own_step_and_indexed_data, layout, folder)
    for each in found:
        assert each["step"] == "GPTTrainStepWithCustomLoss"
        assert len(each["trained"]) == STEPS and len(each["evaluated"]) == 2
        assert each["trained"] == found[0]["trained"] and each["evaluated"] == found[0]["evaluated"]
        assert all(map(math.isfinite, each["trained"]))
    assert found[0]["trained"][-1] < found[0]["trained"][0]
    if "pp2" not in layout:
        (alone,) = results(own_step_and_indexed_data, "one", folder)
        assert found[0]["trained"] == pytest.approx(alone["trained"], rel=1e-4)


@pytest.mark.parametrize("layout", CASES)
def test_texts(layout: str, folder: pathlib.Path) -> None:
    found = results(texts, layout, folder)
    by_top_p, by_top_k, with_bos, by_beams = found[0]["texts"]
    assert [len(each) for each in (by_top_p, by_top_k, with_bos, by_beams)] == [4, 4, 4, 1]
    prompts = ["Are you human?", "The purpose of life is"]
    for each in (by_top_p, by_top_k):
        assert all(text.startswith(prompt) for text, prompt in zip(each, prompts))
    assert all(prompt in text for text, prompt in zip(with_bos, prompts)) and prompts[1] in by_beams[0]
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("layout", CASES)
def test_forms_of_the_model(layout: str, folder: pathlib.Path) -> None:
    for alibi, multiquery in results(forms, layout, folder):
        assert alibi == pytest.approx(math.log(512), abs=0.3) and multiquery == pytest.approx(math.log(512), abs=0.3)


@pytest.mark.parametrize("layout", CASES)
def test_logits_on_request(layout: str, folder: pathlib.Path) -> None:
    for shape in results(logits, layout, folder):
        assert shape[:2] == [4, 32]


def test_every_block_is_executed_above() -> None:
    assert len(blocks()) == len(WORDS) == len({block(name) for name in WORDS})
