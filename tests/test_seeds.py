"""Every command of the documents that megalith answers to (../shared/seeds/000, 001), with smaller numbers.

What exists runs; what does not is answered. The scripts of examples/ are in test_examples.py, transformers' converter
of GPT-2 in cli/test_checkpoint_convert.py, NVIDIA's releases in workflows/test_release.py, continued training in
test_continue_llama.py, finetuning in finetune/test_command.py.
"""

import functools
import json
import pathlib
import shlex

import pytest
import torch

import megalith
from megalith.cli.main import main
from megalith.data.indexed import IndexedDataset
from megalith.workflows.conversion import convert
from tests.checkpoint.megatron_files import model_of, write
from tests.tiny import tiny_config, write_corpus
from tests.toy import make_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Files under the names that the documents have for them."""
    folder = tmp_path_factory.mktemp("seeds")
    make_corpus(folder)
    names = {
        "corpus.jsonl": "my-corpus.json",
        "vocab.json": "gpt2-vocab.json",
        "merges.txt": "gpt2-merges.txt",
        "vocab.txt": "bert-vocab.txt",
    }
    for old, new in names.items():
        (folder / old).rename(folder / new)
    lines = [json.loads(line) for line in (folder / "my-corpus.json").read_text().splitlines()][:10]
    titled = [{"text": line["text"][:5000], "title": f"document {number}."} for number, line in enumerate(lines)]
    (folder / "titled.json").write_text("".join(json.dumps(line) + "\n" for line in titled))
    write_corpus(str(folder / "my-gpt2_text_document"))
    config, tensors = model_of(bias_gelu_fusion=True)
    write(folder / "checkpoints/gpt3_tp4_pp4", config, tensors, tensor=4, pipeline=4, args={"bias_gelu_fusion": True})
    return folder


def run(line: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """Status and output of a command line."""
    try:
        status = main(shlex.split(line))
    except SystemExit as stop:
        status = int(stop.code or 0)
    said = capsys.readouterr()
    return status, said.out + said.err


PREPROCESS = {  # name of a dataset that it makes -> the flags after tools/preprocess_data.py
    "my-bert_text_sentence": "--input my-corpus.json --output-prefix my-bert --vocab-file bert-vocab.txt "
    "--tokenizer-type BertWordPieceLowerCase --split-sentences --workers 5",
    "my-t5_text_sentence": "--input my-corpus.json --output-prefix my-t5 --vocab-file bert-vocab.txt "
    "--tokenizer-type BertWordPieceLowerCase --split-sentences --workers 5",
    "gpt2/my-gpt2_text_document": "--input my-corpus.json --output-prefix gpt2/my-gpt2 --vocab-file gpt2-vocab.json "
    "--dataset-impl mmap "
    "--tokenizer-type GPT2BPETokenizer --merge-file gpt2-merges.txt --append-eod --workers 5",
    "corpus_indexed_title_sentence": "--input titled.json --json-keys text title --split-sentences "
    "--tokenizer-type BertWordPieceLowerCase --vocab-file bert-vocab.txt --output-prefix corpus_indexed --workers 5",
}


@pytest.mark.slow  # five processes each
@pytest.mark.parametrize("dataset", PREPROCESS)
def test_preprocessing(dataset, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    status, said = run(f"data preprocess {PREPROCESS[dataset]}", capsys)
    assert status == 0, said
    assert len(IndexedDataset(str(folder / dataset))) > 0


BASE = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 4 "
    "--global-batch-size 16 --lr 0.00015 --train-iters 10 --lr-decay-iters 10 --lr-decay-style cosine --min-lr 1.0e-5 "
    "--lr-warmup-fraction .01 --weight-decay 1e-2 --clip-grad 1.0 --split 949,50,1 --log-interval 100 "
    "--save-interval 10000 "
    "--eval-interval 1000 --eval-iters 10 --save checkpoints/new"
)
GPT = f"pretrain gpt {BASE} --data-path my-gpt2_text_document --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt"
T5 = f"pretrain t5 {BASE} --data-path my-gpt2_text_document --vocab-file bert-vocab.txt --vocab-extra-ids 100"
FLAGS = [  # what the documents say of training -> flags
    "--DDP-impl local",
    "--DDP-impl torch",
    "--tensor-model-parallel-size 2 --world-size 2",
    "--tensor-model-parallel-size 2 --sequence-parallel --world-size 2",
    "--pipeline-model-parallel-size 2 --world-size 2",
    "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --world-size 2",
    "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --world-size 8",
    "--recompute-activations",
    "--recompute-granularity full --recompute-method uniform",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
    "--activations-checkpoint-method uniform",
    "--use-distributed-optimizer --world-size 2",
    "--use-flash-attn",
    "--bf16 --embedding-weights-in-fp32",
    "--bf16 --no-bias-gelu-fusion",
    "--fp16",
    "--finetune --no-load-optim --no-load-rng",
    "--position-embedding-type alibi",
    "--attention-head-type multiquery",
    "--seed 1234 --distributed-backend gloo",
]


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_training(flags, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    status, said = run(f"{GPT} {flags} --dry-run", capsys)
    assert status == 0 and "would not find" not in said, said


def test_samples_instead_of_iterations_and_the_lengths_of_a_t5(folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    samples = GPT.replace("--train-iters 10 --lr-decay-iters 10", "--train-samples 160 --lr-decay-samples 160")
    ramp = f"{samples} --global-batch-size 1536 --rampup-batch-size 16 16 5859375".replace("160", "6000000")
    for line in (
        samples,
        ramp,
        f"{T5} --kv-channels 4 --ffn-hidden-size 48 --encoder-seq-length 16 --decoder-seq-length 8",
    ):
        status, said = run(f"{line} --dry-run", capsys)
        assert status == 0 and "would not find" not in said, said


def test_reshaping(folder, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.chdir(folder)
    flags = (
        "--model-type GPT --load-dir checkpoints/gpt3_tp4_pp4 --save-dir checkpoints/gpt3_tp2_pp2 "
        "--target-tensor-parallel-size 2 --target-pipeline-parallel-size 2"
    )
    status, said = run(f"checkpoint reshape {flags}", capsys)
    assert status == 0, said
    assert len(list((folder / "checkpoints/gpt3_tp2_pp2").rglob("model_optim_rng.pt"))) == 4
    convert(folder / "checkpoints/gpt3_tp2_pp2", tmp_path / "ours", to="megalith")


EVALUATION = (  # of tasks/main.py; the paths and the sizes of the model are changed
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --fp16 "
    "--vocab-file gpt2-vocab.json --valid-data {data} --tokenizer-type GPT2BPETokenizer {strict}"
    "--merge-file gpt2-merges.txt --load checkpoints/gpt2_345m --micro-batch-size 8 "
    "--activations-checkpoint-method uniform --log-interval 10 --no-load-optim --no-load-rng"
)


@pytest.mark.parametrize(
    ("task", "data", "strict", "number"),
    [
        ("WIKITEXT103", "wikitext.txt", "", "adjusted perplexity"),
        ("LAMBADA", "lambada.json", "", "an answer is the last token"),
        ("LAMBADA", "lambada.json", "--strict-lambada ", "an answer is the last word"),
    ],
)
def test_evaluation(task, data, strict, number, folder, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    (folder / "wikitext.txt").write_text(
        " \n = The title = \n \n It is 3 @.@ 5 m long , and is of 1 @,@ 200 words . \n" * 3
    )
    (folder / "lambada.json").write_text('{"text": "the value of the object is the name"}\n{"text": "a name"}\n' * 3)
    if not (folder / "checkpoints/gpt2_345m").exists():
        config, tensors = model_of(vocab_size=512, bias_gelu_fusion=True)
        write(folder / "checkpoints/gpt2_345m", config, tensors, padded=512, args={"bias_gelu_fusion": True})
    status, said = run(f"evaluate --task {task} {EVALUATION.format(data=data, strict=strict)}", capsys)
    assert status == 0 and number in said, said
    for flag in ("--activations-checkpoint-method (", "--log-interval (", "--no-load-optim (", "--no-load-rng ("):
        assert flag in said, said


def test_megatron_generate(tmp_path) -> None:
    """The calls of megatron_generate as they stand there, on the model's own tensors."""
    from megalith.training.pretrain import train

    train(
        tiny_config(
            write_corpus(str(tmp_path / "tiny")), str(tmp_path / "run"), train_iters=2, lr_warmup_iters=1, eval_iters=0
        )
    )
    model, max_new_tokens = megalith.load(tmp_path / "run", device="cpu"), 6
    model.megatron_generate = functools.partial(megalith.generate_tokens, model)
    pad = model.tokenizer.eod
    batch_encodings = {
        "input_ids": torch.tensor([[1, 2, pad], [3, 4, 5]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])
    }  # fmt: skip
    for options in (
        {"top_p": 0.8, "top_p_decay": 0.5, "temperature": 0.9},
        {"top_k": 50, "temperature": 0.9},
        {"add_BOS": True},
        {"num_beams": 20, "length_penalty": 1.5},
    ):
        generated_tokens = model.megatron_generate(
            batch_encodings["input_ids"], batch_encodings["attention_mask"], max_new_tokens=max_new_tokens, **options
        )
        bos = [pad] if "add_BOS" in options else []
        assert generated_tokens[:, : len(bos) + 2].tolist() == [[*bos, 1, 2], [*bos, 3, 4]]
        assert generated_tokens.shape[0] == 2 and len(bos) + 3 < generated_tokens.shape[1] <= len(bos) + 9


