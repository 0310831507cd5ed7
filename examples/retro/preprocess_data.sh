#!/usr/bin/env bash
# What Retro reads beside its data: the chunk database, its index, and the neighbours of every sample. Set the paths that
# get_preprocess_cmd.sh names; further arguments are passed to megalith, where later flags win:
#
#   RETRO_WORKDIR=retro DATA_PATH=my-gpt2_text_document VOCAB_FILE=vocab.json MERGE_FILE=merges.txt \
#       BERT_LOAD_PATH=bert-large-cased examples/retro/preprocess_data.sh
#
# RETRO_TASKS="index neighbors" runs these steps alone. GPUS_PER_NODE=8 starts eight processes for them; the step db is
# one process that starts WORKERS. On several machines run db on one of them first, then the other steps on each, with
# MASTER_ADDR (the first machine's name), NUM_NODES and NODE_RANK (0, 1, ...) set. A step that was stopped is resumed.
set -euo pipefail

RETRO_TASKS=${RETRO_TASKS:-db index neighbors}
WORKERS=${WORKERS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
NUM_NODES=${NUM_NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-6000}

here=$(dirname "${BASH_SOURCE[0]}")
source "$here/get_preprocess_cmd.sh"
source "$here/../common.sh"

for step in $RETRO_TASKS; do
    if [[ $step == db ]]; then
        (
            GPUS_PER_NODE=1 NUM_NODES=1
            run_megalith retro db "${RETRO_PREPROCESS_ARGS[@]}" --workers "$WORKERS" "$@"
        )
    else
        (run_megalith retro "$step" "${RETRO_PREPROCESS_ARGS[@]}" "$@")
    fi
done
