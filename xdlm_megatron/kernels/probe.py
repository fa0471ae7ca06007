"""Whether a library's kernels run here and are right: each of them on a few tokens, beside its PyTorch twin.

A library can be built and loaded where its first launch fails (a driver older than the library's runtime).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus_draw import draw_tokens
from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps, Shard, Tokens
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, ChosenRows, Counters, Draw
from xdlm_megatron.diffusion.vocab_parallel import shard_nelbo
from xdlm_megatron.kernels.library import DTYPES, KernelError, Library
from xdlm_megatron.kernels.nelbo import NelboKernels, nelbo_row_ops
from xdlm_megatron.kernels.posterior import PosteriorKernels, posterior_draw

V, COLUMNS, MASK = 1003, 1024, 1002
# Of a number and of its row's mean size: float32 and approximate instructions need a hundredth, bfloat16 two
# roundings. Ids are equal.
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-2, torch.int64: 0.0}


class Case(NamedTuple):
    """what: run(kernels, logits, parameter) gives, to be compared with what it gives of the twin. parameters:
    uniform_ratio of a loss, top_p of a draw.
    """

    what: str
    run: Callable[[Any, Tensor, float], tuple[Tensor, ...]]
    kernels: RowOps | Draw
    parameters: tuple[float, ...]


def probe(library: Library, device: torch.device) -> None:
    """Waits for every kernel that may serve: logits of either dtype, in one block a row and in a cluster of 2
    where there are any.

    Raises:
        KernelError: one cannot be launched, or gives other numbers than its twin.
    """
    try:
        for case in _cases(library, device):
            for dtype in DTYPES:
                for parameter in case.parameters:
                    got = case.run(case.kernels, _logits(dtype).to(device), parameter)
                    for one, want in zip(got, _by_twin(case.run, dtype, parameter), strict=True):
                        _compare(case.what, one.cpu(), want)
    except KernelError:
        raise
    except (RuntimeError, ValueError) as error:  # a kernel that failed on its way, numbers that are none
        raise KernelError(str(error).splitlines()[0]) from error


def _cases(library: Library, device: torch.device) -> list[Case]:
    nelbo, posterior = NelboKernels(library), PosteriorKernels(library)
    ops, draw = nelbo_row_ops(library), posterior_draw(library)
    surveyed = draw._replace(nucleus=lambda rows, top_p: None)
    mixed, both = (0.1,), (0.1, 0.0)
    cases = [
        Case("losses in passes", _loss, ops._replace(whole=None, rescale=None), both),
        Case("draws", _draw, draw, (1.0,)),
        Case("draws by survey", _draw, surveyed, (0.8,)),
    ]
    for blocks in (1, 2) if library.ask("xdlm_has_clusters", device) else (1,):
        size = f"{blocks} block(s) a row"
        one_read = ops._replace(whole=partial(nelbo.whole, cluster=blocks))
        held = draw._replace(nucleus=partial(posterior.nucleus, cluster=blocks))
        cases += [
            Case(f"losses, {size},", _loss, one_read, both),
            Case(f"losses, {size}, gradient later,", _loss, one_read._replace(rescale=None), mixed),
            Case(f"nuclei, {size},", _draw, held, (0.8,)),
        ]
    return cases


@cache
def _by_twin(run: Callable[[Any, Tensor, float], Any], dtype: torch.dtype, parameter: float) -> Any:
    """On a CPU, once a process."""
    return run(REFERENCE if run is _loss else REFERENCE_DRAW, _logits(dtype), parameter)


def _logits(dtype: torch.dtype) -> Tensor:
    """[4, COLUMNS]. Nuclei of the last two rows end among many near and true equals: those are read again."""
    logits_NP = torch.randn(4, COLUMNS, generator=torch.Generator().manual_seed(0))
    return (logits_NP * torch.tensor([2.0, 2.0, 0.01, 0.0])[:, None]).to(dtype)


def _loss(ops: RowOps, logits_NP: Tensor, uniform_ratio: float) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the mask, x0 and other tokens; upstream gradients are powers of 2. The gradient
    comes with the loss, or afterwards where there is no `rescale`.
    """
    shard, device = Shard(StationaryNoise(uniform_ratio, V, MASK)), logits_NP.device
    zt_N, x0_N = torch.tensor([[MASK, 3, 500, MASK], [1, 3, 7, 999]], device=device).unbind()
    alpha_N, beta_N, upstream_N = torch.tensor([[0.5] * 4, [0.5] * 4, [1.0, 2, 0.5, 4]], device=device)
    tokens = Tokens(zt_N, x0_N, alpha_N, beta_N, -alpha_N)
    loss_N, terms_6N = shard_nelbo(logits_NP, tokens, shard, None, ops, logits_NP if ops.rescale else None)
    if ops.rescale:
        ops.rescale(logits_NP, tokens, upstream_N, shard)
    else:
        ops.grad(logits_NP, tokens, terms_6N, upstream_N, shard, logits_NP)
    return loss_N, logits_NP


def _draw(draw: Draw, logits_NP: Tensor, top_p: float) -> tuple[Tensor, ...]:
    """Keys, ids and x of z_t: the mask, a likely token, and of near equals some inside and some outside."""
    likely = int(logits_NP[1, :MASK].argmax())
    index_M = torch.tensor([0, 1, 2, 2, 2, 3, 3], device=logits_NP.device)
    zt_M = torch.tensor([MASK, likely, 100, 300, 900, 100, 900], device=logits_NP.device)
    row_M = torch.arange(len(index_M), device=logits_NP.device)
    counters = Counters((0, Stream.SAMPLE_STEP), 0, row_M, row_M)
    shard = Shard(StationaryNoise(0.1, V, MASK))
    return draw_tokens(draw, ChosenRows(logits_NP, index_M, zt_M, counters, shard), top_p, None)


def _compare(what: str, got: Tensor, want: Tensor) -> None:
    tolerance, got, want = TOLERANCES[want.dtype], got.double(), want.double()
    size = want.masked_fill(want.isinf(), 0.0).abs().mean(-1, keepdim=True)
    right = (got == want) | ((got - want).abs() <= tolerance * (want.abs() + size))
    if not right.all():
        raise KernelError(
            f"the kernels give wrong {what} here: {got[~right][0]:.6g}, not {want[~right][0]:.6g}"
        )
