#!/usr/bin/env bash
# LoRA on chats (docs/finetune.md): a Hugging Face folder with a chat template in, adapters as peft has them out.
# Set the three paths. Every setting below may be given as a variable too, and further arguments are passed to megalith,
# where later flags win:
#
#   MODEL=Llama-3-8B TRAIN_DATA=chats.jsonl CHECKPOINT_PATH=runs/chat examples/finetune_chat.sh --valid-data valid.jsonl
#
# GPUS_PER_NODE=8 starts eight processes, TENSOR=2 splits each layer between two of them. The same command resumes.
set -euo pipefail

MODEL=${MODEL:?folder of a Hugging Face model, or any other checkpoint that --load takes}
TRAIN_DATA=${TRAIN_DATA:?file of chats in JSON lines}
CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run}

GPUS_PER_NODE=${GPUS_PER_NODE:-1}
MASTER_PORT=${MASTER_PORT:-6000}
TENSOR=${TENSOR:-1} # --tensor-model-parallel-size
SEQ_LENGTH=${SEQ_LENGTH:-2048}
MICRO_BATCH=${MICRO_BATCH:-1}
GLOBAL_BATCH=${GLOBAL_BATCH:-32}
EPOCHS=${EPOCHS:-3}
PRECISION=${PRECISION---bf16} # PRECISION= for float32

PYTHON=${PYTHON:-python}
start=("$PYTHON")
if ((GPUS_PER_NODE > 1)); then
    start+=(-m torch.distributed.run --nproc-per-node "$GPUS_PER_NODE" --master-port "$MASTER_PORT")
fi
# shellcheck disable=SC2086 # an empty PRECISION is no argument
"${start[@]}" -m megalith finetune chat \
    --pretrained-checkpoint "$MODEL" \
    --use-checkpoint-args \
    --train-data "$TRAIN_DATA" \
    --seq-length "$SEQ_LENGTH" \
    --epochs "$EPOCHS" \
    --micro-batch-size "$MICRO_BATCH" \
    --global-batch-size "$GLOBAL_BATCH" \
    --tensor-model-parallel-size "$TENSOR" \
    --lora-rank 16 \
    --lora-alpha 32 \
    --lora-dropout 0.05 \
    --lr 2e-4 \
    --lr-decay-style cosine \
    --lr-warmup-fraction 0.03 \
    --save "$CHECKPOINT_PATH" \
    $PRECISION "$@"
"$PYTHON" -m megalith checkpoint export "$CHECKPOINT_PATH" "$CHECKPOINT_PATH-peft" --to peft --overwrite
