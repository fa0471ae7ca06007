"""The build: registers and spills on every architecture, the cache, concurrent builds, errors in one line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import Shard, Tokens
from xdlm_megatron.kernels import build
from xdlm_megatron.kernels.library import KernelError, Library
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
}
MOST_REGISTERS_SM_80 = {name: 64 for name in MOST_REGISTERS} | {"sums_kernel": 40}
MOST_REGISTERS_SM_80["posterior_draw_kernel"] = MOST_REGISTERS["posterior_draw_kernel"]


@needs_nvcc
def test_no_kernel_spills_and_rows_fill_an_sm() -> None:
    usages = build.report()
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
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: build.build("host", folder=tmp_path), range(2))
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == [first.name], "nothing is left aside"
    stamp = first.stat().st_mtime_ns
    assert build.build("host", folder=tmp_path).stat().st_mtime_ns == stamp


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_cuda_library_loads_without_a_gpu_and_refuses_in_words(tmp_path: Path) -> None:
    library = Library(build.build("cuda", ["sm_90a"], folder=tmp_path), "cpu")
    ids, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    with pytest.raises(KernelError, match=r"xdlm_nelbo_stats: .*(driver|device).* \(error \d+\)"):
        nelbo_row_ops(library).stats(
            torch.zeros(2, 8), Tokens(ids, ids, ones, ones, ones), Shard(StationaryNoise(0.1, 8, 7))
        )


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


def test_architectures_as_torch_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a 10.0+PTX")
    assert build.default_architectures() == ("sm_80", "sm_90a", "sm_100", "compute_100")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert build.default_architectures() == ("sm_80", "sm_90a", "sm_100", "compute_100")
