# shellcheck shell=bash disable=SC2034,SC2154 # the variables are those of the scripts that source this file
# What the pretrain_*.sh scripts have in common: how processes are started, and the flags that every model takes.
# `launch MODEL FLAG ...` runs `megalith pretrain MODEL` in one process, or in GPUS_PER_NODE x NUM_NODES by torchrun.

COMMON=(
    --tensor-model-parallel-size "$TENSOR"
    --pipeline-model-parallel-size "$PIPELINE"
    --micro-batch-size "$MICRO_BATCH"
    --global-batch-size "$GLOBAL_BATCH"
    --train-iters "$TRAIN_ITERS"
    --min-lr 1.0e-5
    --lr-warmup-fraction .01
    --weight-decay 1e-2
    --clip-grad 1.0
    --data-path "$DATA_PATH"
    --vocab-file "$VOCAB_FILE"
    --split "949,50,1"
    --log-interval 100
    --save-interval 10000
    --eval-interval 1000
    --eval-iters 10
    --save "$CHECKPOINT_PATH"
    --load "$CHECKPOINT_PATH"
)

launch() {
    local start=("${PYTHON:-python}")
    if ((GPUS_PER_NODE * NUM_NODES > 1)); then
        start+=(
            -m torch.distributed.run
            --nproc-per-node "$GPUS_PER_NODE"
            --nnodes "$NUM_NODES"
            --node-rank "$NODE_RANK"
            --master-addr "$MASTER_ADDR"
            --master-port "$MASTER_PORT"
        )
    fi
    # shellcheck disable=SC2086 # an empty PRECISION is no argument
    exec "${start[@]}" -m megalith pretrain "$1" "${COMMON[@]}" $PRECISION "${@:2}"
}
