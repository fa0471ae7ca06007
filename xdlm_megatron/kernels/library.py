"""Loads the compiled kernels and calls them: csrc/api.h by ctypes, tensors by their addresses."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xdlm_megatron.diffusion.row_ops import Shard, Tokens
from xdlm_megatron.kernels import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class KernelError(RuntimeError):
    """A kernel that refused its arguments or could not be launched."""


class Rows(ctypes.Structure):
    """XdlmRows of csrc/api.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "zt", "x0", "alpha", "beta", "dalpha")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "dtype")),
        *((name, ctypes.c_int64) for name in ("first_id", "vocab_size", "mask_id")),
        ("uniform_ratio", ctypes.c_float),
    )


def rows_of(logits_NP: Tensor, tokens: Tokens, shard: Shard) -> Rows:
    """Rows of these tensors; they must outlive the call.

    Raises:
        ValueError: another dtype than float32 and bfloat16; columns apart; ids or rates of the wrong dtype.
    """
    noise, first_id = shard
    check_logits(logits_NP)
    for name, dtype in (("zt_N", torch.int64), ("x0_N", torch.int64), *((r, torch.float32) for r in RATES)):
        given = getattr(tokens, name)
        if given.dtype != dtype or not given.is_contiguous() or given.device != logits_NP.device:
            raise ValueError(
                f"{name}: {given.dtype} on {given.device} with strides {given.stride()}; "
                f"the kernels take contiguous {dtype} on the logits' device {logits_NP.device}"
            )
    N, P = logits_NP.shape
    return Rows(
        *(x.data_ptr() for x in (logits_NP, tokens.zt_N, tokens.x0_N)),
        *(getattr(tokens, name).data_ptr() for name in RATES),
        *(N, P, logits_NP.stride(0), DTYPES[logits_NP.dtype]),
        *(first_id, noise.vocab_size, -1 if noise.mask_id is None else noise.mask_id),
        noise.uniform_ratio,
    )


def check_logits(logits_NP: Tensor) -> None:
    """Raises ValueError on another dtype than float32 and bfloat16, and on columns apart."""
    if logits_NP.dtype not in DTYPES:
        raise ValueError(
            f"logits of dtype {logits_NP.dtype}: the kernels take float32 and bfloat16; "
            "cast them, or use the reference implementation"
        )
    if logits_NP.stride(1) != 1 and logits_NP.shape[1] > 1:
        raise ValueError(f"logits with strides {logits_NP.stride()}: columns must be contiguous")


RATES = ("alpha_N", "beta_N", "dalpha_N")


class Library:
    """A compiled library. `device_type` of the tensors that it takes: "cuda", or "cpu" for the host build."""

    def __init__(self, path: Path, device_type: str) -> None:
        self.path, self.device_type = path, device_type
        self._dll = ctypes.CDLL(str(path))
        self._dll.xdlm_error.restype = ctypes.c_char_p
        self._dll.xdlm_rows_bytes.restype = ctypes.c_int64
        if self._dll.xdlm_rows_bytes() != ctypes.sizeof(Rows):
            raise KernelError(f"{path} was built from other sources than {__file__}; remove it")

    def call(self, name: str, device: torch.device, *arguments: object) -> None:
        """Launch on the device's current stream. A tensor is passed by its address, None as null, an int as
        int64, a float as float, a structure by reference; the stream comes last.

        Raises:
            KernelError: the call's error number, in words.
        """
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        code = self._on(device, getattr(self._dll, name), *arguments, ctypes.c_void_p(stream))
        if code:
            raise KernelError(f"{name}: {self._dll.xdlm_error(ctypes.c_int64(code)).decode()} (error {code})")

    def ask(self, name: str, device: torch.device, *arguments: object) -> int:
        """A question that starts nothing: the int64 that it returns."""
        function = getattr(self._dll, name)
        function.restype = ctypes.c_int64
        return self._on(device, function, *arguments)

    def _on(self, device: torch.device, function: Any, *arguments: object) -> int:
        converted = [_convert(argument) for argument in arguments]
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return int(function(*converted))


def _convert(argument: object) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, ctypes.Structure):
        return ctypes.byref(argument)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


@functools.cache
def load_cuda(major: int, minor: int) -> Library:
    """The library for GPUs of this compute capability: the installed one, or compiled now (seconds, once).

    Raises:
        build.BuildError: no library and no way to make one.
    """
    if (major, minor) < build.OLDEST:
        raise build.BuildError(f"a GPU of compute capability {major}.{minor}: the kernels need 8.0 or newer")
    path = build.find_installed(major, minor)
    if path is None:
        try:
            path = build.build("cuda", [f"sm_{major}{minor}{'a' if major == 9 else ''}"])
        except build.BuildError:  # what runs, if not as fast as it could
            path = build.find_installed(major, minor, clusters=False)
            if path is None:
                raise
    return Library(path, "cuda")


@functools.cache
def load_host() -> Library:
    """The same sources compiled by g++, for tests on a CPU: correct and slow.

    Raises:
        build.BuildError: no compiler, or it failed.
    """
    return Library(build.build("host"), "cpu")
