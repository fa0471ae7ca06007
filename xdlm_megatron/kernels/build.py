"""Compiles csrc/ to one shared library: by nvcc for GPUs, by g++ for the host (host_shim.h), into a cache.

    python -m xdlm_megatron.kernels.build cuda --arch sm_90a          # build it, print where it lies
    python -m xdlm_megatron.kernels.build report --arch sm_80 sm_90a  # registers and spills of every kernel

A library's name holds a hash of the sources and flags, so that no library is ever out of date, and the GPUs
it is for. One process of a machine builds while the others wait for it; the library is written aside and
renamed, so that nobody ever loads a part of one.

CUDA_HOME, where set, decides which nvcc is used; TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0+PTX") which GPUs an
ahead-of-time build is for, of those from 8.0 on; XDLM_KERNEL_CACHE where libraries are kept. Standard
library only.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["cuda", "host"]

HERE = Path(__file__).resolve().parent
CSRC = HERE / "csrc"
AHEAD_OF_TIME = HERE / "lib"  # where setup.py puts the library of an installed package
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
OLDEST = (8, 0)  # what is older has no bfloat16
FIRST_WITH_CLUSTERS = (9, 0)
COMPILE_MINUTES = 10


class BuildError(RuntimeError):
    """No library, and why, in one line."""


class KernelUsage(NamedTuple):
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    arch: str
    registers: int
    spill_bytes: int
    stack_bytes: int


def find_nvcc() -> str | None:
    """CUDA_HOME's if that is set, else the PATH's, else /usr/local/cuda's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin/nvcc"] if home else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((str(c) for c in candidates if c and os.access(c, os.X_OK)), None)


def find_cxx() -> str | None:
    """CXX if that is set, else g++."""
    return shutil.which(os.environ.get("CXX") or "g++")


def default_architectures() -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST in nvcc's spelling; else those of ARCHITECTURES that nvcc knows, the last also as
    PTX for later ones.

    Raises:
        BuildError: an item that is no compute capability, or none from 8.0 on.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if not given.strip():
        codes = _codes_of_nvcc()
        names = [arch for arch in ARCHITECTURES if arch.removesuffix("a") in codes] or list(ARCHITECTURES)
        return (*names, names[-1].replace("sm", "compute").removesuffix("a"))
    names, too_old = [], []
    for item in given.replace(";", " ").split():
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if found is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST={given!r}: {item!r} is no compute capability; "
                'name them as in "8.0;9.0a;10.0+PTX"'
            )
        major, minor, feature, ptx = found.groups()
        if (int(major), int(minor)) < OLDEST:
            too_old.append(item)
            continue
        names += [f"sm_{major}{minor}{feature}"] + ([f"compute_{major}{minor}{feature}"] if ptx else [])
    if not names:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST={given!r}: the kernels need a GPU of 8.0 or newer; name one")
    if too_old:
        print(f"CUDA kernels are not built for {', '.join(too_old)}: they need 8.0 or newer", file=sys.stderr)
    return tuple(names)


def _codes_of_nvcc() -> list[str]:
    """The GPUs that it compiles for, their variants ("a") left out; empty where it cannot be asked."""
    nvcc = find_nvcc()
    if nvcc is None:
        return []
    with contextlib.suppress(BuildError):
        return _run([nvcc, "--list-gpu-code"]).split()
    return []


