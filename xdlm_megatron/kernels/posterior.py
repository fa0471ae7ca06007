"""The draw of diffusion/posterior_draw.py by the kernel of csrc/posterior.cu."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from xdlm_megatron.diffusion.nucleus import Nucleus
from xdlm_megatron.diffusion.posterior_draw import Counters, DrawShard
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E, TILE
from xdlm_megatron.kernels.library import DTYPES, Library, check_logits


class Draw(ctypes.Structure):
    """XdlmDraw of csrc/api.h."""

    _fields_ = (
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logits", "index", "zt", "position", "row_id")),
        *((name, ctypes.c_void_p) for name in ("floor", "last")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "dtype")),
        *((name, ctypes.c_int64) for name in ("first_id", "vocab_size", "mask_id")),
        *((name, ctypes.c_int64) for name in ("seed", "stream_word", "step")),
        ("scale", ctypes.c_double),
    )


def posterior_draw(library: Library) -> DrawShard:
    """draw_shard for tensors on the library's device. Logits: float32 or bfloat16, of any alignment.

    The keys differ from the twin's by the rounding of float32 logarithms, about 1e-6, and so does one id in
    about as many draws.
    """

    def draw_shard(
        logits_NP: Tensor,
        index_M: Tensor,
        zt_M: Tensor,
        counters: Counters,
        shard: Shard,
        temperature: float = 1.0,
        nucleus: Nucleus | None = None,
    ) -> Tensor:
        """As diffusion's. Raises ValueError on tensors that the kernel cannot take."""
        noise, first_id = shard
        ids_4M = torch.stack([index_M, zt_M, counters.position_M, counters.row_M])
        kept = None if nucleus is None else (nucleus.floor_M.contiguous(), nucleus.last_M.contiguous())
        _check(library, logits_NP, ids_4M, first_id)
        draw_3M = torch.empty(3, len(index_M), dtype=torch.float64, device=logits_NP.device)
        arguments = Draw(
            ctypes.sizeof(Draw),
            logits_NP.data_ptr(),
            *(ids_M.data_ptr() for ids_M in ids_4M),
            *((None, None) if kept is None else (x.data_ptr() for x in kept)),
            *(len(index_M), logits_NP.shape[1], logits_NP.stride(0), DTYPES[logits_NP.dtype]),
            *(first_id, noise.vocab_size, -1 if noise.mask_id is None else noise.mask_id),
            *(*counters.key, counters.step),
            LOG2_E / temperature,
        )
        library.call("xdlm_posterior_draw", logits_NP.device, arguments, draw_3M)
        return draw_3M

    return draw_shard


def _check(library: Library, logits_NP: Tensor, ids_4M: Tensor, first_id: int) -> None:
    check_logits(logits_NP)
    if logits_NP.device.type != library.device_type or ids_4M.device != logits_NP.device:
        raise ValueError(
            f"logits on {logits_NP.device}, rows on {ids_4M.device}: "
            f"{library.path.name} takes {library.device_type}"
        )
    if first_id % TILE:
        raise ValueError(f"a shard that begins at id {first_id} cuts a tile; pad it to a multiple of {TILE}")
