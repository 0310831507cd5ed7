#!/usr/bin/env bash
# The ICT bi-encoder of REALM (two BERTs of 110M), in one process, on all GPUs of a machine, or on several machines.
# Set the four paths. Every setting below may be given as a variable too, and further arguments are passed to megalith,
# where later flags win:
#
#   DATA_PATH=wiki_text_sentence TITLES_DATA_PATH=wiki_title_sentence VOCAB_FILE=bert-vocab.txt \
#       CHECKPOINT_PATH=checkpoints/ict examples/pretrain_ict.sh --bert-load checkpoints/bert --train-iters 1000
#
# GPUS_PER_NODE=8 starts eight data-parallel processes. TENSOR=2 splits each layer between two of them, and PIPELINE=2
# cuts the layers into two stages. On several machines run the script on each, with MASTER_ADDR (the first machine's
# name), NUM_NODES and NODE_RANK (0, 1, ...) set. The same command resumes from the newest checkpoint.
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run unless --run-dir is given}
VOCAB_FILE=${VOCAB_FILE:?vocabulary of WordPiece, one token a line}
DATA_PATH=${DATA_PATH:?indexed dataset, split into sentences, without its extension, as in wiki_text_sentence}
TITLES_DATA_PATH=${TITLES_DATA_PATH:?that of the titles, from the same run of preprocess, as in wiki_title_sentence}

GPUS_PER_NODE=${GPUS_PER_NODE:-1} # processes of a machine; on CPUs, one for every few cores
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
TENSOR=${TENSOR:-1}     # --tensor-model-parallel-size
PIPELINE=${PIPELINE:-1} # --pipeline-model-parallel-size

TOKENIZER_TYPE=${TOKENIZER_TYPE:-BertWordPieceLowerCase} # BertWordPieceCase for a cased vocabulary
NUM_LAYERS=${NUM_LAYERS:-12}
HIDDEN_SIZE=${HIDDEN_SIZE:-768}
NUM_HEADS=${NUM_HEADS:-12}
HEAD_SIZE=${HEAD_SIZE:-128} # width of the vectors, --biencoder-projection-dim
SEQ_LENGTH=${SEQ_LENGTH:-256}
MICRO_BATCH=${MICRO_BATCH:-128}
GLOBAL_BATCH=${GLOBAL_BATCH:-4096} # the paper's: each block is a negative for all other queries
TRAIN_ITERS=${TRAIN_ITERS:-100000}
PRECISION=${PRECISION---bf16} # PRECISION=--fp16 on devices without bf16; PRECISION= for float32

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

launch ict \
    --num-layers "$NUM_LAYERS" \
    --hidden-size "$HIDDEN_SIZE" \
    --num-attention-heads "$NUM_HEADS" \
    --seq-length "$SEQ_LENGTH" \
    --max-position-embeddings "$SEQ_LENGTH" \
    --biencoder-projection-dim "$HEAD_SIZE" \
    --titles-data-path "$TITLES_DATA_PATH" \
    --query-in-block-prob 0.1 \
    --tokenizer-type "$TOKENIZER_TYPE" \
    --lr 0.0001 \
    --lr-decay-style linear \
    --lr-decay-iters "${DECAY_ITERS:-99000}" \
    "$@"
