#!/usr/bin/env bash
# The GPT of a recipe on machines that only ssh reaches: HOSTFILE has a line `host slots=N` for each, with N processes.
# Python, this folder and the data must be at the same paths on all of them. Every setting may be given as a variable:
#
#   HOSTFILE=hosts.txt DATA_PATH=my-gpt2_text_document VOCAB_FILE=vocab.json MERGE_FILE=merges.txt \
#       CHECKPOINT_PATH=checkpoints/gpt examples/pretrain_gpt_ssh.sh --train-iters 1000
#
# Further arguments are passed to megalith pretrain. The same command resumes from the newest checkpoint.
set -euo pipefail

HOSTFILE=${HOSTFILE:?file with a line host slots=N for each machine}
CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run}
VOCAB_FILE=${VOCAB_FILE:?vocab.json of GPT-2}
MERGE_FILE=${MERGE_FILE:?merges.txt of GPT-2}
DATA_PATH=${DATA_PATH:?indexed dataset without its extension, as in my-gpt2_text_document}
RECIPE=${RECIPE:-gpt2-345m}

exec "${PYTHON:-python}" -m megalith launch --hostfile "$HOSTFILE" pretrain gpt \
    --recipe "$RECIPE" \
    --data-path "$DATA_PATH" \
    --vocab-file "$VOCAB_FILE" \
    --merge-file "$MERGE_FILE" \
    --save "$CHECKPOINT_PATH" \
    --load "$CHECKPOINT_PATH" \
    "$@"
