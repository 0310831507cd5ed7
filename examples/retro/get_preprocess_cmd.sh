# shellcheck shell=bash disable=SC2034 # the variables are those of the scripts that source this file
# The flags of `megalith retro`, and those of the GPT's data that `megalith pretrain retro` must have too, because
# neighbours belong to samples. Set the paths; every other setting may be given as a variable.

RETRO_WORKDIR=${RETRO_WORKDIR:?folder of the database, the index and the neighbours}
DATA_PATH=${DATA_PATH:?indexed dataset without its extension, as in my-gpt2_text_document, or weights and datasets}
VOCAB_FILE=${VOCAB_FILE:?vocabulary of the GPT, a JSON file}
MERGE_FILE=${MERGE_FILE:?merge table of the GPT}
BERT_LOAD_PATH=${BERT_LOAD_PATH:?a BERT with its tokenizer: a Hugging Face folder, a run or a checkpoint}

SEQ_LENGTH=${SEQ_LENGTH:-2048}
CHUNK_LENGTH=${CHUNK_LENGTH:-64}
SPLIT=${SPLIT:-969,30,1}
SEED=${SEED:-1234}
GLOBAL_BATCH=${GLOBAL_BATCH:-256}
TRAIN_SAMPLES=${TRAIN_SAMPLES:-200000}
EVAL_INTERVAL=${EVAL_INTERVAL:-2000}
EVAL_ITERS=${EVAL_ITERS:-100}

BERT_BATCH=${BERT_BATCH:-128}
BERT_LENGTH=${BERT_LENGTH:-256}               # tokens that the BERT reads of a chunk
INDEX_STRING=${INDEX_STRING-IVF4096,Flat}     # INDEX_STRING= searches exactly, without FAISS
INDEX_TRAIN=${INDEX_TRAIN:-1000000}           # vectors that the index is trained on
NEIGHBORS_QUERY=${NEIGHBORS_QUERY:-200}       # found, of which those of the own documents are left out
NEIGHBORS_TARGET=${NEIGHBORS_TARGET:-20}      # kept
PRECISION=${PRECISION---bf16}                 # of the BERT; PRECISION= for float32

# shellcheck disable=SC2206 # weights and datasets are several words
RETRO_GPT_ARGS=(
    --data-path $DATA_PATH
    --tokenizer-type GPT2BPETokenizer
    --vocab-file "$VOCAB_FILE"
    --merge-file "$MERGE_FILE"
    --split "$SPLIT"
    --seed "$SEED"
    --seq-length "$SEQ_LENGTH"
    --global-batch-size "$GLOBAL_BATCH"
    --train-samples "$TRAIN_SAMPLES"
    --eval-interval "$EVAL_INTERVAL"
    --eval-iters "$EVAL_ITERS"
)
# shellcheck disable=SC2206 # an empty PRECISION is no argument
RETRO_PREPROCESS_ARGS=(
    "${RETRO_GPT_ARGS[@]}"
    --retro-workdir "$RETRO_WORKDIR"
    --retro-gpt-chunk-length "$CHUNK_LENGTH"
    --load "$BERT_LOAD_PATH"
    --retro-bert-batch-size "$BERT_BATCH"
    --retro-bert-max-chunk-length "$BERT_LENGTH"
    --retro-index-ntrain "$INDEX_TRAIN"
    --retro-query-num-neighbors-query "$NEIGHBORS_QUERY"
    --retro-query-num-neighbors-save "$NEIGHBORS_TARGET"
    $PRECISION
)
if [[ -n $INDEX_STRING ]]; then
    RETRO_PREPROCESS_ARGS+=(--retro-index-str "$INDEX_STRING")
fi
