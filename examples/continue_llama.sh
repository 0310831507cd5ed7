#!/usr/bin/env bash
# Continued training of a Llama on your own text, from JSON lines to a Hugging Face folder: text to tokens, tokens to few
# files, a list of them with weights, weights in, training, weights out. docs/continue_llama.md explains each step.
# TEXT has a folder for each corpus, with files of JSON lines. Every setting below may be given as a variable:
#
#   LLAMA=TinyLlama-1.1B TEXT=text WORK=work EPOCHS="web: 1, books: 3" examples/continue_llama.sh --train-iters 1000
#
# Further arguments are passed to megalith pretrain. A step that was done is not done again, so that the same command
# resumes wherever it was stopped; STEPS="train export" runs these steps alone.
set -euo pipefail

LLAMA=${LLAMA:?Hugging Face folder of a Llama: config.json, safetensors, tokenizer files}
TEXT=${TEXT:?folder with a folder of .jsonl files for each corpus}
WORK=${WORK:?folder of all that is made}
EPOCHS=${EPOCHS-}               # how often each corpus is read, as in "web: 1, books: 3"; once each if it is empty
STEPS=${STEPS:-tokens merge weights import train export}
WORKERS=${WORKERS:-2}           # processes that make tokens
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
TENSOR=${TENSOR:-1}             # --tensor-model-parallel-size
SEQ_LENGTH=${SEQ_LENGTH:-2048}
MICRO_BATCH=${MICRO_BATCH:-1}
GLOBAL_BATCH=${GLOBAL_BATCH:-64}
TRAIN_ITERS=${TRAIN_ITERS:-1000}
LR=${LR:-2e-5}
PRECISION=${PRECISION---bf16}   # PRECISION= for float32, as CPUs want it

megalith() { "${PYTHON:-python}" -m megalith "$@"; }
wanted() { [[ " $STEPS " == *" $1 "* ]]; }
mkdir -p "$WORK"

if wanted tokens; then # 1: each file of text becomes a shard
    for file in "$TEXT"/*/*.jsonl; do
        corpus=$(basename "$(dirname "$file")")
        shard=$WORK/tokens/$corpus/$(basename "$file" .jsonl)
        [[ -e ${shard}_text_document.idx ]] || megalith data preprocess --input "$file" --output-prefix "$shard" \
            --append-eod --workers "$WORKERS" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$LLAMA"
    done
fi
if wanted merge; then # 2: few files; what comes before the last - is the corpus
    for folder in "$WORK"/tokens/*/; do
        merged=$WORK/merged/$(basename "$folder")-0000_text_document
        [[ -e $merged.idx ]] || megalith data merge --input "$folder" --output-prefix "$merged"
    done
fi
if wanted weights && [[ ! -e $WORK/data_list.txt ]]; then # 2: a list with weights
    epochs=()
    if [[ -n $EPOCHS ]]; then
        printf '{%s}\n' "$EPOCHS" >"$WORK/epochs.yaml"
        epochs=(--epochs "$WORK/epochs.yaml")
    fi
    megalith data weights --input "$WORK/merged" ${epochs[@]+"${epochs[@]}"} --output "$WORK/data_list.txt"
fi
if wanted import && [[ ! -e $WORK/llama ]]; then # 3: weights, which fit any layout
    megalith checkpoint import "$LLAMA" "$WORK/llama"
fi
if wanted train; then # 4
    # shellcheck disable=SC2086 # an empty PRECISION is no argument
    megalith launch --nproc-per-node "$GPUS_PER_NODE" pretrain gpt --use-checkpoint-args \
        --load "$WORK/llama" --save "$WORK/run" --finetune \
        --data-file-list "$WORK/data_list.txt" --split 98,2,0 --seq-length "$SEQ_LENGTH" \
        --tensor-model-parallel-size "$TENSOR" $PRECISION \
        --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH" --train-iters "$TRAIN_ITERS" \
        --lr "$LR" --lr-decay-style cosine --lr-warmup-fraction 0.01 --weight-decay 0.1 --adam-beta2 0.95 \
        --eval-interval 100 --eval-iters 2 --save-interval 100 --log-interval 10 "$@"
fi
if wanted export && [[ ! -e $WORK/llama-continued ]]; then # 5: back to Hugging Face
    megalith checkpoint export "$WORK/run" "$WORK/llama-continued" --to huggingface
fi