ANSWERED = {  # a command of the documents that has no counterpart, or another name -> a word of the answer
    "pretrain_ict.py --num-layers 12 --ict-head-size 128 --bert-load /path/to/pretrained_bert": "megalith pretrain ict",
    "tools/create_doc_index.py --num-layers 12 --ict-load /path/to/pretrained_ict": "megalith index",
    "tasks/main.py --task RACE --train-data data/RACE/train/middle --epochs 3": "megalith finetune TASK",
    "tools/run_text_generation_server.py": "megalith serve PATH",
    "tools/text_generation_cli.py localhost:5000": "megalith ask HOST",
    "accelerate config --config_file megatron_gpt_config.yaml": "megalith config --accelerate",
    "examples/by_feature/megatron_lm_gpt_pretraining.py --config_name gpt2-large": "megalith config --accelerate",
    "tools/retro/examples/get_preprocess_cmd.sh": "megalith retro",
    "tools/retro/main.py --retro-tasks build": "`megalith retro`",
    "pretrain_retro.py": "megalith pretrain retro",
    "tools/preprocess_data.py --input my-corpus.json": "megalith data preprocess",
    "tools/checkpoint_util.py --model-type GPT": "megalith checkpoint reshape",
    "checkpoint_reshaping_and_interoperability.py --load_path gpt": "megalith checkpoint reshape",
    "convert_megatron_gpt2_checkpoint.py checkpoint.zip": "megalith checkpoint import",
    "ALCF/utils/gen_file_list.py": "megalith data weights",
    "megatron/data/merge_dataset_qsub.sh": "megalith data split",
    "examples/pretrain_gpt3_175B.sh": "megalith pretrain gpt --recipe gpt3-175b",
    "examples/pretrain_t5_distributed.sh": "megalith pretrain t5",
    "pretrain gpt --learning_rate 5e-5": "it is --lr here",
    "pretrain gpt --block_size 1024": "it is --seq-length here",
    "pretrain gpt --per_device_train_batch_size 24": "it is --micro-batch-size here",
    "pretrain gpt --num_train_epochs 5": "it is --train-iters or --train-samples here",
    "pretrain gpt --dataset_name wikitext": "megalith data preprocess makes tokens",
    "pretrain gpt --with_tracking": "it is --tensorboard-dir here",
    "pretrain gpt --output_dir awesome_model": "it is --save here",
    "pretrain gpt --fine-tune": "did you mean --finetune?",
    "pretrain gpt --num-microbatches-in-minibatch 4": "--global-batch-size says it",
}


@pytest.mark.parametrize("line", ANSWERED)
def test_what_has_no_counterpart_is_answered(line, capsys) -> None:
    status, said = run(line, capsys)
    assert status == 2 and ANSWERED[line] in said, said
