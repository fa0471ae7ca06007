"""What is installed, what this machine is; builds the kernels for its GPU, so that later parts find them."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
import subprocess
import time

import torch

from gpu_parts.findings import Findings, part_parser
from xdlm_megatron.kernels.build import find_nvcc
from xdlm_megatron.kernels.library import load_cuda, load_host
from xdlm_megatron.train.provenance import git_commit

# Distribution, module that must import, what for.
NEEDED = (
    ("megatron-core", "megatron.core", "the model and its optimizer"),
    ("numpy", "numpy", "data"),
)
OPTIONAL = (
    ("transformer-engine", "transformer_engine.pytorch", "fused layers, FP8"),
    ("apex", "amp_C", "NVIDIA's: multi-tensor kernels"),
    ("apex", "fused_weight_gradient_mlp_cuda", "NVIDIA's: gradient accumulation in the weight's product"),
    ("triton", "triton", "torch.compile"),
    ("liger-kernel", "liger_kernel", "a rival in kernel_nelbo"),
    ("pytest", "pytest", "the part parity"),
)


def main() -> None:
    args = part_parser(__doc__).parse_args()
    found = Findings(args.out, "versions", "Versions, and the kernels built")
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no GPU; rehearse with --device cpu --tiny")
    device = torch.cuda.get_device_name() if not args.tiny else f"CPU ({platform.machine()})"
    found.fact(device=device, identity=identity(device))
    if not args.tiny:
        describe_gpu(found)
    found.row("Packages", package="python", version=platform.python_version(), what="")
    for name, module, what in (("torch", "torch", ""), *NEEDED):
        found.row("Packages", package=name, version=version(name), what=what)
        importlib.import_module(module)
    for name, module, what in OPTIONAL:
        found.row("Packages", package=f"{name}: {module}", version=state(name, module), what=what)
    began = time.perf_counter()
    library = load_cuda(*torch.cuda.get_device_capability()) if not args.tiny else load_host()
    seconds = round(time.perf_counter() - began, 1)
    found.row("Kernels", library=library.path.name, seconds=seconds, nvcc=nvcc_release())


def identity(device: str) -> dict[str, str]:
    """What two reports must share for their parts to stand in one."""
    names = ("torch", "megatron-core", "transformer-engine")
    versions = {name: version(name) for name in names}
    return {"device": device, **versions, "commit": git_commit() or "unknown"}


def version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def state(distribution: str, module: str) -> str:
    """Its version if it imports, else why it does not: a broken build says so here."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"no: {type(error).__name__}: {error}"
    return version(distribution)


def describe_gpu(found: Findings) -> None:
    gpu = torch.cuda.get_device_properties(0)
    rows = {
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory, GiB": round(gpu.total_memory / 2**30, 1),
        "CUDA of torch": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version(),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": driver(),
        "GPUs": torch.cuda.device_count(),
    }
    for name, value in rows.items():
        found.row("GPU", what=name, value=value)


def driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout.strip() or done.stderr.strip() or "unknown").splitlines()[0]


def nvcc_release() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        return "none"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, timeout=20, check=False)
    return next((line.strip() for line in done.stdout.splitlines() if "release" in line), "unknown")


if __name__ == "__main__":
    main()
