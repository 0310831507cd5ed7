#!/usr/bin/env bash
# GPT-3 with 175 billion parameters on 1024 GPUs, as Megatron-LM's script of this name: Slurm with pyxis, 8-way tensor
# and 16-way pipeline parallel, batches that grow from 16 to 1536 samples over the first 5,859,375.
# Writes a job script, and sends it with --submit. Every setting below may be given as a variable:
#
#   DATA_PATH="0.7 web_text_document 0.3 books_text_document" VOCAB_FILE=vocab.json MERGE_FILE=merges.txt \
#       CHECKPOINT_PATH=checkpoints/gpt3 ACCOUNT=my-account examples/pretrain_gpt3_175B.sh --submit
#
# Arguments are passed to `megalith launch`: --submit, --dry-run (which prints the job script), --overwrite. The job is
# stopped before its time limit, saves, is queued again, and resumes. TRAIN_FLAGS are flags of megalith pretrain.
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run}
VOCAB_FILE=${VOCAB_FILE:?vocab.json of GPT-2}
MERGE_FILE=${MERGE_FILE:?merges.txt of GPT-2}
DATA_PATH=${DATA_PATH:?indexed dataset without its extension, or weights and datasets, as in 0.7 web 0.3 books}

NUM_NODES=${NUM_NODES:-128}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
TIME=${TIME:-4:00:00}
IMAGE=${IMAGE-nvcr.io#nvidia/pytorch:25.10-py3} # IMAGE= for no container
MOUNTS=${MOUNTS-$PWD:$PWD}                      # folders that the container sees, with commas in between
RECIPE=${RECIPE:-gpt3-175b}                     # megalith config lists the others

job=(--slurm --time "$TIME" --nnodes "$NUM_NODES" --nproc-per-node "$GPUS_PER_NODE")
[[ -z $IMAGE ]] || job+=(--container-image "$IMAGE" --container-mounts "$MOUNTS")
[[ -z ${ACCOUNT-} ]] || job+=(--account "$ACCOUNT")
[[ -z ${PARTITION-} ]] || job+=(--partition "$PARTITION")

# shellcheck disable=SC2086 # several datasets, and several flags, are several words
exec "${PYTHON:-python}" -m megalith launch "${job[@]}" "$@" pretrain gpt \
    --recipe "$RECIPE" \
    --data-path $DATA_PATH \
    --vocab-file "$VOCAB_FILE" \
    --merge-file "$MERGE_FILE" \
    --save "$CHECKPOINT_PATH" \
    --load "$CHECKPOINT_PATH" \
    ${TRAIN_FLAGS-}
