#!/usr/bin/env bash
# The "base" T5 of Megatron-LM (222M), on one device. Set the three paths below (or the variables); settings may be overridden by
# variables too, and every further argument is handed to megalith, where later flags win:
#
#   DATA_PATH=my-t5_text_sentence VOCAB_FILE=bert-vocab.txt CHECKPOINT_PATH=checkpoints/t5 \
#       examples/pretrain_t5.sh --train-iters 1000
#
# Run the same command again to go on from the newest checkpoint.
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run unless --run-dir is given}
VOCAB_FILE=${VOCAB_FILE:?vocabulary of WordPiece, one token a line}
DATA_PATH=${DATA_PATH:?indexed dataset, split into sentences, without its extension, as in my-t5_text_sentence}

TOKENIZER_TYPE=${TOKENIZER_TYPE:-BertWordPieceLowerCase} # BertWordPieceCase for a cased vocabulary
NUM_LAYERS=${NUM_LAYERS:-12}
HIDDEN_SIZE=${HIDDEN_SIZE:-768}
NUM_HEADS=${NUM_HEADS:-12}
KV_CHANNELS=${KV_CHANNELS:-64}
FFN_SIZE=${FFN_SIZE:-3072}
SEQ_LENGTH=${SEQ_LENGTH:-512}
DECODER_SEQ_LENGTH=${DECODER_SEQ_LENGTH:-128}
MICRO_BATCH=${MICRO_BATCH:-16}
GLOBAL_BATCH=${GLOBAL_BATCH:-16}
TRAIN_ITERS=${TRAIN_ITERS:-1000000}
PRECISION=${PRECISION---bf16} # PRECISION=--fp16 on devices without bf16; PRECISION= for float32

# shellcheck disable=SC2206 # an empty PRECISION is no word at all
ARGS=(
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

exec "${PYTHON:-python}" -m megalith pretrain t5 "${ARGS[@]}" "$@"
