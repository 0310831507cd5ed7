#!/usr/bin/env bash
# The 345M BERT of Megatron-LM, in one process, on all GPUs of a machine, or on several machines.
# Set the three paths. Every setting below may be given as a variable too, and further arguments are passed to megalith,
# where later flags win:
#
#   DATA_PATH=my-bert_text_sentence VOCAB_FILE=bert-vocab.txt CHECKPOINT_PATH=checkpoints/bert \
#       examples/pretrain_bert.sh --train-iters 1000
#
# GPUS_PER_NODE=8 starts eight data-parallel processes. TENSOR=2 splits each layer between two of them, and PIPELINE=2
# cuts the layers into two stages. On several machines run the script on each, with MASTER_ADDR (the first machine's
# name), NUM_NODES and NODE_RANK (0, 1, ...) set. The same command resumes from the newest checkpoint.
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run unless --run-dir is given}
VOCAB_FILE=${VOCAB_FILE:?vocabulary of WordPiece, one token a line}
DATA_PATH=${DATA_PATH:?indexed dataset, split into sentences, without its extension, as in my-bert_text_sentence}

GPUS_PER_NODE=${GPUS_PER_NODE:-1} # processes of a machine; on CPUs, one for every few cores
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
TENSOR=${TENSOR:-1}     # --tensor-model-parallel-size
PIPELINE=${PIPELINE:-1} # --pipeline-model-parallel-size

TOKENIZER_TYPE=${TOKENIZER_TYPE:-BertWordPieceLowerCase} # BertWordPieceCase for a cased vocabulary
NUM_LAYERS=${NUM_LAYERS:-24}
HIDDEN_SIZE=${HIDDEN_SIZE:-1024}
NUM_HEADS=${NUM_HEADS:-16}
SEQ_LENGTH=${SEQ_LENGTH:-512}
MICRO_BATCH=${MICRO_BATCH:-4}
# 8 samples a process; with a pipeline, four micro-batches for each stage.
GLOBAL_BATCH=${GLOBAL_BATCH:-$(((PIPELINE > 1 ? 4 * MICRO_BATCH : 8) * GPUS_PER_NODE * NUM_NODES / TENSOR))}
TRAIN_ITERS=${TRAIN_ITERS:-1000000}
PRECISION=${PRECISION---bf16} # PRECISION=--fp16 on devices without bf16; PRECISION= for float32

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch bert \
    --num-layers "$NUM_LAYERS" \
    --hidden-size "$HIDDEN_SIZE" \
    --num-attention-heads "$NUM_HEADS" \
    --seq-length "$SEQ_LENGTH" \
    --max-position-embeddings "$SEQ_LENGTH" \
    --tokenizer-type "$TOKENIZER_TYPE" \
    --lr 0.0001 \
    --lr-decay-style linear \
    --lr-decay-iters "${DECAY_ITERS:-990000}" \
    "$@"
