"""Which implementation serves: the kernels where a GPU can run them, the readable twins elsewhere."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, Draw
from xdlm_megatron.kernels.build import BuildError
from xdlm_megatron.kernels.library import KernelError, Library, load_cuda
from xdlm_megatron.kernels.nelbo import nelbo_row_ops
from xdlm_megatron.kernels.posterior import posterior_draw
from xdlm_megatron.kernels.probe import probe

Impl = Literal["auto", "cuda", "reference"]


class Kernels(NamedTuple):
    """The implementations for one device. library: None where the PyTorch twins of diffusion/ serve. reason:
    what serves and why, for a log.
    """

    library: Library | None
    reason: str

    @property
    def row_ops(self) -> RowOps:
        """For the losses of diffusion/."""
        return REFERENCE if self.library is None else nelbo_row_ops(self.library)

    @property
    def draw(self) -> Draw:
        """For the sampler of diffusion/."""
        return REFERENCE_DRAW if self.library is None else posterior_draw(self.library)


def choose_kernels(impl: Impl, device: torch.device) -> Kernels:
    """`auto` takes CUDA kernels where the device, a library or a compiler for it allow, and a probe is right.

    Raises:
        ValueError: impl is "cuda" and they do not.
    """
    if impl == "reference":
        return Kernels(None, "PyTorch (as train.kernels says)")
    try:
        library = _load(device)
        probe(library, device)
    except (BuildError, KernelError, OSError) as error:
        if impl == "cuda":
            raise ValueError(
                f"train.kernels=cuda cannot be had on {device.type}: {error}; or let train.kernels be auto"
            ) from error
        return Kernels(None, f"PyTorch ({error})")
    return Kernels(library, f"CUDA kernels ({library.path.name})")


def _load(device: torch.device) -> Library:
    if device.type != "cuda":
        raise BuildError("no GPU here")
    return load_cuda(*torch.cuda.get_device_capability(device))
