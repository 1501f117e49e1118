#!/usr/bin/env bash
# The first half hour on a GPU: is it right, which format and which split win, what does a model gain.
# Usage: benchmarks/gpu_checklist.sh [ARTIFACT]    (writes gpu_*.json and gpu_*.log into the current directory)
set -euo pipefail
python=${PYTHON:-.venv/bin/python}

echo "== 1. numerics on the device, against float64"
$python -m pytest -m gpu tests/runtimes/triton tests/runtimes/onnxruntime | tee gpu_tests.log

echo "== 2. illegal addresses, races and uninitialised reads (compute-sanitizer comes with the CUDA toolkit)"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck initcheck; do
        # Every tensor gets an allocation of its own, so that a read beyond it is seen.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" tests/runtimes/triton/cases.py cuda >"gpu_$tool.log"
    done
else
    echo "compute-sanitizer is not on PATH: skipped"
fi

echo "== 3. formats, splits and batches, layer by layer; the best choice is written to the runtime's table"
$python -m benchmarks.gpu_layers --json gpu_layers.json --tune | tee gpu_layers.log

if [ $# -gt 0 ]; then
    echo "== 4. a whole model: prefill, decode, memory"
    $python -m trim_export bench "$1" --device cuda --batch 1 --batch 8 --json gpu_bench.json | tee gpu_bench.log
fi
