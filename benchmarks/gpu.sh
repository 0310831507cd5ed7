#!/usr/bin/env bash
# All that needs one accelerator, in under ten minutes: GPU tests, training speed and MFU, decoding speed. Logs go to
# benchmarks/results/ (or $OUT). From the repository root; PYTHON names a Python that has torch for the device.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} RESULTS=${OUT:-benchmarks/results}
mkdir -p "$RESULTS"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
name=$($PYTHON -c 'import torch; print(torch.get_device_module().get_device_name(0).replace(" ", "-"))') || exit 1

{
    $PYTHON -c 'import platform, torch; print(torch.get_device_module().get_device_name(0), "torch", torch.__version__, platform.platform())'
    $PYTHON -m pytest -q -m gpu tests
} 2>&1 | tee "$RESULTS/gpu-tests-$name.txt"

train() {  # name, layers, hidden, heads, batch; sequence 2048, bf16, torch.compile; peers beside it
    echo "== $1"
    $PYTHON benchmarks/train.py --device cuda --dtype bfloat16 --sequence 2048 --num-layers "$2" --hidden-size "$3" --heads "$4" \
        --batch "$5" --steps 8 --rounds 1 --candidates "${@:6}"
}
{
    train 345M 24 1024 16 8 megalith-compile hf-compile limit
    train 1.3B 24 2048 16 8 megalith-compile hf-compile limit
    train 2.7B 32 2560 32 4 megalith-compile limit
} 2>&1 | tee "$RESULTS/gpu-train-$name.txt"

$PYTHON benchmarks/generate.py --device cuda --dtype bfloat16 --num-layers 24 --hidden-size 2048 --heads 16 --rows 1 8 64 --compile 2>&1 |
    tee "$RESULTS/gpu-generate-$name.txt"
