"""Imported before Megatron: the real Python of Transformer Engine, on a CPU that it takes for a Hopper.

Its modules see a `torch` in which cuda is the CPU, as megatron.core's do, and call engine_kernels.py where
they would call their compiled library. Adam is torch's. Its attention has no kernel here: a recipe that keeps
documents apart takes torch's.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from typing import Any
from unittest import mock

import torch

from tests.unit.model import engine_kernels
from tests.unit.model.engine_wheel import sources
from tests.unit.model.real_engine import as_with_a_gpu, import_engine


def show_it_a_hopper() -> None:
    """To Transformer Engine's modules alone: their `torch`, and whether an input is on a GPU."""
    import transformer_engine.pytorch.quantization as quantization
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    from xdlm_megatron.parallel.cpu_view import _View, torch_view

    hopper = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    cuda = _View(
        torch_view().cuda,
        is_available=lambda: True,
        get_device_capability=lambda *_: (hopper.major, hopper.minor),
        get_device_properties=lambda *_: hopper,
        is_current_stream_capturing=lambda: False,
    )
    view = _View(torch_view(), cuda=cuda)
    for name, module in list(sys.modules.items()):
        if name.startswith("transformer_engine.") and vars(module).get("torch") is torch:
            vars(module)["torch"] = view
    quantization._FP8_SUPPORT = (True, "")
    prepare = TransformerEngineBaseModule.prepare_forward

    def prepare_forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        with mock.patch.object(torch.Tensor, "is_cuda", True, create=True):
            return prepare(self, *args, **kwargs)

    TransformerEngineBaseModule.prepare_forward = prepare_forward


os.environ["NVTE_TORCH_COMPILE"] = "0"  # its own switch; two seconds in each process


def send_one_by_one() -> None:
    """gloo garbles what it gathers at once of weights in FP8 and in bfloat16; NCCL does not."""
    from megatron.core.distributed import param_and_grad_buffer

    param_and_grad_buffer._coalescing_manager = lambda *_, **__: contextlib.nullcontext()


import_engine(str(sources()), engine_kernels)
with as_with_a_gpu():  # the import asks once whether Transformer Engine can be used
    from xdlm_megatron.parallel import cpu_view, patches

    cpu_view.install()
    import megatron.core.optimizer  # noqa: F401
show_it_a_hopper()
send_one_by_one()
patches._use_group_step_adam()
