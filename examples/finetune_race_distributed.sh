#!/usr/bin/env bash
# A BERT finetuned on RACE (Lai et al., 2017), as Megatron-LM's script of this name, in one process, on all GPUs of a
# machine, or on several machines. Set the paths. Every setting, here and in finetune_common.sh, may be given as a
# variable, and further arguments are passed to megalith, where later flags win:
#
#   TRAIN_DATA=RACE/train/middle VALID_DATA='RACE/dev/middle RACE/dev/high' VOCAB_FILE=bert-vocab.txt \
#       PRETRAINED_CHECKPOINT=checkpoints/bert_345m CHECKPOINT_PATH=checkpoints/bert_345m_race \
#       GPUS_PER_NODE=8 examples/finetune_race_distributed.sh
#
# Batches are counted in questions; each is four sequences, one for each option.
set -euo pipefail

TRAIN_DATA=${TRAIN_DATA:?folder of .txt files of RACE}
VALID_DATA=${VALID_DATA:?folders of .txt files, each measured by name}
MICRO_BATCH=${MICRO_BATCH:-4}

source "$(dirname "${BASH_SOURCE[0]}")/finetune_common.sh"

finetune race \
    --epochs "${EPOCHS:-3}" \
    --lr 1.0e-5 \
    --lr-warmup-fraction 0.06 \
    "$@"
