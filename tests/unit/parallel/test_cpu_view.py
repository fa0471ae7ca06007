"""megatron.core sees a torch whose CUDA is the CPU; everything else sees the real one."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from types import ModuleType

import pytest
import torch

import xdlm_megatron.model.build  # noqa: F401  (imports most of what training uses)
from xdlm_megatron.parallel import cpu_view
from xdlm_megatron.parallel.mesh import open_mesh, seed_model_parallel_rng

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there is no view")

VIEW = cpu_view.torch_view()


def modules_with_torch() -> dict[str, ModuleType]:
    return {name: m for name, m in sys.modules.items() if isinstance(m, ModuleType) and "torch" in vars(m)}


def test_all_of_megatron_core_and_nothing_else_has_the_view() -> None:
    modules = modules_with_torch()
    having = {name for name, module in modules.items() if module.torch is VIEW}
    lacking = {name for name, module in modules.items() if module.torch is torch}
    assert {name for name in having if not name.startswith("megatron.core")} == set()
    assert {name for name in lacking if name.startswith("megatron.core")} == set()
    assert len(having) > 50


def test_the_real_torch_is_untouched() -> None:
    assert torch.cuda.current_device.__module__ == "torch.cuda"
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.zeros(1, device="cuda")
    with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
        torch.cuda.current_device()
    assert torch.zeros(1).type() == "torch.FloatTensor"


@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda", 1), "cpu", None])
def test_factories_of_the_view_build_on_the_cpu(device: object) -> None:
    assert VIEW.zeros(2, device=device).device == torch.device("cpu")
    assert VIEW.empty_like(torch.ones(2), device=device).device == torch.device("cpu")


def test_factories_of_the_view_keep_what_is_not_cuda() -> None:
    assert VIEW.empty(2, device="meta").device.type == "meta"
    assert not VIEW.empty(2, pin_memory=True).is_pinned()
    assert torch.equal(VIEW.full((2,), 3.0, dtype=torch.float64), torch.full((2,), 3.0, dtype=torch.float64))


def test_the_view_passes_every_other_name_on() -> None:
    assert VIEW.Tensor is torch.Tensor
    assert VIEW.nn is torch.nn
    assert VIEW.cuda.is_available() is False
    with pytest.raises(AttributeError):
        VIEW.no_such_name  # noqa: B018


def test_the_null_device_takes_streams_and_events() -> None:
    VIEW.cuda.set_device(0)
    VIEW.cuda.synchronize()
    with VIEW.cuda.stream(VIEW.cuda.Stream()), VIEW.cuda.current_stream():
        VIEW.cuda.Event(enable_timing=True).record(VIEW.cuda.current_stream())
    VIEW.cuda.nvtx.range_push("range")
    VIEW.cuda.nvtx.range_pop()
    assert torch.zeros(1, device=VIEW.cuda.current_device()).device.type == "cpu"


def test_autocast_to_cuda_is_autocast_on_the_cpu() -> None:
    with VIEW.autocast("cuda", dtype=torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_tensor_type_answers_cuda_to_the_optimizer_alone() -> None:
    def ask(module: str) -> str:
        scope = {"__name__": module, "tensor": torch.zeros(1, dtype=torch.bfloat16)}
        exec("answer = tensor.type()", scope)
        return scope["answer"]

    assert ask("megatron.core.optimizer.optimizer") == "torch.cuda.BFloat16Tensor"
    assert ask("megatron.core.tensor_parallel.layers") == "torch.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype is torch.float64


def test_tensor_cuda_is_the_identity() -> None:
    x = torch.zeros(1)
    assert x.cuda() is x
    assert x.cuda(0, non_blocking=True) is x


def test_a_module_imported_later_gets_the_view() -> None:
    spec = importlib.util.find_spec("megatron.core.msc_utils")
    assert spec is not None
    fresh = importlib.util.module_from_spec(spec)  # executed here, whether imported before or not
    spec.loader.exec_module(fresh)
    assert "torch" not in vars(fresh) or fresh.torch is VIEW
    spec = importlib.util.find_spec("megatron.core.full_cuda_graph")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    assert fresh.torch is VIEW


def test_rng_tracker_forks_and_restores() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    def draws(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seed_model_parallel_rng(seed)
        tracker = get_cuda_rng_tracker()
        before = torch.get_rng_state()
        with tracker.fork():
            first = torch.rand(4)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(7)  # what is drawn outside does not reach inside
        with contextlib.suppress(ZeroDivisionError), tracker.fork():
            second = torch.rand(4)
            1 / 0  # noqa: B018
        return first, second, torch.rand(4)

    with open_mesh():
        first, second, outside = draws(5)
        again = draws(5)
        other = draws(6)
        with pytest.raises(Exception, match="no-such-state"), get_cuda_rng_tracker().fork("no-such-state"):
            pass
    for a, b, c in zip((first, second, outside), again, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
    assert not torch.equal(first, second)
    assert not torch.equal(first, outside)
