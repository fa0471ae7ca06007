"""One choice of kernels for all processes: their losses are merged, and must be made alike."""

from __future__ import annotations

from xdlm_megatron.kernels.dispatch import Impl, Kernels, choose_kernels
from xdlm_megatron.parallel.mesh import Mesh


def choose_kernels_together(impl: Impl, mesh: Mesh) -> Kernels:
    """choose_kernels, but PyTorch for everybody where a process cannot have the CUDA kernels.

    Raises:
        ValueError: impl is "cuda" and a process, which it names, cannot have them; on every process.
    """
    if impl == "reference":
        return choose_kernels(impl, mesh.device)
    try:
        kernels = choose_kernels(impl, mesh.device)
    except ValueError as error:
        kernels = Kernels(None, str(error))
    without = mesh.gather_on_main(None if kernels.library else kernels.reason)
    first = mesh.on_main(lambda: next(((rank, why) for rank, why in enumerate(without) if why), None))
    if first is None:
        return kernels
    rank, why = first
    if mesh.world_size > 1:
        why += f"; process {rank} says so, and all must choose alike"
    if impl == "cuda":
        raise ValueError(why)
    return Kernels(None, why)
