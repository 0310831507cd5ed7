#!/usr/bin/env bash
# A GPT or Llama on a PBS cluster, such as those of Argonne's ALCF: writes a job script, and sends it with --submit.
# Every setting below may be given as a variable:
#
#   DATA_FILE_LIST=data_list.txt TOKENIZER=tokenizer.model CHECKPOINT_PATH=checkpoints/llama PROJECT=my-project \
#       QUEUE=prod NUM_NODES=2 GPUS_PER_NODE=12 DIRECTIVE='-l filesystems=home:flare' \
#       MODULES=frameworks VENV=$PWD/venv PROXY=http://proxy.alcf.anl.gov:3128 examples/pretrain_gpt_pbs.sh --submit
#
# Arguments are passed to `megalith launch`: --submit, --dry-run (which prints the job script), --overwrite. The job is
# stopped before its time limit, saves, is sent again, and resumes. TRAIN_FLAGS are flags of megalith pretrain.
set -euo pipefail

CHECKPOINT_PATH=${CHECKPOINT_PATH:?folder of checkpoints, and of the record of the run}
TOKENIZER=${TOKENIZER:?tokenizer.model of Llama 2}
DATA_FILE_LIST=${DATA_FILE_LIST:?list with weights, of megalith data weights}

NUM_NODES=${NUM_NODES:-2}
GPUS_PER_NODE=${GPUS_PER_NODE:-4}
TIME=${TIME:-1:00:00}
RECIPE=${RECIPE:-llama-3-8b}

job=(--pbs --time "$TIME" --nnodes "$NUM_NODES" --nproc-per-node "$GPUS_PER_NODE")
[[ -z ${PROJECT-} ]] || job+=(--project "$PROJECT")
[[ -z ${QUEUE-} ]] || job+=(--queue "$QUEUE")
[[ -z ${SELECT-} ]] || job+=(--select "$SELECT")
[[ -z ${DIRECTIVE-} ]] || job+=("--directive=$DIRECTIVE")
[[ -z ${MODULES-} ]] || job+=(--modules "$MODULES")
[[ -z ${VENV-} ]] || job+=(--venv "$VENV")
[[ -z ${PROXY-} ]] || job+=(--proxy "$PROXY")
[[ -z ${ENV_FILE-} ]] || job+=(--env-file "$ENV_FILE")

# shellcheck disable=SC2086 # several flags are several words
exec "${PYTHON:-python}" -m megalith launch "${job[@]}" "$@" pretrain gpt \
    --recipe "$RECIPE" \
    --data-file-list "$DATA_FILE_LIST" \
    --tokenizer-type Llama2Tokenizer \
    --tokenizer-model "$TOKENIZER" \
    --save "$CHECKPOINT_PATH" \
    --load "$CHECKPOINT_PATH" \
    ${TRAIN_FLAGS-}
