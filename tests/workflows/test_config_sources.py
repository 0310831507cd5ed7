"""Configs from scripts, commands, config.json and checkpoints are those that running or loading them gives."""

import io
import json
import os
import shlex
import subprocess
import sys

import pytest

from megalith.cli.main import main
from megalith.common.errors import ConfigError
from megalith.config.flags.loading import from_yaml, load_config, to_yaml
from megalith.config.parameters import parameter_count
from megalith.workflows import config_sources
from tests.launcher.cluster.standins import environment
from tests.test_continue_llama import make_llama
from tests.toy import ROOT

MEGATRON = r"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=4
export CUDA_DEVICE_MAX_CONNECTIONS=1
GPUS_PER_NODE=8
NNODES=2
DISTRIBUTED_ARGS="--nproc_per_node $GPUS_PER_NODE --nnodes $NNODES --master_port 6000"
GPT_ARGS="
    --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 1024 --max-position-embeddings 1024
    --micro-batch-size 8 --global-batch-size 128 --lr 0.00015 --train-iters 500000 --lr-decay-iters 320000
    --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 1e-2 --lr-warmup-fraction .01 --clip-grad 1.0 --fp16
"
DATA_ARGS="--data-path $DATA_PATH --vocab-file vocab.json --merge-file merges.txt --split 949,50,1"
torchrun $DISTRIBUTED_ARGS /opt/megatron/pretrain_gpt.py $GPT_ARGS $DATA_ARGS --transformer-impl local \
    --distributed-backend nccl --save ckpt --load ckpt --my-own-flag 3
"""
PYXIS = r"""#!/bin/bash
#SBATCH -p luna --nodes=128 --ntasks-per-node=8
options=" --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96 --hidden-size 12288 \
  --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1 \
  --global-batch-size 1536 --rampup-batch-size 16 16 5859375 --train-samples 146484375 --lr-decay-samples 126953125 \
  --lr-warmup-samples 183105 --lr 6.0e-5 --min-lr 6.0e-6 --lr-decay-style cosine --data-path d --vocab-file v \
  --merge-file m --split 98,2,0 --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 \
  --init-method-std 0.006 --fp16 --recompute-granularity full --recompute-method uniform "
