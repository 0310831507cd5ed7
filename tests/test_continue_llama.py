"""docs/continue_llama.md runs as typed, with a toy Llama, a toy corpus and small numbers instead of its first block."""

import json
import pathlib
import re

import pytest

from tests.toy import ROOT, make_corpus, run

BLOCKS = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs/continue_llama.md").read_text(), re.MULTILINE | re.DOTALL)
SIZES = "export LLAMA=llama SEQ_LENGTH=32 MICRO_BATCH=2 GLOBAL_BATCH=4 TRAIN_ITERS=6 DEVICES=2\n"


def make_llama(folder: pathlib.Path) -> None:
    """A Hugging Face folder of two layers with the toy corpus's tokenizer; the corpus as five files of two kinds."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    make_corpus(folder)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=511,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>").save_pretrained(
        folder / "llama"
    )
    text = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    pieces = ["".join(text)[start : start + 1000] for start in range(0, 200_000, 1000)]
    for number, name in enumerate(("web/a", "web/b", "web/c", "books/x", "books/y")):
        file = folder / "text" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces[number::5]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_documents_commands(tmp_path: pathlib.Path) -> None:
    make_llama(tmp_path)
    said = [run(["bash", "-c", f"set -euo pipefail\n{SIZES}{block}"], tmp_path) for block in BLOCKS[1:]]
    weights = dict(line.split()[1::-1] for line in (tmp_path / "data_list.txt").read_text().splitlines())
    tokens = {
        name: int(re.search(rf"merged/{name}-0000_text_document: \d datasets, \d+ documents, (\d+) tokens", said[1])[1])
        for name in ("web", "books")
    }
    share = 3 * tokens["books"] / (3 * tokens["books"] + tokens["web"])
    assert float(weights["merged/books-0000_text_document"]) == pytest.approx(share)
    assert "verified" in said[2]
    document = (ROOT / "docs/continue_llama.md").read_text()
    (line,) = (line for line in said[3].splitlines() if line.startswith("loaded from"))
    assert line in document.splitlines()
    assert (
        "the same command without --load and --no-load-optim resumes from step 3" in said[3]
        or "without --no-load-optim" in said[3]
    )
    assert (
        "loaded from runs/continued/iter_0000003: the weights, the optimizer's state, the schedule and the counts"
        in said[4]
    )
    steps = [json.loads(line) for line in (tmp_path / "runs/continued/metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in steps if "loss" in each] == [1, 2, 3, 4, 5, 6]
    assert (
        "loaded from llama: the weights; not the optimizer's state" in said[6]
        and "--load llama holds weights that belong to no" in said[6]
    )
    short = [json.loads(line) for line in (tmp_path / "runs/short/metrics.jsonl").read_text().splitlines()]
    assert next(each["loss"] for each in short if "loss" in each) == next(
        each["loss"] for each in steps if "loss" in each
    )
    assert (tmp_path / "llama-continued/tokenizer.json").is_file() and "Once upon a time" in said[5]
