"""The build: registers and spills on every architecture, the cache, concurrent builds, errors in one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import Shard, Tokens
from xdlm_megatron.kernels import build, dispatch, library
from xdlm_megatron.kernels.library import KernelError, Library, load_cuda
from xdlm_megatron.kernels.nelbo import nelbo_row_ops

needs_nvcc = pytest.mark.skipif(build.find_nvcc() is None, reason="needs nvcc")
needs_cxx = pytest.mark.skipif(build.find_cxx() is None, reason="needs g++")

# Registers a thread at which the kernels still fill an SM: 32 for 2048 threads of 65536 registers, 40 for 3
# blocks of 512. sm_80 has no clusters, and half the memory bandwidth. What works on a token may take more.
MOST_REGISTERS = {
    "stats_kernel": 32,
    "sums_kernel": 32,
    "grad_kernel": 32,
    "rescale_kernel": 32,
    "whole_kernel": 40,
    "merge_kernel": 64,
    "finish_kernel": 64,
    "posterior_draw_kernel": 80,  # 24 warps, every lane with four vectors on the way
    "posterior_survey_kernel": 128,  # 16 warps
    "posterior_bin_kernel": 80,
    "posterior_nucleus_kernel": 128,  # the same
}
MOST_REGISTERS_SM_80 = {name: 64 for name in MOST_REGISTERS} | {"sums_kernel": 40}
MOST_REGISTERS_SM_80 |= {
    name: MOST_REGISTERS[name] for name in MOST_REGISTERS if name.startswith("posterior")
}


@needs_nvcc
def test_no_kernel_spills_and_rows_fill_an_sm(capsys: pytest.CaptureFixture[str]) -> None:
    usages = build.report()
    with capsys.disabled():
        print(f"\n{build.table(usages)}", file=sys.stderr)  # which a worker of xdist passes on
    assert {usage.arch for usage in usages} == set(build.ARCHITECTURES)
    seen = {usage.kernel.split("<")[0] for usage in usages}
    assert seen >= MOST_REGISTERS.keys()
    for usage in usages:
        assert usage.spill_bytes == 0, usage
        assert usage.stack_bytes == 0, usage
        bounds = MOST_REGISTERS_SM_80 if usage.arch == "sm_80" else MOST_REGISTERS
        bound = bounds.get(usage.kernel.split("<")[0])
        assert bound is None or usage.registers <= bound, usage


@needs_cxx
def test_a_library_is_built_once_by_whoever_comes_first(tmp_path: Path) -> None:
    """Three processes of a machine, and a compiler that notes its calls and takes its time."""
    cache, calls, compiler = tmp_path / "cache", tmp_path / "calls", tmp_path / "slow-g++"
    compiler.write_text(f'#!/bin/sh\necho called >> {calls}\nsleep 1\nexec {build.find_cxx()} "$@"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"CXX": str(compiler), "XDLM_KERNEL_CACHE": str(cache)}
    command = [sys.executable, "-m", "xdlm_megatron.kernels.build", "host"]
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    printed = {process.communicate(timeout=120)[0] for process in processes}
    (first,) = cache.iterdir()  # nothing is left aside
    assert printed == {f"{first}\n"}
    assert calls.read_text() == "called\n"
    stamp = first.stat().st_mtime_ns
    assert build.build("host", folder=cache).stat().st_mtime_ns == stamp


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_cuda_library_loads_without_a_gpu_and_refuses_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(build.build("cuda", ["sm_90a"], folder=tmp_path), "cpu")
    ids, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    refusal = r"xdlm_nelbo_stats: .*(driver|device).* \(error \d+\)"
    with pytest.raises(KernelError, match=refusal):
        nelbo_row_ops(library).stats(
            torch.zeros(2, 8), Tokens(ids, ids, ones, ones, ones), Shard(StationaryNoise(0.1, 8, 7))
        )
    monkeypatch.setattr(dispatch, "_load", lambda device: library)
    kernels = dispatch.choose_kernels("auto", torch.device("cpu"))
    assert kernels.library is None
    assert re.search(rf"PyTorch \({refusal}\)", kernels.reason)
    assert library.ask("xdlm_has_clusters", torch.device("cpu")) == 0


def test_the_name_changes_with_sources_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library_path("host")
    assert build.library_path("host", flags=["-g"]) != before
    sources = tmp_path / "csrc"
    sources.mkdir()
    for source in build.CSRC.iterdir():
        (sources / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(build, "CSRC", sources)
    assert build.library_path("host") == before
    (sources / "api.h").write_text((sources / "api.h").read_text() + "// changed\n")
    assert build.library_path("host") != before


@needs_cxx
def test_a_compiler_s_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        build.BuildError, match=r"unrecognized command-line option.*--nonsense.*to see all"
    ) as error:
        build.build("host", flags=["--nonsense"], folder=tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        build.BuildError, match=rf"CUDA_HOME={tmp_path} has no bin/nvcc; install the CUDA toolkit"
    ):
        build.build("cuda", folder=tmp_path)
    with pytest.raises(build.BuildError, match=r"CXX and g\+\+ lead nowhere"):
        build.build("host", folder=tmp_path)
    assert build.main(["report"]) == 2
    assert "error: CUDA_HOME=" in capsys.readouterr().err


def test_an_installed_library_serves_the_gpus_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "AHEAD_OF_TIME", tmp_path)
    path = build.library_path("cuda", ("sm_80", "sm_90a"), folder=tmp_path)
    path.touch()
    for capability, found in {(8, 0): path, (8, 9): path, (9, 0): path, (7, 5): None, (10, 0): None}.items():
        assert build.find_installed(*capability) == found, capability
    path.rename(build.library_path("cuda", ("compute_90",), folder=tmp_path))
    assert build.find_installed(12, 0) is not None
    assert build.find_installed(8, 6) is None


def fail(kind: str, archs: list[str]) -> Path:
    raise build.BuildError("no nvcc")


def test_ptx_without_clusters_serves_where_nothing_better_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PTX for 8.0 is right on a 9.0, but cannot put a row into several blocks."""
    monkeypatch.setattr(build, "AHEAD_OF_TIME", tmp_path)
    path = build.library_path("cuda", ("sm_80", "compute_80"), folder=tmp_path)
    path.touch()
    assert build.find_installed(9, 0) is None
    assert build.find_installed(9, 0, clusters=False) == path
    assert build.find_installed(8, 6) == path
    monkeypatch.setattr(library, "Library", lambda path, device_type: path)
    monkeypatch.setattr(build, "build", lambda kind, archs: Path("-".join([kind, *archs])))
    assert load_cuda.__wrapped__(9, 0) == Path("cuda-sm_90a")
    monkeypatch.setattr(build, "build", fail)
    assert load_cuda.__wrapped__(9, 0) == path
    path.unlink()
    with pytest.raises(build.BuildError, match="no nvcc"):
        load_cuda.__wrapped__(9, 0)


