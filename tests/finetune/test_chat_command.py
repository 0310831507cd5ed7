"""docs/finetune.md and examples/finetune_chat.sh run as typed, at toy size, on a Hugging Face folder."""

import json
import pathlib
import random
import re

import pytest
import torch
import transformers

import megalith
from megalith.cli.main import main
from megalith.data.tokenizers.chat_template import ChatTemplate
from megalith.generation.generate import complete
from megalith.training.pretrain import train
from tests.chats import CHATML, make_config, unmarked, write_chats, write_tokenizer
from tests.toy import ROOT, run

DOCS = (ROOT / "docs/finetune.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", DOCS, re.MULTILINE | re.DOTALL)
SMALLER = {"--seq-length 2048": "--seq-length 128", "--seq-length 512": "--seq-length 128", "size 32": "size 4"}


def make_model(folder: pathlib.Path) -> None:
    """Llama-3-8B: two layers, with a template whose turns end with another token than its texts; chats.jsonl too."""
    write_tokenizer(folder / "Llama-3-8B", unmarked(CHATML))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "Llama-3-8B")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "Llama-3-8B")
    draw = random.Random(0)
    for name in ("chats", "valid"):
        write_chats(folder / f"{name}.jsonl", [draw.randint(1, 8) for _ in range(24)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("chat")
    make_model(folder)
    return folder


def ends(folder: pathlib.Path) -> list:
    """The tokens at which an exported folder says that a text ends: of its tokenizer, and its two configs."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [
        json.loads((folder / f"{name}.json").read_text())["eos_token_id"] for name in ("config", "generation_config")
    ]
    return [tokenizer.eos_token, *(tokenizer.convert_ids_to_tokens(each) for each in ids)]


def smaller(block: str) -> str:
    for large, small in SMALLER.items():
        block = block.replace(large, small)
    return f"set -euo pipefail\n{block}"


def test_the_documents_chat(folder):
    """The end of a turn is what generation stops at and exports name; the template goes along."""
    said = run(["bash", "-c", smaller(BLOCKS[0])], folder)
    assert "the chat template ends a turn with <|im_end|>: it takes the place of </s>" in said
    assert "chats.jsonl:1, of which the model learns" in said and "  trained | " in said
    assert re.search(r"best checkpoint runs/chat/iter_\d+ \(loss", said)
    assert ends(folder / "my-chat")[:2] == ["<|im_end|>", "<|im_end|>"] and "<|im_end|>" in ends(folder / "my-chat")[2]
    exported = transformers.AutoTokenizer.from_pretrained(folder / "my-chat")
    assert exported.chat_template == unmarked(CHATML)
    model = megalith.load(folder / "runs/chat", device="cpu")
    assert model.end_token == exported.eos_token_id


@pytest.mark.slow
def test_the_documents_adapters(folder):
    """A merged export has the config.json of its base, but not its end of text (LlamaFactory#10834)."""
    run(["bash", "-c", smaller(BLOCKS[1])], folder)
    tokenizer, config, generation = ends(folder / "my-merged")
    assert tokenizer == "<|im_end|>" and "<|im_end|>" in config and "<|im_end|>" in generation
    assert (folder / "my-adapters/adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_and_its_adapters(folder):
    variables = {
        "MODEL": "Llama-3-8B", "TRAIN_DATA": "chats.jsonl", "CHECKPOINT_PATH": "runs/script", "SEQ_LENGTH": "64",
        "GLOBAL_BATCH": "4", "EPOCHS": "2", "PRECISION": "", "GPUS_PER_NODE": "2", "TENSOR": "2",
        "MASTER_PORT": "29561",
    }  # fmt: skip
    script = [str(ROOT / "examples/finetune_chat.sh"), "--valid-data", "valid.jsonl", "--save-interval", "1"]
    run([*script, "--exit-interval", "1"], folder, **variables)
    said = run(script, folder, **variables)
    assert "resuming after step 1" in said and "LoRA:" in said
    assert (folder / "runs/script-peft/adapter_config.json").is_file()


def test_the_documents_parity(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    words = smaller(BLOCKS[2]).partition("megalith ")[2].replace("\\\n", " ").split()
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("loss masks      equal") == 2 and "merged weights after the last step" in out
    assert "NOT equal" not in out and out.count("\nequal: ") == 3


def test_chats_are_learned_and_generation_stops_at_the_end_of_a_turn(tmp_path):
    """A run of some epochs, resumed in the middle of one, answers as it was taught."""
    path = write_chats(tmp_path / "chats.jsonl", [2] * 16)
    values = {"train_data": [path], "valid_data": [path], "epochs": 20.0, "train_iters": None, "lr": 1e-2}
    config = make_config(tmp_path, **values, run_dir=str(tmp_path / "run"), global_batch_size=2)
    train(config.replace(exit_interval=21))
    progress = train(config)
    assert progress.best is not None and (tmp_path / f"run/checkpoints/iter_{progress.best.step:07}").is_dir()
    model = megalith.load(tmp_path / "run", device="cpu")
    messages = [{"role": "user", "content": "What is two and two?"}]
    ids = ChatTemplate.of(model.tokenizer).encode(messages, {})
    (answer,) = complete(model, [ids], max_new_tokens=20, top_k=1)
    assert answer.continuation.removesuffix("<|im_end|>") == "four four"
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[-1] < 0.1 * losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()


def test_mistakes_of_a_command(tmp_path, capsys):
    config = make_config(tmp_path)
    shape = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --micro-batch-size 1 --lr 1e-3"
    command = ["finetune", "chat", *shape.split(), "--tokenizer-model", config.data.tokenizer_model, "--epochs", "1"]
    assert main([*command, "--dry-run"]) == 2
    assert "--train-data must name the files to train on" in capsys.readouterr().err
    assert main([*command, "--train-data", "x.jsonl", "--run-dir", str(tmp_path / "run"), "--device", "cpu"]) == 2
    assert "--train-data must name files or folders that exist; found 'x.jsonl'" in capsys.readouterr().err
    assert main([*command, "--train-data", "x.jsonl", "--no-pack", "--dry-run"]) == 2
    assert "--no-packing" in capsys.readouterr().err
    assert main(["finetune", "chats", *shape.split()]) == 2
    assert "did you mean 'chat'" in capsys.readouterr().err
