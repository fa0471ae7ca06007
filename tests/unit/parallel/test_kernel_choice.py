"""All processes choose the same kernels, and say who has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import launch_program
from xdlm_megatron.kernels import dispatch
from xdlm_megatron.kernels.build import find_cxx
from xdlm_megatron.kernels.library import load_host
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together
from xdlm_megatron.parallel.mesh import open_mesh

needs_cxx = pytest.mark.skipif(find_cxx() is None, reason="needs g++")


@needs_cxx
def test_one_process_chooses_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with open_mesh() as mesh:
        with pytest.raises(ValueError, match=r"had on cpu: no GPU here; or let train.kernels be auto$"):
            choose_kernels_together("cuda", mesh)
        assert choose_kernels_together("auto", mesh).reason == "PyTorch (no GPU here)"
        monkeypatch.setattr(dispatch, "_load", lambda device: load_host())
        for impl in ("auto", "cuda"):
            assert choose_kernels_together(impl, mesh).library is load_host()
        assert choose_kernels_together("reference", mesh).library is None


PROGRAM = """
import os
import xdlm_megatron.parallel
from xdlm_megatron.kernels import dispatch
from xdlm_megatron.kernels.build import BuildError
from xdlm_megatron.kernels.library import load_host
from xdlm_megatron.parallel.kernel_choice import choose_kernels_together
from xdlm_megatron.parallel.mesh import open_mesh

has_none, rank = None, int(os.environ["RANK"])

def load(device):
    if rank == has_none:
        raise BuildError("no nvcc")
    return load_host()

dispatch._load = load
with open_mesh() as mesh:
    for has_none in (None, 1, 0):
        for impl in ("auto", "cuda", "reference"):
            try:
                print(f"{rank}: {choose_kernels_together(impl, mesh).reason}")
            except ValueError as error:
                print(f"{rank}: {error}")
"""


@needs_cxx
@pytest.mark.distributed
def test_two_processes_one_without_a_compiler(tmp_path: Path) -> None:
    load_host()
    kernels, reference = f"CUDA kernels ({load_host().path.name})", "PyTorch (as train.kernels says)"
    want = [kernels, kernels, reference]
    for rank in (1, 0):
        who = f"; process {rank} says so, and all must choose alike"
        refusal = f"train.kernels=cuda cannot be had on cpu: no nvcc; or let train.kernels be auto{who}"
        want += [f"PyTorch (no nvcc){who}", refusal, reference]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    said = launch_program(2, program).splitlines()
    for rank in (0, 1):
        assert [line[3:] for line in said if line.startswith(f"{rank}: ")] == want
