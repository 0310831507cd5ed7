"""The scripts of examples/accelerate run at toy size, in one process and split over several."""

import json
import pathlib
import re
import sys

import pytest
import transformers
import yaml

from tests.toy import ROOT, make_corpus, run

pytestmark = pytest.mark.slow
SCRIPTS = ROOT / "examples" / "accelerate"
GLUE = ROOT.parent / "shared" / "data" / "glue"
LAYOUTS = {  # as `megalith config --accelerate` writes them, less what is the default
    "tp2": {"tp_degree": 2, "sequence_parallelism": True},
    "pp2": {"pp_degree": 2, "num_micro_batches": 2},
    "tp2 pp2": {"tp_degree": 2, "pp_degree": 2, "num_micro_batches": 2, "sequence_parallelism": True},
    "dp2": {},
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "ACCELERATE_USE_CPU": "true"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A working directory with toy models named as the guide's, the texts of `wikitext`, and a file for each layout."""
    folder = tmp_path_factory.mktemp("examples")
    make_corpus(folder)
    texts = folder / "wikitext" / "wikitext-2-raw-v1"
    texts.mkdir(parents=True)
    lines = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    lines = [line for text in lines for line in text.splitlines()]
    (texts / "wiki.train.raw").write_text("\n".join(lines[:-100]))
    (texts / "wiki.valid.raw").write_text("\n".join(lines[-100:]))
    gpt2 = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    end = gpt2.eos_token_id
    config = transformers.GPT2Config(
        vocab_size=len(gpt2), n_embd=32, n_layer=2, n_head=4, n_positions=1024, bos_token_id=end, eos_token_id=end
    )
    bert = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    size = len(bert) + (-len(bert)) % 4
    for name, tokenizer, each in (
        ("gpt2-large", gpt2, config),
        ("bert", bert, transformers.MegatronBertConfig(vocab_size=size, max_position_embeddings=128, **SMALL)),
        ("t5", gpt2, transformers.T5Config(
            vocab_size=len(gpt2), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=end,
            decoder_start_token_id=end, eos_token_id=end)),
    ):  # fmt: skip
        tokenizer.save_pretrained(folder / name)
        each.save_pretrained(folder / name)
    for name, fields in LAYOUTS.items():
        written = {
            "distributed_type": "MEGATRON_LM", "num_processes": 4 if name == "tp2 pp2" else 2, "mixed_precision": "no",
            "use_cpu": True, "megatron_lm_config": {f"megatron_lm_{key}": value for key, value in fields.items()},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(written))
    return folder


def started(layout: str) -> list[str]:
    """The beginning of a command: how its script is started."""
    return [sys.executable] if layout == "one" else ["megalith", "launch", "--config_file", f"{layout}.yaml"]


def script(folder: pathlib.Path, layout: str, name: str, options: str) -> str:
    """The output of a script."""
    return run([*started(layout), str(SCRIPTS / name), *options.split()], folder, **OFFLINE)


LINES = {  # script -> its options, and what it must print
    "mlm.py": ("--config_name bert --dataset_name wikitext/wikitext-2-raw-v1 --max_seq_length 64 --max_train_steps 4 "
               "--per_device_train_batch_size 4 --gradient_accumulation_steps 2", "validation loss"),
    "t5.py": ("--config_name t5 --dataset_name wikitext/wikitext-2-raw-v1 --block_size 64 --max_train_steps 4 "
              "--per_device_train_batch_size 4", "validation loss"),
    "classify.py": (f"--config_name bert --task_name RTE --data_dir {GLUE / 'RTE'} --num_train_epochs 1 "
                    f"--max_length 64", "accuracy"),
}  # fmt: skip
CASES = [(name, layout) for name in LINES for layout in ("one", *LAYOUTS)]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_script_trains_and_writes_a_model(name: str, layout: str, folder: pathlib.Path) -> None:
    if name == "classify.py" and not GLUE.exists():
        pytest.skip("needs GLUE in ../shared")
    options, words = LINES[name]
    output = folder / f"{name}-{layout.replace(' ', '-')}"
    assert words in script(folder, layout, name, f"{options} --output_dir {output}")
    transformers.AutoModel.from_pretrained(output)
    assert transformers.AutoTokenizer.from_pretrained(output).vocab_size


CLM = (
    "--config_name gpt2-large --tokenizer_name gpt2-large --dataset_name wikitext --dataset_config_name "
    "wikitext-2-raw-v1 --block_size 64 --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --seed 1 "
    "--learning_rate 1e-3"
)


def evaluations(output: str) -> list[float]:
    """The losses of the evaluations after each epoch."""
    return [float(number) for number in re.findall(r"eval_loss: ([\d.]+)", output)]


def test_clm_in_one_process(folder: pathlib.Path) -> None:
    """From scratch, without a plugin of Megatron-LM."""
    assert len(evaluations(script(folder, "one", "clm.py", f"{CLM} --max_train_steps 3"))) == 1


def test_clm_goes_on_from_what_it_wrote(folder: pathlib.Path) -> None:
    (first,) = evaluations(script(folder, "one", "clm.py", f"{CLM} --max_train_steps 3 --output_dir first"))
    more = script(folder, "one", "clm.py", f"{CLM} --max_train_steps 1 --learning_rate 0 --model_name_or_path first")
    assert evaluations(more) == pytest.approx([first], abs=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clm_is_the_same_in_a_layout(layout: str, folder: pathlib.Path) -> None:
    """From pretrained weights, dropout off, the same batches: evaluated as in one process, tracked, and resumed."""
    config = transformers.AutoConfig.from_pretrained(folder / "gpt2-large", attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "pretrained")
    base = CLM.replace("--config_name gpt2-large", "--model_name_or_path pretrained") + " --max_train_steps 6"
    (expected,) = evaluations(script(folder, "one", "clm.py", f"{base} --learning_rate 0"))
    name = layout.replace(" ", "-")
    (found,) = evaluations(script(folder, layout, "clm.py", f"{base} --learning_rate 0"))
    assert found == pytest.approx(expected, rel=1e-4)
    tracked = f"{base} --with_tracking --report_to tensorboard --output_dir {name}"
    (whole,) = evaluations(script(folder, layout, "clm.py", f"{tracked} --checkpointing_steps 3"))
    assert list((folder / name).rglob("events.out.tfevents*"))
    resumed = script(folder, layout, "clm.py", f"{base} --resume_from_checkpoint {name}/step_3")
    assert evaluations(resumed) == pytest.approx([whole], rel=1e-4)


def test_the_guides_command(folder: pathlib.Path) -> None:
    """Its flags as printed, with local folders of the names that it has."""
    config = yaml.safe_load((folder / "tp2 pp2.yaml").read_text()) | {"mixed_precision": "bf16"}
    (folder / "megatron_gpt_config.yaml").write_text(yaml.safe_dump(config))
    flags = (
        "--config_name gpt2-large --tokenizer_name gpt2-large --dataset_name wikitext --dataset_config_name "
        "wikitext-2-raw-v1 --block_size 1024 --learning_rate 5e-5 --per_device_train_batch_size 24 "
        "--per_device_eval_batch_size 24 --num_train_epochs 5 --with_tracking --report_to wandb "
        "--output_dir awesome_model"
    )
    command = ["megalith", "launch", "--config_file", "megatron_gpt_config.yaml", str(SCRIPTS / "clm.py")]
    output = run([*command, *flags.split()], folder, **OFFLINE)
    examples = int(re.search(r"Num examples = (\d+)", output)[1])
    assert "Instantaneous batch size per device = 24" in output
    assert "Total train batch size (w. parallel, distributed & accumulation) = 48" in output
    assert f"Total optimization steps = {5 * -(-examples // 48)}" in output
    assert len(evaluations(output)) == 5


@pytest.mark.parametrize("layout", ["one", "tp2 pp2"])
def test_indexed_and_generate(layout: str, folder: pathlib.Path) -> None:
    preprocess = (
        "megalith data preprocess --input corpus.jsonl --output-prefix corpus --append-eod --workers 1 "
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model gpt2-large/tokenizer.json"
    )
    if not (folder / "corpus_text_document.idx").exists():
        run(preprocess.split(), folder)
    name = "indexed-" + layout.replace(" ", "-")
    options = "--data_path corpus_text_document --splits_string 90,8,2 --block_size 64 --max_train_steps 4"
    more = "--config_name gpt2-large --eval_interval 2 --eval_iters 2 --keyword a --per_device_train_batch_size 4"
    output = script(folder, layout, "indexed.py", f"{options} {more} --output_dir {name}")
    assert len(re.findall(r"step \d: training loss [\d.]+, validation loss [\d.]+", output)) == 2
    texts = script(
        folder, layout, "generate.py",
        f"--model_name_or_path {name} --prompt the --prompt and --max_new_tokens 8 --top_k 5",
    )  # fmt: skip
    assert any(line.startswith("the") for line in texts.splitlines())


@pytest.mark.parametrize("name", ["clm.py", "mlm.py", "t5.py", "indexed.py", "generate.py", "classify.py"])
def test_help(name: str, tmp_path: pathlib.Path) -> None:
    shown = run([sys.executable, str(SCRIPTS / name), "--help"], tmp_path)
    assert "usage: " in shown and "megalith launch" in shown
