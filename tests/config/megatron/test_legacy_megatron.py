"""Every flag that Megatron-LM has for GPT acts here, or says why it is not needed, or is an error with a cure."""

import pathlib
import re
import shlex

import pytest

from megalith.common.errors import ConfigError
from megalith.config.flags import flags
from megalith.config.flags.loading import load_config
from megalith.config.flags.values import fields
from megalith.config.megatron import flags as legacy_megatron

ROOT = pathlib.Path(__file__).parents[3]
SHARED = ROOT.parent / "shared"

# Megatron-LM's groups of arguments (Hugging Face's fork, Megatron-DeepSpeed, Megatron core), with their values.
MEGATRON = """
network: --num-layers 2; --hidden-size 64; --num-attention-heads 4; --max-position-embeddings 64;
 --ffn-hidden-size 256; --kv-channels 16;
 --attention-head-type multiquery; --make-vocab-size-divisible-by 128; --layernorm-epsilon 1e-5;
 --apply-residual-connection-post-layernorm;
 --openai-gelu; --onnx-safe True; --bert-no-binary-head; --position-embedding-type alibi; --glu-activation geglu;
 --num-experts 1;
 --num-key-value-heads 2; --use-rotary-position-embeddings; --rotary-position-embeddings-theta 10000;
 --rotary-percent 1.0;
 --no-position-embedding; --normalization rmsnorm; --swiglu; --squared-relu; --untie-embeddings-and-output-weights;
 --apply-layernorm-1p; --use-rope-scaling; --rope-scaling-factor 8.0; --rotary-seq-len-interpolation-factor 2;
 --window-size -1,0;
 --embedding-weights-in-fp32; --disable-bias-linear; --encoder-num-layers 2; --decoder-num-layers 2
regularisation: --attention-dropout 0.1; --hidden-dropout 0.1; --weight-decay 0.01; --start-weight-decay 0.01;
 --end-weight-decay 0.1;
 --weight-decay-incr-style linear; --clip-grad 1.0; --adam-beta1 0.9; --adam-beta2 0.999; --adam-eps 1e-8;
 --sgd-momentum 0.9
training: --micro-batch-size 2; --global-batch-size 8; --rampup-batch-size 2 2 100; --recompute-activations;
 --recompute-granularity full;
 --recompute-method uniform; --recompute-num-layers 1; --distribute-saved-activations; --checkpoint-activations;
 --train-iters 10;
 --train-samples 10; --log-interval 100; --exit-interval 5; --exit-duration-in-mins 5; --exit-signal-handler;
 --tensorboard-dir there;
 --no-masked-softmax-fusion; --no-bias-gelu-fusion; --no-bias-dropout-fusion; --optimizer adam;
 --dataloader-type cyclic;
 --no-async-tensor-model-parallel-allreduce; --no-persist-layer-norm; --sequence-parallel;
 --no-gradient-accumulation-fusion;
 --use-flash-attn; --use-flash-attn-v1; --use-flash-attn-v2; --use-flash-attn-triton; --use-flash-attn-builder;
 --train-tokens 1000;
 --deepspeed; --deepspeed_config ds.json; --deepspeed-activation-checkpointing; --zero-stage 1.0;
 --ds-sequence-parallel-size 1;
 --no-pipeline-parallel; --activations-checkpoint-method uniform; --activations-checkpoint-num-layers 1
initialisation: --seed 1234; --init-method-std 0.02; --init-method-xavier-uniform
learning rate: --lr 1e-3; --lr-decay-style cosine; --lr-decay-iters 10; --lr-decay-samples 10; --lr-decay-tokens 100;
 --lr-warmup-fraction .01; --lr-warmup-iters 1; --lr-warmup-samples 1; --lr-warmup-tokens 10; --min-lr 0.0;
 --override-opt_param-scheduler;
 --use-checkpoint-opt_param-scheduler; --lr-warmup-init 0.0; --lr-wsd-decay-style linear
checkpointing: --save there; --save-interval 100; --no-save-optim; --no-save-rng; --load there; --no-load-optim;
 --no-load-rng; --finetune;
 --no-initialization; --use-checkpoint-args; --finetune-from there; --exit-on-missing-checkpoint; --universal-checkpoint
mixed precision: --fp16; --bf16; --loss-scale 1024; --initial-loss-scale 4294967296; --min-loss-scale 1.0;
 --loss-scale-window 1000;
 --hysteresis 2; --no-query-key-layer-scaling; --apply-query-key-layer-scaling; --attention-softmax-in-fp32;
 --accumulate-allreduce-grads-in-fp32; --fp16-lm-cross-entropy
distributed: --tensor-model-parallel-size 1; --pipeline-model-parallel-size 1; --pipeline-model-parallel-split-rank 1;
 --num-layers-per-virtual-pipeline-stage 1; --distributed-backend nccl; --DDP-impl local;
 --no-contiguous-buffers-in-local-ddp;
 --no-scatter-gather-tensors-in-pipeline; --local_rank 0; --lazy-mpu-init True; --use-cpu-initialization;
 --empty-unused-memory-level 1;
 --standalone-embedding-stage; --use-distributed-optimizer
validation and data: --eval-iters 100; --eval-interval 1000; --data-path a; --split 969,30,1; --vocab-file v;
 --merge-file m;
 --vocab-extra-ids 0; --seq-length 64; --encoder-seq-length 64; --decoder-seq-length 64; --retriever-seq-length 256;
 --sample-rate 1.0;
 --mask-prob 0.15; --short-seq-prob 0.1; --mmap-warmup; --num-workers 2; --tokenizer-type GPT2BPETokenizer;
 --data-impl mmap;
 --reset-position-ids; --reset-attention-mask; --eod-mask-loss
autoresume and logging: --adlr-autoresume; --adlr-autoresume-interval 1000; --log-params-norm; --log-num-zeros-in-grad;
 --tensorboard-log-interval 1; --tensorboard-queue-size 1000; --log-timers-to-tensorboard;
 --log-batch-size-to-tensorboard;
 --no-log-learnig-rate-to-tensorboard; --no-log-loss-scale-to-tensorboard; --log-validation-ppl-to-tensorboard;
 --transformer-timers;
 --log-memory-to-tensorboard; --log-world-size-to-tensorboard
biencoder: --ict-head-size 128; --biencoder-projection-dim 0; --biencoder-shared-query-context-model; --ict-load a;
 --bert-load a;
 --titles-data-path a; --query-in-block-prob 0.1; --use-one-sent-docs; --evidence-data-path a;
 --retriever-report-topk-accuracies 1 5;
 --retriever-score-scaling; --block-data-path a; --embedding-path a; --indexer-batch-size 128;
 --indexer-log-interval 1000
tasks: --task RACE; --train-data a b; --valid-data a b; --epochs 3; --pretrained-checkpoint a
retro: --retro-workdir a; --retro-project-dir a; --retro-add-retriever; --retro-encoder-layers 2
 --retro-encoder-hidden-dropout 0.1; --retro-encoder-attention-dropout 0.1; --retro-num-neighbors 2
 --retro-num-retrieved-chunks 2; --retro-return-doc-ids; --retro-attention-gate 1; --retro-gpt-chunk-length 64
old names: --batch-size 2; --warmup 0.01; --model-parallel-size 1
"""
WORDS = [
    each.strip().split()
    for line in re.sub(r"^.*?:(?= --)", ";", MEGATRON, flags=re.M).split("\n")
    for each in line.split(";")
    if each.strip()
]
REFUSED = """
--fp32-residual-connection; --data-parallel-random-init; --load-tag global_step10; --wandb-entity-name a;
--wandb-project-name a; --num-experts 4; --retro-cyclic-train-iters 5; --retro-attention-gate 0;
--retro-no-verify-neighbor-count
"""
ELSEWHERE = {  # flags of other programs in the same documents
    "--json-key",
    "--json-keys",
    "--input",
    "--output-prefix",
    "--split-sentences",
    "--workers",
    "--dataset-impl",
    "--append-eod",
    "--strict-lambada",
    "--model-type",
    "--load-dir",
    "--save-dir",
    "--target-tensor-parallel-size",
    "--target-pipeline-parallel-size",
    "--require-virtualenv",
    "--json",
    "--num-microbatches-in-minibatch",
    "--global",
    "--upgrade",
    "--help",
    "--fine-tune",
    "--use-checkpoint-opt_params_scheduler",  # misspelled in prose there
}


