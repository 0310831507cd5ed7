#!/usr/bin/env bash
# A Retro of 12 layers, on what preprocess_data.sh has made. Set the paths that get_preprocess_cmd.sh names, without the
# BERT's, and CHECKPOINT_PATH; its other variables must be those of preprocess_data.sh, because neighbours belong to
# samples. Every setting may be given as a variable, and further arguments are passed to megalith, where later flags win:
#
#   RETRO_WORKDIR=retro DATA_PATH=my-gpt2_text_document VOCAB_FILE=vocab.json MERGE_FILE=merges.txt \
#       CHECKPOINT_PATH=checkpoints/retro examples/retro/pretrain_model.sh
#
# GPUS_PER_NODE=8 starts eight data-parallel processes. TENSOR=2 splits each layer between two of them, and PIPELINE=2
# cuts the layers into two stages. On several machines run the script on each, with MASTER_ADDR (the first machine's
# name), NUM_NODES and NODE_RANK (0, 1, ...) set. The same command resumes from the newest checkpoint. A start from the
# weights of a GPT: --pretrained-checkpoint checkpoints/gpt.
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run unless --run-dir is given}
BERT_LOAD_PATH=${BERT_LOAD_PATH:-not read in training}

GPUS_PER_NODE=${GPUS_PER_NODE:-1} # processes of a machine; on CPUs, one for every few cores
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}
TENSOR=${TENSOR:-1}     # --tensor-model-parallel-size
PIPELINE=${PIPELINE:-1} # --pipeline-model-parallel-size

NUM_LAYERS=${NUM_LAYERS:-12}
HIDDEN_SIZE=${HIDDEN_SIZE:-768}
NUM_HEADS=${NUM_HEADS:-12}
MICRO_BATCH=${MICRO_BATCH:-4}
NEIGHBORS=${NEIGHBORS:-2}               # read of each chunk, of those that preprocess_data.sh has kept
TRAIN_PRECISION=${TRAIN_PRECISION---bf16} # TRAIN_PRECISION=--fp16 on devices without bf16; empty for float32

here=$(dirname "${BASH_SOURCE[0]}")
source "$here/get_preprocess_cmd.sh"
source "$here/../common.sh"

# shellcheck disable=SC2086 # an empty TRAIN_PRECISION is no argument
run_megalith pretrain retro "${RETRO_GPT_ARGS[@]}" \
    --retro-workdir "$RETRO_WORKDIR" \
    --retro-add-retriever \
    --retro-gpt-chunk-length "$CHUNK_LENGTH" \
    --retro-num-neighbors "$NEIGHBORS" \
    --num-layers "$NUM_LAYERS" \
    --hidden-size "$HIDDEN_SIZE" \
    --num-attention-heads "$NUM_HEADS" \
    --max-position-embeddings "$SEQ_LENGTH" \
    --tensor-model-parallel-size "$TENSOR" \
    --pipeline-model-parallel-size "$PIPELINE" \
    --micro-batch-size "$MICRO_BATCH" \
    --lr 6.0e-4 \
    --min-lr 6.0e-5 \
    --lr-decay-style cosine \
    --lr-warmup-fraction .01 \
    --weight-decay .1 \
    --adam-beta2 .95 \
    --clip-grad 1.0 \
    --log-interval 100 \
    --save-interval 10000 \
    --save "$CHECKPOINT_PATH" \
    --load "$CHECKPOINT_PATH" \
    $TRAIN_PRECISION "$@"
