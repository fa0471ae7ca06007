"""Megatron-Core on a machine without CUDA: each of its modules gets its own view of the name `torch`.

Some 400 places in megatron.core say `device="cuda"`, `torch.cuda.current_device()` and the like. In the view,
`cuda` is a null device and tensor factories read "cuda" as "cpu". Nothing outside megatron.core sees it,
except two Tensor methods that only raise or mislead on such a machine: `Tensor.cuda()` becomes the identity,
and `Tensor.type()` answers CUDA's type names to megatron.core.optimizer, which compares them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

PACKAGE = "megatron.core"
_CPU = torch.device("cpu")
_FACTORIES = (
    "empty empty_like zeros zeros_like ones ones_like full full_like tensor arange rand randn eye".split()
)


class _View:
    """A module seen through overrides; every other name is the real module's."""

    def __init__(self, real: ModuleType, **overrides: Any) -> None:
        self.__dict__.update(overrides)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class _NullStream:
    """A CUDA stream or event that does nothing, in any call, and can be entered."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NullStream

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


def _get_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    torch.set_rng_state(state)


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    return torch.autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


@functools.cache
def torch_view() -> _View:
    """The `torch` that megatron.core's modules see."""
    rng = {
        "get_rng_state": _get_rng_state,
        "set_rng_state": _set_rng_state,
        "manual_seed": torch.manual_seed,
        "manual_seed_all": torch.manual_seed,
    }
    cuda = _View(
        torch.cuda,
        current_device=lambda: _CPU,
        device_count=lambda: 1,
        set_device=_nothing,
        synchronize=_nothing,
        empty_cache=_nothing,
        Stream=_NullStream,
        Event=_NullStream,
        current_stream=_NullStream,
        default_stream=_NullStream,
        stream=lambda _: contextlib.nullcontext(),
        nvtx=_View(torch.cuda.nvtx, range_push=_nothing, range_pop=_nothing),
        random=_View(torch.cuda.random, **rng),
        **rng,
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _View(torch, cuda=cuda, autocast=_autocast, **factories)


def _rebind(module: ModuleType) -> None:
    """Gives one of megatron.core's modules the view."""
    if module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = torch_view()
    if module.__name__ == f"{PACKAGE}.tensor_parallel.random":
        names = module.__dict__
        names["_get_cuda_rng_state"] = _get_rng_state
        names["_set_cuda_rng_state"] = _set_rng_state
        # The tracker's fork warns when the CPU's state moves, which here is the state that forks.
        logging.getLogger(module.__name__).addFilter(lambda record: "CPU RNG state" not in record.msg)


class _RebindingFinder:
    """Rebinds megatron.core's modules as they are imported."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        if not name.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _rebind(module)

        # Extension modules' loaders refuse new attributes, and have no `torch` to rebind.
        with contextlib.suppress(AttributeError):
            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _type_of(real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        if not args and not kwargs:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith(f"{PACKAGE}.optimizer"):
                return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type_


def install() -> None:
    """Installs the view in all of megatron.core, imported already or later."""
    if _RebindingFinder in sys.meta_path:
        return
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _type_of(torch.Tensor.type)  # type: ignore[method-assign]
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and (name == PACKAGE or name.startswith(PACKAGE + ".")):
            _rebind(module)
    sys.meta_path.insert(0, _RebindingFinder)  # type: ignore[arg-type]