@pytest.mark.parametrize("words", WORDS, ids=lambda words: words[0])
def test_each_flag_acts_or_says_why_not(words):
    found = flags.read(words)
    assert not found.problems and not found.words
    if not found.values:
        (notice,) = found.notices
        name = words[0].replace("_", "-")
        assert notice.startswith(f"{name} is not needed: ") or notice == f"{' '.join(words)} changes nothing here"
    known = {*fields(), *flags.legacy.IN_TOKENS}
    assert set(found.values) <= known


@pytest.mark.parametrize("words", [each.split() for each in REFUSED.split(";")], ids=lambda words: words[0])
def test_what_cannot_work_is_an_error_with_a_way_out(words):
    (problem,) = flags.read(words).problems
    assert problem.text.startswith(f"{' '.join(words)} cannot be used: ") and (
        "; " in problem.text or "," in problem.text
    )


@pytest.mark.parametrize(
    "name", [name for name, field in fields().items() if field.metadata["help"].startswith("accepted")]
)
def test_fields_that_are_only_accepted_say_so(name):
    (notice,) = flags.read([f"--{name.replace('_', '-')}"]).notices
    assert " is accepted: " in notice


@pytest.mark.parametrize(
    ("word", "value"), [("--check-for-nan-in-loss-and-grad", True), ("--no-check-for-nan-in-loss-and-grad", False)]
)
def test_the_check_for_nan_acts(word, value):
    """It was "not needed", for a promise that no code kept. tests/training/test_guards.py has what it does."""
    reading = flags.read([word])
    assert reading.values == {"check_for_nan_in_loss_and_grad": value} and not reading.notices and not reading.problems


