#!/usr/bin/env bash
# The 345M BERT of pretrain_bert.sh on every device of one machine or of several, data-parallel. Set the same three paths; on
# several machines run it on each, with MASTER_ADDR (the first machine's name), NUM_NODES and NODE_RANK (0, 1, ...) set:
#
#   DATA_PATH=my-bert_text_sentence VOCAB_FILE=bert-vocab.txt CHECKPOINT_PATH=checkpoints/bert \
#       GPUS_PER_NODE=8 examples/pretrain_bert_distributed.sh --use-distributed-optimizer
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run unless --run-dir is given}
VOCAB_FILE=${VOCAB_FILE:?vocabulary of WordPiece, one token a line}
DATA_PATH=${DATA_PATH:?indexed dataset, split into sentences, without its extension, as in my-bert_text_sentence}

GPUS_PER_NODE=${GPUS_PER_NODE:-8} # processes a machine; on CPUs, one for every few cores
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

TOKENIZER_TYPE=${TOKENIZER_TYPE:-BertWordPieceLowerCase} # BertWordPieceCase for a cased vocabulary
NUM_LAYERS=${NUM_LAYERS:-24}
HIDDEN_SIZE=${HIDDEN_SIZE:-1024}
NUM_HEADS=${NUM_HEADS:-16}
SEQ_LENGTH=${SEQ_LENGTH:-512}
MICRO_BATCH=${MICRO_BATCH:-4}
GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * GPUS_PER_NODE * NUM_NODES))}
TRAIN_ITERS=${TRAIN_ITERS:-1000000}
PRECISION=${PRECISION---bf16} # PRECISION=--fp16 on devices without bf16; PRECISION= for float32

LAUNCH=(
    --nproc-per-node "$GPUS_PER_NODE"
    --nnodes "$NUM_NODES"
    --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR"
    --master-port "$MASTER_PORT"
)

# shellcheck disable=SC2206 # an empty PRECISION is no word at all
ARGS=(
    --num-layers "$NUM_LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --num-attention-heads "$NUM_HEADS"
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size "$GLOBAL_BATCH"
    --lr 0.0001
    --min-lr 1.0e-5
    --train-iters "$TRAIN_ITERS"
    --lr-decay-iters "${DECAY_ITERS:-990000}"
    --lr-decay-style linear
    --lr-warmup-fraction .01
    --weight-decay 1e-2
    --clip-grad 1.0
    $PRECISION
    --data-path "$DATA_PATH"
    --tokenizer-type "$TOKENIZER_TYPE"
    --vocab-file "$VOCAB_FILE"
    --split 949,50,1
    --log-interval 100
    --save-interval 10000
    --eval-interval 1000
    --eval-iters 10
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
)

exec "${PYTHON:-python}" -m torch.distributed.run "${LAUNCH[@]}" -m megalith pretrain bert "${ARGS[@]}" "$@"
