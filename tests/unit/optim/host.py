"""A CPU that plays a GPU and its host, for the module of megatron.core that offloads the optimizer.

To it every tensor is the GPU's, but for those that it has moved by `.cpu()` and what is made of them.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
from megatron.core.optimizer import optimizer_config
from megatron.core.optimizer.cpu_offloading import hybrid_optimizer
from torch import Tensor

from xdlm_megatron.optim import offload
from xdlm_megatron.parallel.gpu_packages import Package


class HostTensor(Tensor):
    """In the CPU's memory; so is all that torch computes of it."""


def play_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the test is over; Transformer Engine's version, which is asked for, is new enough."""
    real_to, real_cpu, real_is_cuda = Tensor.to, Tensor.cpu, Tensor.is_cuda

    def is_asked() -> bool:
        return sys._getframe(2).f_globals["__name__"] == hybrid_optimizer.__name__

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if is_asked() and args in (("cpu",), ("cuda",)):
            return self.clone().as_subclass(HostTensor if args == ("cpu",) else Tensor)
        return real_to(self, *args, **kwargs)

    def cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.clone().as_subclass(HostTensor) if is_asked() else real_cpu(self, *args, **kwargs)

    def is_cuda(self: Tensor) -> bool:
        return not isinstance(self, HostTensor) if is_asked() else real_is_cuda.__get__(self)

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "cpu", cpu)
    monkeypatch.setattr(Tensor, "is_cuda", property(is_cuda))
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(offload, "transformer_engine", lambda: Package("Transformer Engine", ("layers",)))
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
