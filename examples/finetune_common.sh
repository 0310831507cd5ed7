# shellcheck shell=bash disable=SC2034,SC2154 # the variables are those of the scripts that source this file
# What the finetune_*_distributed.sh scripts have in common: settings, and the flags of a BERT on a task.
# `finetune TASK FLAG ...` runs `megalith finetune TASK` as common.sh says.

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, predictions and the record of the run}
VOCAB_FILE=${VOCAB_FILE:?vocabulary of WordPiece, one token a line}
PRETRAINED_CHECKPOINT=${PRETRAINED_CHECKPOINT?pretrained BERT, in any format; empty to begin with random weights}

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
# A micro-batch of each data-parallel process; with a pipeline, as many of them as it has stages.
GLOBAL_BATCH=${GLOBAL_BATCH:-$((MICRO_BATCH * GPUS_PER_NODE * NUM_NODES / TENSOR))}
PRECISION=${PRECISION---bf16} # PRECISION=--fp16 on devices without bf16; PRECISION= for float32

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

finetune() {
    local pretrained=()
    if [ -n "$PRETRAINED_CHECKPOINT" ]; then
        pretrained=(--pretrained-checkpoint "$PRETRAINED_CHECKPOINT")
    fi
    # shellcheck disable=SC2086 # an empty PRECISION is no argument, and several files are several
    run_megalith finetune "$1" \
        --tensor-model-parallel-size "$TENSOR" \
        --pipeline-model-parallel-size "$PIPELINE" \
        --num-layers "$NUM_LAYERS" \
        --hidden-size "$HIDDEN_SIZE" \
        --num-attention-heads "$NUM_HEADS" \
        --seq-length "$SEQ_LENGTH" \
        --max-position-embeddings "$SEQ_LENGTH" \
        --micro-batch-size "$MICRO_BATCH" \
        --global-batch-size "$GLOBAL_BATCH" \
        --tokenizer-type "$TOKENIZER_TYPE" \
        --vocab-file "$VOCAB_FILE" \
        --train-data $TRAIN_DATA \
        --valid-data $VALID_DATA \
        "${pretrained[@]}" \
        --activations-checkpoint-method uniform \
        --save "$CHECKPOINT_PATH" \
        --log-interval 100 \
        --weight-decay 1.0e-1 \
        $PRECISION "${@:2}"
}