def test_no_flag_is_in_two_tables():
    known = {name for field in fields().values() for names in flags.flag_names(field) for name in names}
    tables = [
        known,
        set(flags.legacy.RENAMED),
        set(flags.legacy.BY_VALUE),
        set(legacy_megatron.not_needed()),
        set(legacy_megatron.REFUSED),
    ]
    assert sum(map(len, tables)) == len(set().union(*tables))


def documented(text):
    """Flags of a text, alternatives in brackets spelled out: --x[-v1|-v2] is --x, --x-v1 and --x-v2."""
    for match in re.finditer(r"(?<![\w-])(--[a-zA-Z][\w-]*)(\[[^\]\s]*\])?", text):
        yield match[1]
        yield from (match[1] + end for end in (match[2] or "").strip("[]").split("|") if end.startswith("-"))


@pytest.mark.parametrize(
    ("file", "start", "stop"), [("specs.md", "### 8.1", "### 8.2"), ("seeds/001_9d32dca528cf1dc8.txt", "", "")]
)
def test_the_table_above_misses_no_documented_flag(file, start, stop):
    path = SHARED / file
    if not path.exists():
        pytest.skip("needs the documents of ../shared")
    text = path.read_text()
    text = text[text.index(start) : text.index(stop) if stop else None]
    covered = {words[0] for words in [*WORDS, *(each.split() for each in REFUSED.split(";"))]} | ELSEWHERE
    missing = {name for name in documented(text) if name not in covered and not name.endswith("-")}
    assert not missing


GPT_345M = """
 --num-layers 24 --hidden-size 1024 --num-attention-heads 16 --micro-batch-size 4 --global-batch-size 8
 --seq-length 1024
 --max-position-embeddings 1024 --train-iters 500000 --lr-decay-iters 320000 --save there --load there
 --data-path data_text_document
 --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt --data-impl mmap --split 949,50,1
 --distributed-backend nccl --lr 0.00015
 --min-lr 1.0e-5 --lr-decay-style cosine --weight-decay 1e-2 --clip-grad 1.0 --lr-warmup-fraction .01
 --activations-checkpoint-method uniform --log-interval 100 --save-interval 10000 --eval-interval 1000
 --eval-iters 10 --fp16
"""
GPT_175B = """
 --sequence-parallel --tensor-model-parallel-size 8 --pipeline-model-parallel-size 16 --num-layers 96
 --hidden-size 12288
 --num-attention-heads 96 --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 1536
 --rampup-batch-size 16 16 5859375 --train-samples 146484375 --lr-decay-samples 126953125 --lr-warmup-samples 183105
 --lr 6.0e-5
 --min-lr 6.0e-6 --lr-decay-style cosine --log-interval 10 --eval-iters 40 --eval-interval 1000 --data-path a
 --vocab-file v --merge-file m
 --save-interval 1000 --save there --load there --split 98,2,0 --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9
 --adam-beta2 0.95
 --init-method-std 0.006 --tensorboard-dir there --fp16 --activations-checkpoint-method uniform
"""


def test_the_345m_example_works_as_typed():
    config, notices = load_config(GPT_345M.split())
    assert config.data.tokenizer_type == "GPT2BPETokenizer" and config.batch.global_batch_size == 8
    assert config.recompute.granularity == "full" and config.schedule.lr_decay_iters == 320000 and config.precision.fp16
    assert len(notices) == 3


def test_the_175b_example_works_as_typed_on_1024_processes():
    config, _ = load_config(GPT_175B.split(), world_size=1024)
    assert config.batch.rampup_batch_size == [16, 16, 5859375] and config.parallel.sequence_parallel
    with pytest.raises(ConfigError, match=r"The number of processes must be .*; found 1000\."):
        load_config(GPT_175B.split(), world_size=1000)


def test_the_evaluation_example_is_read():
    found = flags.read(
        shlex.split(
            "--micro-batch-size 8 --activations-checkpoint-method uniform --log-interval 10 --no-load-optim "
            "--no-load-rng"
        )
    )
    assert not found.problems
