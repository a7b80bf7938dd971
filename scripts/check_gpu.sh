#!/usr/bin/env bash
# Checks the features that CI does not build, on a machine without a GPU.
#
#     scripts/check_gpu.sh        type-checks the program with `cuda`, `cudnn` and `mkl`. candle's build scripts ask for nvcc and MKL, whose
#                                 results no type depends on: stand-ins answer, so nothing is downloaded, and no kernel is compiled
#     scripts/check_gpu.sh link   compiles candle's kernels and links the bench of the models. nvcc and the CUDA libraries come from the
#                                 Python package index into .venv-cuda (2 GB) unless nvcc is here, libcuda is a stand-in; some ten minutes
#
# Both build in target/check-gpu, apart from what runs.
set -euo pipefail
cd "$(dirname "$0")/.."
command -v cargo >/dev/null || export PATH="$HOME/.cargo/bin:$PATH"
fail() { echo "check_gpu: $*" >&2 && exit 1; }
step() { echo && echo "== $*" && "$@"; }
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}/check-gpu
export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-90}
stand_ins=$CARGO_TARGET_DIR/stand-ins
mkdir -p "$stand_ins"

types() {
  mkdir -p "$stand_ins"/{bin,mkl/include,mkl/lib}
  cat >"$stand_ins/bin/nvcc" <<'NVCC'
#!/usr/bin/env bash
# Says which version it is, and writes an empty file where a result is wanted.
case "$*" in
  *--version*) printf 'nvcc\n\n\nCuda compilation tools, release 13.0, V13.0.88\n' ;;
  *--list-gpu-code*) printf 'sm_%s\n' 80 86 89 90 100 120 ;;
esac
while [ $# -gt 0 ]; do
  case "$1" in
    -o) : >"$2" && shift ;;
    --output-directory) folder=$2 && shift ;;
    *.cu) source=$1 ;;
  esac
  shift
done
[ -z "${folder:-}" ] || : >"$folder/$(basename "${source%.cu}").ptx"
NVCC
  chmod +x "$stand_ins/bin/nvcc"
  touch "$stand_ins"/mkl/include/mkl.h "$stand_ins"/mkl/lib/{libmkl_core.a,libmkl_intel_lp64.a,libiomp5.a}
  for feature in cuda cudnn mkl; do
    PATH=$stand_ins/bin:$PATH NVCC=$stand_ins/bin/nvcc MKLROOT=$stand_ins/mkl step cargo check --package capfilt --locked --features "$feature"
  done
}

link() {
  if ! command -v nvcc >/dev/null; then
    wanted=(nvidia-{cuda-nvcc,cuda-crt,nvvm,cuda-runtime,cuda-cccl,cuda-nvrtc,cublas}==13.0.* nvidia-curand==10.4.0.*)
    if [ "${wanted[*]}" != "$(cat .venv-cuda/filled 2>/dev/null)" ]; then
      rm -rf .venv-cuda
      python3 -m venv .venv-cuda
      step .venv-cuda/bin/python -m pip install --quiet --disable-pip-version-check "${wanted[@]}"
      echo "${wanted[*]}" >.venv-cuda/filled
    fi
    CUDA_HOME=$(echo "$PWD"/.venv-cuda/lib/python3.*/site-packages/nvidia/cu13)
    export CUDA_HOME CUDA_PATH=$CUDA_HOME PATH=$CUDA_HOME/bin:$PATH
    # Wheels hold what programs open, not what linkers look for.
    ln -sfn lib "$CUDA_HOME/lib64"
    for library in "$CUDA_HOME"/lib/lib{cudart,cublas,cublasLt,nvrtc,curand}.so.*; do
      ln -sf "$(basename "$library")" "${library%.so.*}.so"
    done
    RUSTFLAGS="-L native=$CUDA_HOME/lib"
  fi
  cargo fetch --locked --quiet
  # All functions of the driver that candle could call, empty.
  grep -oh 'fn cu[A-Z][A-Za-z0-9_]*' "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/cudarc-*/src/driver/sys/mod.rs | sort -u \
    | sed 's/fn \(.*\)/void \1(void) {}/' | cc -shared -Wl,-soname,libcuda.so.1 -x c - -o "$stand_ins/libcuda.so"
  export RUSTFLAGS="${RUSTFLAGS:-} -L native=$stand_ins"
  step cargo bench --package capfilt-models --locked --features cuda --bench models --no-run
}

case "${1:-types}" in
  types | link) "${1:-types}" ;;
  *) fail "there is no '$1'; use nothing or link" ;;
esac
