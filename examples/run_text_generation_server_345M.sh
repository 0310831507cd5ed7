#!/usr/bin/env bash
# Serves the 345M GPT of the GPT-2 paper, as Megatron-LM's script of this name does: in one process, or split over GPUs.
# Set the three paths. Every setting below may be given as a variable too, and further arguments are passed to megalith,
# where later flags win:
#
#   CHECKPOINT_PATH=checkpoints/gpt VOCAB_FILE=vocab.json MERGE_FILE=merges.txt \
#       examples/run_text_generation_server_345M.sh --port 8000
#
# CHECKPOINT_PATH is a folder of Megatron's, of `megalith pretrain` (examples/pretrain_gpt.sh), or NVIDIA's zip of the
# 345M release. GPUS_PER_NODE=2 TENSOR=2 splits each layer between two GPUs, PIPELINE=2 cuts the layers into two stages.
# Then: megalith ask localhost:5000
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, or a zip of one}
VOCAB_FILE=${VOCAB_FILE:?vocab.json of GPT-2}
MERGE_FILE=${MERGE_FILE:?merges.txt of GPT-2}

GPUS_PER_NODE=${GPUS_PER_NODE:-1}
MASTER_PORT=${MASTER_PORT:-6000}
TENSOR=${TENSOR:-1}     # --tensor-model-parallel-size
PIPELINE=${PIPELINE:-1} # --pipeline-model-parallel-size

NUM_LAYERS=${NUM_LAYERS:-24}
HIDDEN_SIZE=${HIDDEN_SIZE:-1024}
NUM_HEADS=${NUM_HEADS:-16}
SEQ_LENGTH=${SEQ_LENGTH:-1024}
PRECISION=${PRECISION---fp16} # PRECISION=--bf16 where there is bf16; PRECISION= for float32, as CPUs want it

start=("${PYTHON:-python}")
if ((GPUS_PER_NODE > 1)); then
    start+=(-m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" --master-port "$MASTER_PORT")
fi
# shellcheck disable=SC2086 # an empty PRECISION is no argument
exec "${start[@]}" -m megalith serve \
    --load "$CHECKPOINT_PATH" \
    --tensor-model-parallel-size "$TENSOR" \
    --pipeline-model-parallel-size "$PIPELINE" \
    --num-layers "$NUM_LAYERS" \
    --hidden-size "$HIDDEN_SIZE" \
    --num-attention-heads "$NUM_HEADS" \
    --max-position-embeddings "$SEQ_LENGTH" \
    --tokenizer-type GPT2BPETokenizer \
    --vocab-file "$VOCAB_FILE" \
    --merge-file "$MERGE_FILE" \
    --temperature 1.0 \
    --top-p 0.9 \
    $PRECISION \
    "$@"