run_cmd="python -u /lustre/pretrain_gpt.py $@ ${options}"
srun -l --container-image "nvcr.io/nvidia/pytorch:20.12-py3" --output=log_%j.log sh -c "${run_cmd}"
"""


def test_a_script_of_megatron(tmp_path, monkeypatch):
    (tmp_path / "run.sh").write_text(MEGATRON)
    monkeypatch.setenv("DATA_PATH", "my-gpt2_text_document")
    config, processes, lines = config_sources.from_script(str(tmp_path / "run.sh"), [])
    assert processes == 16 and config.data.data_path == ["my-gpt2_text_document"]
    assert (config.model.num_layers, config.precision.fp16, config.checkpoint.save) == (24, True, "ckpt")
    assert any(line.startswith("left out: unknown flag --my-own-flag") for line in lines)


def test_the_175b_of_megatrons_pyxis_script(tmp_path):
    """The command of the seed's GPT-3 example gives the recipe that is made of it."""
    (tmp_path / "gpt3.sh").write_text(PYXIS)
    config, processes, _ = config_sources.from_script(str(tmp_path / "gpt3.sh"), [])
    assert processes == 1024
    from megalith import recipes

    recipe, _ = load_config(["--recipe", "gpt3-175b", "--data-path", "d", "--vocab-file", "v", "--merge-file", "m"],
                            read_recipe=recipes.text, world_size=1024)  # fmt: skip
    for section in ("model", "parallel", "batch", "optimizer", "schedule", "recompute", "precision"):
        assert getattr(config, section) == getattr(recipe, section)


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        ("python pretrain_gpt.py", 1),
        ("python -m torch.distributed.launch --nproc_per_node=4 --nnodes=2 pretrain_gpt.py", 8),
        ("torchrun --nproc-per-node 2 -m megalith pretrain gpt", 2),
        ("megalith launch --nproc-per-node 4 --nnodes 2 pretrain gpt", 8),
        ("srun --ntasks 6 --mpi=pmix python -u pretrain_gpt.py", 6),
        ("mpiexec -n 4 --ppn 2 python pretrain_gpt.py", 4),
        ("deepspeed --num_gpus 8 --num_nodes 2 pretrain_gpt.py", 16),
        ("srun -N 2 --ntasks-per-node 3 bash -c 'cd x && python pretrain_gpt.py FLAGS'", 6),
    ],
)
def test_commands_of_launchers(command, processes, monkeypatch):
    flags = (
        "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --micro-batch-size 1 "
        "--global-batch-size 48 --train-iters 4 --lr 1e-3 --data-path a --vocab-file v --merge-file m"
    )
    text = command.replace("FLAGS", flags) if "FLAGS" in command else f"{command} {flags}"
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    config, found, lines = config_sources.from_script("-", [])
    assert found == processes and config.model.hidden_size == 32 and not any("left out" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ls\nmkdir x", "must start a training.*it starts ls, mkdir"),
        ("python pretrain_gpt.py --lr 1\npython pretrain_gpt.py --lr 2", "must start one training; it starts 2"),
        ("bash -c 'python pretrain_gpt.py --lr $LR'", "must not leave variables to an inner shell"),
        ("python pretrain_gpt.py --num-layers two", "--num-layers must be a whole number"),
    ],
)
def test_what_cannot_be_read(text, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    with pytest.raises(ConfigError, match=message):
        config_sources.from_script("-", [])


TASK_FILES = {"VOCAB_FILE": "vocab.txt", "TRAIN_DATA": "train.tsv", "VALID_DATA": "valid.tsv"}
EXAMPLES = {  # script -> what it needs set
    "pretrain_gpt.sh": {"VOCAB_FILE": "vocab.json", "MERGE_FILE": "merges.txt", "DATA_PATH": "a_text_document"},
    "pretrain_bert.sh": {"VOCAB_FILE": "vocab.txt", "DATA_PATH": "a_text_sentence"},
    "pretrain_t5.sh": {"VOCAB_FILE": "vocab.txt", "DATA_PATH": "a_text_sentence"},
    "pretrain_ict.sh": {
        "VOCAB_FILE": "vocab.txt", "DATA_PATH": "a_text_sentence", "TITLES_DATA_PATH": "a_title_sentence",
        "GLOBAL_BATCH": "128",
    },
    "retro/pretrain_model.sh": {
        "VOCAB_FILE": "vocab.json", "MERGE_FILE": "merges.txt", "DATA_PATH": "a_text_document",
        "RETRO_WORKDIR": "retro",
    },
    "finetune_race_distributed.sh": TASK_FILES | {"PRETRAINED_CHECKPOINT": ""},
    "finetune_mnli_distributed.sh": TASK_FILES | {"PRETRAINED_CHECKPOINT": ""},
    "finetune_chat.sh": {"MODEL": "llama", "TRAIN_DATA": "chats.jsonl", "SEQ_LENGTH": "64"},
}  # fmt: skip
SEEDS = {  # a command of the documents of Megatron-LM with its own numbers and other paths -> the words of megalith
    "python pretrain_ict.py --num-layers 12 --num-attention-heads 12 --hidden-size 768 --batch-size 128 "
    "--seq-length 256 --max-position-embeddings 256 --ict-head-size 128 --train-iters 100000 "
    "--activations-checkpoint-method uniform --load checkpoints --save checkpoints --data-path d_text_sentence "
    "--titles-data-path d_title_sentence --vocab-file vocab.txt --lr 0.0001 --num-workers 2 --lr-decay-style linear "
    "--weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01 --save-interval 3000 --query-in-block-prob 0.1 "
    "--fp16": "pretrain ict",
    "python tasks/main.py --task RACE --train-data RACE/train/middle --valid-data RACE/dev/middle RACE/dev/high "
    "--tokenizer-type BertWordPieceLowerCase --vocab-file vocab.txt --epochs 3 --micro-batch-size 4 --lr 1.0e-5 "
    "--lr-warmup-fraction 0.06 --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --seq-length 512 "
    "--max-position-embeddings 512 --fp16 --save-interval 10000 --save r --log-interval 100 --eval-interval 1000 "
    "--eval-iters 10 --weight-decay 1.0e-1 --activations-checkpoint-method uniform": "finetune",
}


@pytest.mark.parametrize("command", SEEDS, ids=SEEDS.values())
def test_commands_of_megatrons_documents(command, monkeypatch, capsys):
    """The config is the one that megalith prints for the same words."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(command))
    config, processes, _ = config_sources.from_script("-", [])
    words = command.split(".py ")[1].split()
    assert processes == 1
    assert main([*SEEDS[command].split(), *words, "--dry-run", "--print-config", "all"]) in (0, 1)  # files are missing
    assert from_yaml(capsys.readouterr().out) == from_yaml(to_yaml(config))


OF_JOBS = {  # those that write a job, whose training command is in the script that they print
    "pretrain_gpt3_175B.sh": {"VOCAB_FILE": "v.json", "MERGE_FILE": "m.txt", "DATA_PATH": "0.7 web 0.3 books"},
    "pretrain_gpt_pbs.sh": {"TOKENIZER": "tokenizer.model", "DATA_FILE_LIST": "list.txt"},
    "pretrain_gpt_ssh.sh": {"HOSTFILE": "hosts", "VOCAB_FILE": "v.json", "MERGE_FILE": "m.txt", "DATA_PATH": "a"},
}


@pytest.mark.parametrize("script", OF_JOBS)
def test_scripts_of_the_examples_that_start_jobs(script, tmp_path, monkeypatch):
    """The config is that of the command in the job, which says `megalith pretrain` last."""
    variables = OF_JOBS[script] | {"CHECKPOINT_PATH": "checkpoints"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    path = str(ROOT / "examples" / script)
    config, processes, _ = config_sources.from_script(path, [])
    more = [] if script.endswith("ssh.sh") else ["--dry-run"]
    shown = subprocess.run([path, *more], env=environment(**variables, PATH=without_ssh(tmp_path)), capture_output=True,
                           text=True)  # fmt: skip
    if script.endswith("ssh.sh"):
        assert (tmp_path / "hosts.log").read_text().count("megalith launch") == 2, shown.stderr
        text = (tmp_path / "hosts.log").read_text().splitlines()[0]
    else:
        text = " ".join(shown.stdout.replace("\\\n", " ").split()).partition(" & step=")[0]
        text = text[text.index("-m megalith launch") :]
    words = shlex.split(text)
    again, _, _ = config_sources.from_words("pretrain", words[words.index("pretrain") + 1 :], processes)
    assert again == config
    assert processes == {"pretrain_gpt3_175B.sh": 1024, "pretrain_gpt_pbs.sh": 8, "pretrain_gpt_ssh.sh": 1}[script]


def test_a_script_that_trains_nothing(monkeypatch):
    for name in ("CHECKPOINT_PATH", "VOCAB_FILE", "MERGE_FILE"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=r"must start a training.*it starts python"):
        config_sources.from_script(str(ROOT / "examples/run_text_generation_server_345M.sh"), [])


def without_ssh(folder):
    """A path whose ssh writes down what it is asked for."""
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(f'#!/bin/bash\necho "${{@: -1}}" >>{folder}/hosts.log\n')
    (folder / "bin" / "ssh").chmod(0o755)
    return os.pathsep.join([str(folder / "bin"), environment()["PATH"]])


SLOW = ("finetune_chat.sh",)  # it makes a model of Hugging Face


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in EXAMPLES]
)
def test_scripts_of_the_examples(script, tmp_path, monkeypatch):
    """The config is that which the script itself prints."""
    variables = EXAMPLES[script] | {"CHECKPOINT_PATH": "checkpoints", "NUM_LAYERS": "6"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    if "MODEL" in variables:
        make_llama(tmp_path)
    path, more = str(ROOT / "examples" / script), ["--seed", "77"]
    assert main(["config", "--from-script", path, "--output", "run.yaml", "--", *more]) == 0
    shown = subprocess.run(
        [path, *more, "--dry-run", "--print-config", "all"],
        env=environment(**variables),
        capture_output=True,
        text=True,
    )
    assert from_yaml(shown.stdout) == from_yaml((tmp_path / "run.yaml").read_text())


LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-05, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_config_json(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["config", "--from-huggingface", "config.json", "--output", "llama.yaml"]) == 0
    config = from_yaml((tmp_path / "llama.yaml").read_text())
    assert parameter_count(config.model) == 8030261248 and "--dry-run" in capsys.readouterr().out
    assert main(["config", "--from-huggingface", str(tmp_path), "--output", "llama.yaml"]) == 2  # it exists
    assert main(["config", "--from-huggingface", "gone", "--output", "other.yaml"]) == 1
    assert main(["config", "--from-huggingface", "config.json", "--accelerate"]) == 2


def test_a_checkpoint(tmp_path, monkeypatch):
    from megalith.training.pretrain import train
    from tests.tiny import tiny_config, write_corpus

    config = tiny_config(
        write_corpus(str(tmp_path / "tiny")), str(tmp_path / "run"), train_iters=2, lr_warmup_iters=1, eval_iters=0
    )
    train(config)
    monkeypatch.chdir(tmp_path)
    assert main(["config", "--from-checkpoint", "run", "--output", "again.yaml"]) == 0
    again = from_yaml((tmp_path / "again.yaml").read_text())
    assert (again.model, again.batch, again.schedule) == (config.model, config.batch, config.schedule)
    assert again.data.data_path == config.data.data_path
