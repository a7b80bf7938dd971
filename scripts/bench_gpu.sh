#!/usr/bin/env bash
# Measures the models on an NVIDIA GPU, in bf16, beside transformers there (as it is, and compiled): scripts/bench_gpu.sh [work ...], works
# caption-base, caption-large, score-base, score-large and clip-large. It says images a second, the ratio, the share of what the GPU could do
# at best, and how long the GPU was idle; the JSON is kept in target/bench/gpu-<work>.jsonl.
#
# Needs the CUDA toolkit (nvcc) and, in TRANSFORMERS_PYTHON, a Python whose torch sees the GPU and that has transformers; `scripts/setup.sh
# goldens` makes one in .venv-goldens. Without it ours runs alone. What can be set:
#
#     CUDA_VISIBLE_DEVICES=1      another GPU than the first
#     BENCH_BATCHES=32,64,128     batch sizes to try; the best is measured
#     BENCH_SECONDS=5             how long a measurement takes at least
#     GPU_TFLOPS=312 GPU_TBPS=2   the GPU's dense bf16 rate and its memory's, where its name is unknown (benches/models/gpu.rs)
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { echo "bench_gpu: $*" >&2 && exit 1; }
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
command -v nvidia-smi >/dev/null || fail "there is no nvidia-smi: this needs an NVIDIA GPU and its driver"
command -v nvcc >/dev/null || export PATH="${CUDA_HOME:-/usr/local/cuda}/bin:$PATH"
command -v nvcc >/dev/null || fail "there is no nvcc: install the CUDA toolkit, or name its folder in CUDA_HOME"

# CUDA then counts GPUs as nvidia-smi does.
export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
cap=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id="${CUDA_VISIBLE_DEVICES%%,*}")
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-${cap/./}}
[ "$CUDA_COMPUTE_CAP" -ge 80 ] || fail "compute capability $cap has no bf16; 8.0 (Ampere) or newer is needed"
if [ -z "${TRANSFORMERS_PYTHON+set}" ] && [ -x .venv-goldens/bin/python ]; then
  export TRANSFORMERS_PYTHON=$PWD/.venv-goldens/bin/python
fi
if [ -n "${TRANSFORMERS_PYTHON:-}" ]; then
  "$TRANSFORMERS_PYTHON" -c 'import sys, torch, transformers; sys.exit(not torch.cuda.is_available())' \
    || fail "$TRANSFORMERS_PYTHON has no torch that sees the GPU, or no transformers; set TRANSFORMERS_PYTHON= to do without the peer"
else
  unset TRANSFORMERS_PYTHON
fi

cargo bench --package capfilt-models --features cuda --locked --bench models -- gpu "$@"
