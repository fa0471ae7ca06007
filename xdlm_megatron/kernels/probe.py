"""Whether a library's kernels run here and are right: a few tokens whose numbers are known in closed form.

A library can be built and loaded where its first launch fails (a driver older than the library's runtime).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import Shard, Tokens
from xdlm_megatron.diffusion.token_race import ChosenRows, Counters
from xdlm_megatron.kernels.library import KernelError, Library
from xdlm_megatron.kernels.nelbo import NelboKernels
from xdlm_megatron.kernels.posterior import PosteriorKernels

V, MASK, X0, RATIO = 1000, 999, 3, 0.1
TOLERANCE = 1e-4  # of a number; float32 and approximate instructions need a tenth


def probe(library: Library, device: torch.device) -> None:
    """Waits for stats, whole and a draw with top-p (in clusters of 2 blocks, where there are any) of equal
    logits.

    Raises:
        KernelError: they cannot be launched, or give other numbers.
    """
    kernels, shard = NelboKernels(library), Shard(StationaryNoise(RATIO, V, MASK))
    try:
        x0_N = torch.full((4,), X0, device=device)
        half_N = torch.full((4,), 0.5, device=device)
        tokens = Tokens(torch.full_like(x0_N, MASK), x0_N, half_N, half_N, -half_N)
        logits_NP = torch.zeros(4, V, device=device)
        stats_4N = kernels.stats(logits_NP.to(torch.bfloat16), tokens, shard).cpu()
        cluster = 2 if library.ask("xdlm_has_clusters", device) else 1
        whole = kernels.whole(logits_NP, tokens, shard, logits_NP, cluster)
        if whole is None:
            raise KernelError("a row of 1000 logits does not fit into a block")
        loss_N, grad_NP = whole[0].cpu(), logits_NP.cpu()
        rows_M = torch.arange(4, device=device)
        counters = Counters((0, Stream.SAMPLE_STEP), 0, rows_M, rows_M)
        chosen = ChosenRows(torch.zeros(4, V, device=device), rows_M, V // 4 - 2 + rows_M, counters, shard)
        drawn_3M = PosteriorKernels(library).nucleus(chosen, 0.25, cluster)
        ids_M, inside_M = (drawn_3M[1:].cpu() if drawn_3M is not None else torch.full((2, 4), -1.0)).unbind()
    except KernelError:
        raise
    except RuntimeError as error:  # torch's, of a kernel that failed on its way
        raise KernelError(str(error).splitlines()[0]) from error
    _compare("statistics", stats_4N[:3], torch.tensor([0.0, V - 2, 0.0])[:, None])
    _compare("losses", loss_N, torch.tensor(_loss()))
    _compare("nuclei", inside_M.exp2(), torch.tensor([1.0, 0.0, 0.0, 0.0]))  # 249 of 999 equals are inside
    if not ((ids_M >= 0) & (ids_M < V // 4 - 1)).all():
        raise KernelError(
            f"the kernels draw wrong tokens here: {ids_M.tolist()} of a nucleus of {V // 4 - 1}"
        )
    x_N = grad_NP[:, X0]
    others_NE = torch.cat([grad_NP[:, :X0], grad_NP[:, X0 + 1 : MASK]], 1)
    _compare("gradients", others_NE, -x_N[:, None] / (V - 2))  # those of a softmax sum to 0
    if not (x_N < 0).all():
        raise KernelError(f"the kernels give wrong gradients here: {x_N[0]:.6g} of x0")


def _loss() -> float:
    """Of a masked token among V - 1 equal probabilities, alpha = beta = -alpha' = 1/2: docs/maths.md."""
    p, c = 1 / (V - 1), RATIO / V
    return (1 + c) * math.log1p((V - 2) * p / (p + c)) - c * (V - 2) * math.log1p(p / c)


def _compare(what: str, got: Tensor, want: Tensor) -> None:
    if not ((got - want).abs() <= TOLERANCE * want.abs()).all():
        raise KernelError(
            f"the kernels give wrong {what} here: {got.flatten()[0]:.6g}, not {want.flatten()[0]:.6g}"
        )