def library_path(
    kind: Kind, archs: Sequence[str] = (), flags: Sequence[str] = (), folder: Path | None = None
) -> Path:
    """Where the library of the present sources belongs; by default in the cache."""
    digest = hashlib.sha256(" ".join(_command(kind, (), flags)[1:]).encode())
    for source in sorted(CSRC.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    name = "-".join([f"libxdlm_{kind}_{digest.hexdigest()[:16]}", *archs])
    return (folder or cache_folder()) / f"{name}.so"


def find_installed(major: int, minor: int, clusters: bool = True) -> Path | None:
    """The library that setup.py built of these sources, if it runs on GPUs of this compute capability.

    clusters: only one that uses the clusters of blocks of a GPU that has them. PTX for less than 9.0 runs
    there too, and is right, but does not.
    """
    stem = library_path("cuda").stem
    for path in sorted(AHEAD_OF_TIME.glob(f"{stem}-*.so")):
        archs = path.stem.removeprefix(stem).split("-")
        if any(_runs_on(arch, major, minor, clusters) for arch in archs):
            return path
    return None


def _runs_on(arch: str, major: int, minor: int, clusters: bool = True) -> bool:
    """Machine code runs within its major version, from its minor on; PTX also later. What ends in "a" runs
    there alone, in "f" within its major version.
    """
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if found is None:
        return False
    built, gpu = (int(found[2]), int(found[3])), (major, minor)
    if found[4] == "a":
        return built == gpu
    if clusters and built < FIRST_WITH_CLUSTERS <= gpu:
        return False
    return built <= gpu and (built[0] == major or (found[1] == "compute" and not found[4]))


def cache_folder() -> Path:
    """XDLM_KERNEL_CACHE, or xdlm_megatron in the user's cache folder."""
    if given := os.environ.get("XDLM_KERNEL_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xdlm_megatron"


def build(
    kind: Kind, archs: Sequence[str] = (), flags: Sequence[str] = (), folder: Path | None = None
) -> Path:
    """The library, compiled unless it is there.

    archs: "sm_90a" or, for PTX, "compute_90"; cuda only, default: default_architectures(). flags: the
    compiler's, more of them.

    Raises:
        BuildError: no compiler, or it failed.
    """
    archs = (tuple(archs) or default_architectures()) if kind == "cuda" else ()
    path = library_path(kind, archs, flags, folder)
    if path.exists():
        return path
    command = _command(kind, archs, flags)
    if not command[0]:
        raise BuildError(_no_compiler(kind))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        if path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=path.parent) as aside:
            whole = Path(aside) / path.name
            _run([*command, *map(str, sorted(CSRC.glob("*.cu"))), "-o", str(whole)])
            whole.replace(path)
    return path


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process of this machine at a time; without a wait where there are no such locks.

    The lock's file lies in the machine's own temporary folder: a shared file system may know no locks.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
            name = Path(tempfile.gettempdir()) / f"xdlm_megatron-{os.getuid()}-{digest}.lock"
            descriptor = os.open(name, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def report(archs: Sequence[str] = ARCHITECTURES, jobs: int = 2) -> list[KernelUsage]:
    """Compile every kernel for every architecture and keep nothing but what ptxas says.

    Raises:
        BuildError: no nvcc, or it failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError(_no_compiler("cuda"))

    def compile_one(arch: str, source: Path) -> list[KernelUsage]:
        with tempfile.TemporaryDirectory() as folder:
            flags = [*_cuda_flags([arch]), "-Xptxas", "-v", "-cubin"]
            return _usage(arch, _run([nvcc, *flags, str(source), "-o", f"{folder}/out"]))

    pairs = [(arch, source) for arch in archs for source in sorted(CSRC.glob("*.cu"))]
    with ThreadPoolExecutor(jobs) as pool:
        return [usage for found in pool.map(lambda pair: compile_one(*pair), pairs) for usage in found]


def table(usages: Sequence[KernelUsage]) -> str:
    """A line a kernel and architecture."""
    head = ("kernel", "arch", "registers", "spill bytes", "stack bytes")
    return "\n".join(f"{k:<34}{a:<10}{r:>9}{s:>13}{t:>13}" for k, a, r, s, t in (head, *usages))


def _command(kind: Kind, archs: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The compiler, "" if there is none, and all but sources and output."""
    if kind == "cuda":
        shared = ["-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-cudart", "static"]
        return [find_nvcc() or "", *shared, *_cuda_flags(archs), *flags]
    # -x c++: the sources end in .cu. -O2 without -ffast-math: the tests judge the arithmetic.
    return [
        find_cxx() or "",
        *"-x c++ -std=c++20 -O2 -fPIC -shared -pthread -fvisibility=hidden".split(),
        *flags,
    ]


def _cuda_flags(archs: Sequence[str]) -> list[str]:
    codes = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in archs]
    return ["-O3", "-std=c++17", *codes]


def _no_compiler(kind: Kind) -> str:
    if kind == "host":
        return "no C++ compiler: CXX and g++ lead nowhere; install g++ 12 or newer"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    where = f"CUDA_HOME={home} has no bin/nvcc" if home else "no nvcc on the PATH nor in /usr/local/cuda"
    return f"{where}; install the CUDA toolkit or set CUDA_HOME"


def _run(command: list[str]) -> str:
    """The compiler's messages. Raises BuildError with its first error and the whole command."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * COMPILE_MINUTES, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    messages = done.stdout + done.stderr
    if done.returncode:
        lines = [line.strip() for line in messages.splitlines() if line.strip()]
        first = next(
            (line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message"
        )
        raise BuildError(f"{first}; to see all of it: {' '.join(command)}")
    return messages


def _usage(arch: str, messages: str) -> list[KernelUsage]:
    """Parse the output of ptxas -v."""
    pattern = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    found = list(pattern.finditer(messages))
    names = _demangle([m["name"] for m in found])
    return [
        KernelUsage(name, arch, int(m["registers"]), int(m["stores"]) + int(m["loads"]), int(m["stack"]))
        for name, m in zip(names, found, strict=True)
    ]


def _demangle(names: list[str]) -> list[str]:
    """xdlm::grad_kernel<float>(...) as grad_kernel<float>; left as they are without c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool, *names], capture_output=True, text=True, check=True)
    plain = (line.split("(")[0].removeprefix("void ") for line in done.stdout.splitlines())
    return [line.replace("xdlm::", "") for line in plain]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m xdlm_megatron.kernels.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["cuda", "host", "report"], help="a library, or what its kernels use")
    parser.add_argument("--arch", nargs="+", default=[], help="GPUs, as nvcc names them")
    options = parser.parse_args(arguments)
    try:
        if options.what != "report":
            print(build(options.what, options.arch))
            return 0
        print(table(report(options.arch or ARCHITECTURES)))
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