def test_architectures_as_torch_lists_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, names in {
        "8.0;9.0a 10.0+PTX": ("sm_80", "sm_90a", "sm_100", "compute_100"),
        "10.0f": ("sm_100f",),
    }.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        assert build.default_architectures() == names
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0 7.5+PTX 8.0 9.0+PTX")
    assert build.default_architectures() == ("sm_80", "sm_90", "compute_90")
    assert "not built for 7.0, 7.5+PTX: they need 8.0 or newer" in capsys.readouterr().err
    for given, error in {"7.5": "need a GPU of 8.0 or newer", "8.0 Hopper": "'Hopper' is no compute"}.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        with pytest.raises(build.BuildError, match=error):
            build.default_architectures()


def test_the_default_is_what_nvcc_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA 12.4 knows no 10.0; the newest goes with PTX that later GPUs can take."""
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.default_architectures() == ("sm_80", "sm_90a", "sm_100", "compute_100")
    (tmp_path / "bin").mkdir()
    nvcc = tmp_path / "bin/nvcc"
    nvcc.write_text("#!/bin/sh\necho sm_75\necho sm_80\necho sm_90\n")
    nvcc.chmod(0o755)
    assert build.default_architectures() == ("sm_80", "sm_90a", "compute_90")


@pytest.mark.parametrize(
    ("arch", "gpus"),
    {
        "sm_80": {(8, 0), (8, 9)},
        "sm_90a": {(9, 0)},
        "compute_90a": {(9, 0)},
        "compute_90": {(9, 0), (10, 0), (10, 3), (12, 0)},
        "sm_100f": {(10, 0), (10, 3)},
        "compute_100f": {(10, 0), (10, 3)},
        "compute_80": {(8, 0), (8, 9)},
        "sm_120": {(12, 0)},
        "sm_x": set(),
        "lto_90": set(),
        "": set(),
    }.items(),
)
def test_which_gpus_code_is_for(arch: str, gpus: set[tuple[int, int]]) -> None:
    every = {(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)}
    assert {gpu for gpu in every if build._runs_on(arch, *gpu)} == gpus


def test_an_old_gpu_is_refused_before_anything_is_built() -> None:
    with pytest.raises(build.BuildError, match=r"capability 7.5: the kernels need 8.0 or newer"):
        load_cuda(7, 5)
