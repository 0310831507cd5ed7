#!/usr/bin/env bash
# A BERT finetuned on MultiNLI (Williams et al., 2018), as Megatron-LM's script of this name, in one process, on all GPUs
# of a machine, or on several machines. Set the paths. Every setting, here and in finetune_common.sh, may be given as a
# variable, and further arguments are passed to megalith, where later flags win:
#
#   TRAIN_DATA=MNLI/train.tsv VALID_DATA='MNLI/dev_matched.tsv MNLI/dev_mismatched.tsv' VOCAB_FILE=bert-vocab.txt \
#       PRETRAINED_CHECKPOINT=checkpoints/bert_345m CHECKPOINT_PATH=checkpoints/bert_345m_mnli \
#       GPUS_PER_NODE=8 examples/finetune_mnli_distributed.sh --epochs 3
#
# Another task of two sentences is its name in the last command: `finetune qqp`.
set -euo pipefail

TRAIN_DATA=${TRAIN_DATA:?train.tsv of MNLI}
VALID_DATA=${VALID_DATA:?dev_matched.tsv dev_mismatched.tsv, and test files, which are predicted}
MICRO_BATCH=${MICRO_BATCH:-8}

source "$(dirname "${BASH_SOURCE[0]}")/finetune_common.sh"

finetune mnli \
    --epochs "${EPOCHS:-5}" \
    --lr 5.0e-5 \
    --lr-warmup-fraction 0.065 \
    "$@"
