"""The draws of diffusion/token_race.py and nucleus_draw.py and the reads of survey.py by csrc/posterior*."""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from xdlm_megatron.diffusion.shard_rows import TILE
from xdlm_megatron.diffusion.survey import SLOTS, BinTokens, Survey
from xdlm_megatron.diffusion.token_race import ChosenRows, Draw
from xdlm_megatron.kernels.library import DTYPES, Library, check_logits


class DrawRows(ctypes.Structure):
    """XdlmDraw of csrc/api.h."""

    _fields_ = (
        ("bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logits", "index", "zt", "position", "row_id")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "dtype")),
        *((name, ctypes.c_int64) for name in ("first_id", "vocab_size", "mask_id")),
        *((name, ctypes.c_int64) for name in ("seed", "stream_word", "step")),
        ("scale", ctypes.c_double),
    )


def posterior_draw(library: Library) -> Draw:
    """For tensors on the library's device. Logits: float32 or bfloat16, of any alignment.

    The keys differ from the twin's by the rounding of float32 logarithms, about 1e-6, and so does one id in
    about as many draws; masses by that of float32 exponentials, a unit of 2^-15 in few tokens.
    """
    kernels = PosteriorKernels(library)
    return Draw(kernels.shard, kernels.nucleus, kernels.survey)


class PosteriorKernels:
    """The functions of a Draw. They raise ValueError on tensors that the kernels cannot take."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def shard(self, chosen: ChosenRows) -> Tensor:
        rows, _ids_4M = self._rows(chosen)
        draw_3M = chosen.logits_NP.new_empty(3, len(chosen.index_M), dtype=torch.float64)
        self._library.call("xdlm_posterior_draw", draw_3M.device, rows, draw_3M)
        return draw_3M

    def nucleus(self, chosen: ChosenRows, top_p: float, cluster: int = 0) -> Tensor | None:
        """cluster: blocks a row, 0 for as few as it takes."""
        rows, _ids_4M = self._rows(chosen)
        draw_3M = chosen.logits_NP.new_empty(3, len(chosen.index_M), dtype=torch.float64)
        cluster = cluster or self._library.ask("xdlm_nucleus_cluster", draw_3M.device, rows)
        if cluster == 0:
            return None
        share = ctypes.c_double(top_p)
        self._library.call("xdlm_posterior_nucleus", draw_3M.device, rows, share, draw_3M, cluster)
        return draw_3M

    def survey(self, chosen: ChosenRows) -> Survey | None:
        rows, _ids_4M = self._rows(chosen)
        logits_NP, M = chosen.logits_NP, len(chosen.index_M)
        if not self._library.ask("xdlm_survey_fits", logits_NP.device, rows):
            return None
        logits_2M = logits_NP.new_empty(2, M, dtype=torch.float32)
        mass_MS, best_MS = (chosen.index_M.new_empty(M, SLOTS) for _ in range(2))
        self._library.call("xdlm_posterior_survey", logits_NP.device, rows, logits_2M, mass_MS, best_MS)
        bin_tokens = partial(self._bin_tokens, chosen)
        return Survey(logits_2M[0], logits_2M[1], mass_MS, best_MS, bin_tokens)

    def _bin_tokens(self, chosen: ChosenRows, at: Tensor, bin_M: Tensor, most_M: Tensor) -> BinTokens:
        rows, _ids_4M = self._rows(chosen.only(at))
        row_E = torch.arange(len(bin_M), device=bin_M.device).repeat_interleave(most_M)
        logits_E = chosen.logits_NP.new_empty(len(row_E), dtype=torch.float32)
        mass_E, best_E = (torch.empty_like(row_E) for _ in range(2))
        end_M = most_M.cumsum(0)
        self._library.call("xdlm_posterior_bin", row_E.device, rows, bin_M, end_M, logits_E, mass_E, best_E)
        return BinTokens(row_E, logits_E, mass_E, best_E)

    def _rows(self, chosen: ChosenRows) -> tuple[DrawRows, Tensor]:
        """What the kernels take, and a tensor that must outlive their call."""
        library, logits_NP, counters = self._library, chosen.logits_NP, chosen.counters
        noise, first_id = chosen.shard
        ids_4M = torch.stack([chosen.index_M, chosen.zt_M, counters.position_M, counters.row_M])
        check_logits(logits_NP)
        if logits_NP.device.type != library.device_type or ids_4M.device != logits_NP.device:
            raise ValueError(
                f"logits on {logits_NP.device}, rows on {ids_4M.device}: "
                f"{library.path.name} takes {library.device_type}"
            )
        if first_id % TILE:
            raise ValueError(
                f"a shard that begins at id {first_id} cuts a tile; pad it to a multiple of {TILE}"
            )
        rows = DrawRows(
            ctypes.sizeof(DrawRows),
            logits_NP.data_ptr(),
            *(ids_M.data_ptr() for ids_M in ids_4M),
            *(ids_4M.shape[1], logits_NP.shape[1], logits_NP.stride(0), DTYPES[logits_NP.dtype]),
            *(first_id, noise.vocab_size, -1 if noise.mask_id is None else noise.mask_id),
            *(*counters.key, counters.step),
            chosen.scale,
        )
        return rows, ids_4M
