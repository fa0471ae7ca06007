"""Which implementation serves, and what an impossible wish says."""

from __future__ import annotations

import pytest
import torch

from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, Shard, Tokens
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW
from xdlm_megatron.kernels import dispatch
from xdlm_megatron.kernels.build import BuildError
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


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("xdlm_nelbo_stats", "statistics"),
        ("xdlm_nelbo_whole", "losses"),
        ("xdlm_nelbo_whole", "gradients"),
        ("xdlm_posterior_nucleus", "nuclei"),
    ],
)
def test_a_library_that_is_wrong_here_does_not_serve(
    broken: str, said: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that starts and gives other numbers: the probe finds it, whichever it is."""
    right = library.call

    def call(name: str, device: torch.device, *arguments: object) -> None:
        right(name, device, *arguments)
        if name == broken:
            given = [x for x in arguments if isinstance(x, torch.Tensor)]
            given[-1 if said == "gradients" else 0].mul_(1.001)
            if said == "gradients":
                given[-1][:, 5] = 0.0
            if said == "nuclei":
                given[0][2] = 0.0

    monkeypatch.setattr(library, "call", call)
    monkeypatch.setattr(dispatch, "_load", lambda device: library)
    device = torch.device(library.device_type)
    assert choose_kernels("auto", device).reason.startswith(f"PyTorch (the kernels give wrong {said} here: ")
    with pytest.raises(ValueError, match=f"wrong {said}"):
        choose_kernels("cuda", device)


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
