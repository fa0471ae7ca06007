"""Which implementation serves, and what an impossible wish says."""

from __future__ import annotations

import re

import pytest
import torch

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, Shard, Tokens
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW
from xdlm_megatron.kernels import dispatch, probe
from xdlm_megatron.kernels.build import CSRC, BuildError
from xdlm_megatron.kernels.dispatch import choose_kernels
from xdlm_megatron.kernels.library import Library
from xdlm_megatron.kernels.nelbo import nelbo_row_ops

CPU = torch.device("cpu")


def test_without_a_gpu_auto_is_the_reference_and_says_why() -> None:
    for impl, reason in (("auto", "PyTorch (no GPU here)"), ("reference", "PyTorch (as train.kernels says)")):
        kernels = choose_kernels(impl, CPU)
        assert kernels.row_ops is REFERENCE
        assert kernels.draw is REFERENCE_DRAW
        assert kernels.reason == reason


def test_cuda_where_it_cannot_be_had_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"train.kernels=cuda cannot be had on cpu: no GPU here; or let train.k"
    ):
        choose_kernels("cuda", CPU)


def test_a_gpu_without_library_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(device: torch.device) -> Library:
        raise BuildError(
            "no nvcc on the PATH nor in /usr/local/cuda; install the CUDA toolkit or set CUDA_HOME"
        )

    monkeypatch.setattr(dispatch, "_load", load)
    assert choose_kernels("auto", torch.device("cuda")).reason.startswith("PyTorch (no nvcc on the PATH")
    with pytest.raises(ValueError, match="cannot be had on cuda: no nvcc on the PATH"):
        choose_kernels("cuda", torch.device("cuda"))


def test_a_library_that_can_be_had_serves(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device(library.device_type)
    monkeypatch.setattr(dispatch, "_load", lambda device: library)
    for impl in ("auto", "cuda"):
        kernels = choose_kernels(impl, device)
        assert kernels.row_ops is not REFERENCE
        assert kernels.draw is not REFERENCE_DRAW
        assert kernels.reason == f"CUDA kernels ({library.path.name})"
    assert choose_kernels("reference", device).row_ops is REFERENCE


OUTPUTS = {  # where they are among the arguments of a call
    "xdlm_nelbo_stats": (1,),
    "xdlm_nelbo_merge": (3,),
    "xdlm_nelbo_sums": (2,),
    "xdlm_nelbo_finish": (4, 5),
    "xdlm_nelbo_grad": (3,),
    "xdlm_nelbo_rescale": (2,),
    "xdlm_nelbo_whole": (1, 2, 3),
    "xdlm_posterior_draw": (1,),
    "xdlm_posterior_survey": (1, 2, 3),
    "xdlm_posterior_bin": (3, 4, 5),
    "xdlm_posterior_nucleus": (2,),
}


def test_these_are_all_the_kernels() -> None:
    declared = re.findall(r"^XDLM_API int (xdlm_\w+)\(", (CSRC / "api.h").read_text(), re.MULTILINE)
    assert sorted(declared) == sorted(OUTPUTS)


@pytest.mark.parametrize(("name", "output"), [(name, at) for name in OUTPUTS for at in OUTPUTS[name]])
def test_a_library_with_one_wrong_kernel_does_not_serve(
    name: str, output: int, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that starts, and one of its outputs is off by 2 %, or of a draw not written."""
    right = library.call

    def call(called: str, device: torch.device, *arguments: object) -> None:
        right(called, device, *arguments)
        x = arguments[output] if called == name else None
        if x is not None:  # a gradient may not be asked for
            x.copy_(x * (1.02 if "nelbo" in name else 0))

    monkeypatch.setattr(library, "call", call)
    monkeypatch.setattr(dispatch, "_load", lambda device: library)
    device, refused = torch.device(library.device_type), r"the kernels give wrong (losses|draws|nuclei)"
    with pytest.raises(ValueError, match=f"train.kernels=cuda cannot be had on {device.type}: {refused}"):
        choose_kernels("cuda", device)
    if name == "xdlm_nelbo_stats":
        assert choose_kernels("auto", device).reason.startswith("PyTorch (the kernels give wrong losses")


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: no image\nof it"), ValueError("x is NaN")])
def test_a_kernel_that_fails_on_its_way_does_not_serve(
    error: Exception, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(library, "call", call)
    monkeypatch.setattr(dispatch, "_load", lambda device: library)
    reason = choose_kernels("auto", torch.device(library.device_type)).reason
    assert reason == f"PyTorch ({str(error).splitlines()[0]})"


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_no_draw_of_the_probe_is_a_close_call(top_p: float) -> None:
    """Kernels that are right to 1e-5 draw the same ids; of a nucleus of equals other logits are others."""
    logits = probe._logits(torch.float32)
    noise = 1e-5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    rows = slice(None) if top_p == 1 else slice(5)
    want, got = (probe._draw(REFERENCE_DRAW, x, top_p)[1][rows] for x in (logits, logits + noise))
    assert torch.equal(got, want)


def test_tensors_that_the_kernels_cannot_take_are_refused(library: Library) -> None:
    on, ops = library.device_type, nelbo_row_ops(library)
    shard = Shard(StationaryNoise(0.1, 11, 4))
    ids, rates = torch.zeros(3, dtype=torch.int64, device=on), torch.ones(3, device=on)
    tokens = Tokens(ids, ids, rates, rates, rates)
    with pytest.raises(
        ValueError, match=r"logits of dtype torch.float16: the kernels take float32 and bfloat16"
    ):
        ops.stats(torch.zeros(3, 11, dtype=torch.float16, device=on), tokens, shard)
    with pytest.raises(ValueError, match="columns must be contiguous"):
        ops.stats(torch.zeros(11, 3, device=on).t(), tokens, shard)
    with pytest.raises(ValueError, match=r"zt_N: torch.int32 .* the kernels take contiguous torch.int64"):
        ops.stats(torch.zeros(3, 11, device=on), Tokens(ids.int(), ids, rates, rates, rates), shard)
