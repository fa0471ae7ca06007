#!/usr/bin/env bash
# Builds Transformer Engine's PyTorch extension, which is published as source only, for the torch of the
# `python` on the PATH, into a wheel. C++ alone: no nvcc, no GPU; about half an hour of CPU time.
#
#   tools/build_te_extension.sh WHEELS [VERSION]     WHEELS: folder of the wheel; VERSION: constraints/gpu.txt's
#
# Installs what the build needs beside that torch, among it CUDA's headers. MAX_JOBS: compilers at once.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[[ $# -ge 1 ]] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; }
wheels=$(realpath -m "$1")
version=${2:-$(sed -n 's/^transformer-engine-torch==//p' "$root/constraints/gpu.txt")}

cuda=$(python -c 'import torch; print(torch.version.cuda)') ||
  { echo "error: the python on the PATH has no torch; install the cluster's version of it first" >&2; exit 2; }
[[ $cuda == 13.* ]] ||
  { echo "error: torch is built for CUDA $cuda; headers are taken from CUDA 13's packages: take a torch for 13" >&2; exit 2; }
python -m pip install --quiet 'setuptools<82' wheel ninja pybind11 packaging "nvidia-cuda-crt==$cuda.*" "nvidia-cuda-cccl==$cuda.*"
include=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13/include

# FORCE_BUILD: else it asks GitHub for a wheel first. NCCL_EP wants a newer NCCL than torch brings.
export NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0
export CPATH="$include:$include/cccl${CPATH:+:$CPATH}"
# --no-cache-dir: pip would take a wheel that it built for another torch before.
python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --no-binary transformer_engine_torch \
  --wheel-dir "$wheels" "transformer_engine_torch==$version"
