#!/usr/bin/env bash
# The 222M T5 of pretrain_t5.sh with each layer split among TENSOR processes and the layers cut into PIPELINE stages; the
# rest of the processes is data-parallel. Set the same three paths; on several machines run it on each, with MASTER_ADDR (the
# first machine's name), NUM_NODES and NODE_RANK (0, 1, ...) set:
#
#   DATA_PATH=my-t5_text_sentence VOCAB_FILE=bert-vocab.txt CHECKPOINT_PATH=checkpoints/t5 \
#       GPUS_PER_NODE=8 TENSOR=2 PIPELINE=2 examples/pretrain_t5_distributed_with_mp.sh --sequence-parallel
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run unless --run-dir is given}
VOCAB_FILE=${VOCAB_FILE:?vocabulary of WordPiece, one token a line}
DATA_PATH=${DATA_PATH:?indexed dataset, split into sentences, without its extension, as in my-t5_text_sentence}

GPUS_PER_NODE=${GPUS_PER_NODE:-8} # processes a machine; on CPUs, one for every few cores
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

TOKENIZER_TYPE=${TOKENIZER_TYPE:-BertWordPieceLowerCase} # BertWordPieceCase for a cased vocabulary
TENSOR=${TENSOR:-2}
PIPELINE=${PIPELINE:-2}
NUM_LAYERS=${NUM_LAYERS:-12}
HIDDEN_SIZE=${HIDDEN_SIZE:-768}
NUM_HEADS=${NUM_HEADS:-12}
KV_CHANNELS=${KV_CHANNELS:-64}
FFN_SIZE=${FFN_SIZE:-3072}
SEQ_LENGTH=${SEQ_LENGTH:-512}
DECODER_SEQ_LENGTH=${DECODER_SEQ_LENGTH:-128}
MICRO_BATCH=${MICRO_BATCH:-2}
GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * 4 * GPUS_PER_NODE * NUM_NODES / TENSOR))} # four micro-batches for each stage
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
    --tensor-model-parallel-size "$TENSOR"
    --pipeline-model-parallel-size "$PIPELINE"
    --num-layers "$NUM_LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --num-attention-heads "$NUM_HEADS"
    --kv-channels "$KV_CHANNELS"
    --ffn-hidden-size "$FFN_SIZE"
    --encoder-seq-length "$SEQ_LENGTH"
    --decoder-seq-length "$DECODER_SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size "$GLOBAL_BATCH"
    --lr 0.0001
    --min-lr 1.0e-5
    --train-iters "$TRAIN_ITERS"
    --lr-decay-iters "${DECAY_ITERS:-1000000}"
    --lr-decay-style linear
    --lr-warmup-fraction .01
    --weight-decay 1e-2
    --clip-grad 1.0
    $PRECISION
    --data-path "$DATA_PATH"
    --tokenizer-type "$TOKENIZER_TYPE"
    --vocab-file "$VOCAB_FILE"
    --vocab-extra-ids 100
    --split 949,50,1
    --log-interval 100
    --save-interval 10000
    --eval-interval 1000
    --eval-iters 10
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
)

exec "${PYTHON:-python}" -m torch.distributed.run "${LAUNCH[@]}" -m megalith pretrain t5 "${ARGS[@]}" "$@"
