# Two images (docs/containers.md):
#   docker build --target cpu --tag xdlm_megatron:cpu .    # the quickstart
#   docker build --tag xdlm_megatron:gpu .                 # CUDA 13.0, Transformer Engine, apex, our kernels
# Bases are pinned by digest; versions of Python packages are in constraints/.
ARG PYTHON_IMAGE=python:3.11.16-slim-bookworm@sha256:528257d48c1da0dcecc2e725d1ae34498d60c965f1241e39cd6a85a8859bdf84
ARG CUDA_BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04@sha256:5dc1bca23d05bd37b011be68ec470c03b403a5da07ec3a86e41af9470e9d0cc6
ARG CUDA_IMAGE=nvidia/cuda:13.0.2-base-ubuntu24.04@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701

# ---- cpu: the quickstart, and everything but GPUs
FROM ${PYTHON_IMAGE} AS cpu
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY setup.py pyproject.toml README.md ./
COPY constraints constraints
COPY xdlm_megatron xdlm_megatron
RUN XDLM_BUILD_KERNELS=0 python -m pip install --no-cache-dir --constraint constraints/cpu.txt .
RUN useradd --create-home --uid 10001 xdlm && install --directory --owner xdlm /xdlm
USER 10001
WORKDIR /xdlm
COPY --chown=xdlm tools tools
COPY --chown=xdlm examples examples
HEALTHCHECK --interval=5m --timeout=1m \
  CMD ["python", "-m", "xdlm_megatron", "show-config", "examples/quickstart.yaml"]
CMD ["bash", "tools/quickstart.sh"]

# ---- kernels: a wheel with our CUDA kernels in it, for any Python and torch
FROM ${CUDA_BUILD_IMAGE} AS kernels
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0a;10.0+PTX"
RUN apt-get update && apt-get install --yes --no-install-recommends g++ python3 python3-venv \
  && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/build
WORKDIR /src
COPY setup.py pyproject.toml README.md ./
COPY xdlm_megatron xdlm_megatron
RUN XDLM_BUILD_KERNELS=1 /opt/build/bin/python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# ---- build: torch, and what must be compiled against it
FROM ${CUDA_BUILD_IMAGE} AS build
ARG TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0+PTX"
ARG MAX_JOBS=8
ARG APEX_TAG=25.09
ARG APEX_COMMIT=4bdecd06b3c4b2c0a8fb6603829a8f9f05a42b49
RUN apt-get update \
  && apt-get install --yes --no-install-recommends ca-certificates g++ git python3 python3-dev python3-venv \
  && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/xdlm
ENV PATH=/opt/xdlm/bin:${PATH}
WORKDIR /src
COPY constraints/gpu.txt constraints/gpu.txt
RUN python -m pip install --no-cache-dir --constraint constraints/gpu.txt torch numpy "setuptools<82" wheel ninja packaging
# A tag can be moved, a commit cannot. nvcc's version must be that of torch's CUDA, as it is in this base. The tag
# names Volta whatever the list of architectures says, and CUDA 13 has none older than Turing.
RUN git clone --quiet --branch "${APEX_TAG}" --depth 1 https://github.com/NVIDIA/apex /src/apex \
  && test "$(git -C /src/apex rev-parse HEAD)" = "${APEX_COMMIT}" \
  && sed --in-place 's/compute_70,code=sm_70/compute_75,code=sm_75/' /src/apex/setup.py \
  && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 python -m pip install --no-cache-dir --no-deps --no-build-isolation /src/apex \
  && python -c "import torch, amp_C, fused_weight_gradient_mlp_cuda"
COPY tools/build_te_extension.sh tools/build_te_extension.sh
RUN bash tools/build_te_extension.sh /wheels \
  && python -m pip install --no-cache-dir --constraint constraints/gpu.txt --find-links /wheels "transformer-engine[core-cu13,pytorch]"
COPY --from=kernels /wheels /wheels
RUN python -m pip install --no-cache-dir --constraint constraints/gpu.txt --find-links /wheels xdlm_megatron pytest pytest-xdist \
  && python -c "import torch, transformer_engine.pytorch, megatron.core"

# ---- gpu: the default
FROM ${CUDA_IMAGE} AS gpu
# gcc and Python's headers: Triton compiles its launchers with them.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev make python3 python3-dev \
  && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 xdlm && install --directory --owner xdlm /xdlm
COPY --from=build /opt/xdlm /opt/xdlm
ENV PATH=/opt/xdlm/bin:${PATH}
USER 10001
# Without the package's sources, so that Python finds the installed one, whose kernels are compiled.
WORKDIR /xdlm
COPY --chown=xdlm Makefile pyproject.toml ./
COPY --chown=xdlm tools tools
COPY --chown=xdlm examples examples
COPY --chown=xdlm slurm slurm
COPY --chown=xdlm benchmarks benchmarks
COPY --chown=xdlm tests tests
HEALTHCHECK --interval=5m --timeout=1m \
  CMD ["bash", "-c", "nvidia-smi --list-gpus && python -m xdlm_megatron show-config examples/xdlm_1b.yaml"]
CMD ["make", "gpu-suite"]
