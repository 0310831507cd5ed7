# shellcheck shell=bash disable=SC2034,SC2154 # the variables are those of the scripts that source this file
# What the pretrain_*.sh and finetune_*.sh scripts have in common: how processes are started, `run_megalith VERB FLAG ...`
# in one process, or in GPUS_PER_NODE x NUM_NODES by torchrun; and, for pretrain_*.sh, the flags that every model takes:
# `launch MODEL FLAG ...` runs `megalith pretrain MODEL` so.

run_megalith() {
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
    exec "${start[@]}" -m megalith "$@"
}

launch() {
    local common=(
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
    # shellcheck disable=SC2086 # an empty PRECISION is no argument
    run_megalith pretrain "$1" "${common[@]}" $PRECISION "${@:2}"
}
