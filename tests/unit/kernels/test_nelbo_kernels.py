"""The kernels' own source against float64 brute force: on the host (threads for a block), and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xdlm_megatron.diffusion.nelbo import nelbo_density
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.row_ops import REFERENCE, RowOps, Shard, Tokens
from xdlm_megatron.kernels.library import Library
from xdlm_megatron.kernels.nelbo import nelbo_row_ops

F64 = torch.float64
RATIOS = [0.0, 1e-3, 0.1, 0.5, 1.0]
BETAS = [1e-3, 0.5, 1 - 1e-3]
KINDS = 3  # z_t is the mask, x0, another token
GRAD_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}  # of a row's largest gradient
RESTS = [1e-1, 1e-3, 1e-5, 1e-7]  # 1 - p_x of nearly certain tokens
# vocabulary -> columns of all shards together (a multiple of 4), the padding included
PADDED = {250: 256, 1000: 1004, 32003: 32128, 50304: 50304, 131072: 131072}


@pytest.fixture(scope="module")
def ops(library: Library) -> RowOps:
    return nelbo_row_ops(library)


def make_case(V: int, k: float, dtype: torch.dtype, betas: list[float] = BETAS, scale: float = 3.0) -> tuple:
    """(logits [N, P] with garbage at mask and padding, tokens, noise, upstream): a row a kind and beta, and a
    row of NaN without weight.
    """
    generator = torch.Generator().manual_seed(V)
    noise = StationaryNoise(k, V, V // 3)
    kinds = torch.tensor([V // 3, 1, V - 1]).repeat(len(betas))
    N = len(kinds) + 1
    logits = scale * torch.randn(N, PADDED[V], generator=generator)
    logits[:, V:] = 50.0
    logits[:, V // 3] = 60.0
    logits[-1] = torch.nan
    zt = torch.cat([kinds, torch.tensor([1])])
    beta = torch.cat([torch.tensor(betas, dtype=F64).repeat_interleave(KINDS), torch.zeros(1, dtype=F64)])
    dalpha = torch.where(torch.arange(N) < N - 1, -0.999, 0.0)
    x0 = torch.where(torch.arange(N) < N - 1, 1, V // 3)
    tokens = Tokens(zt, x0, *(rate.float() for rate in (1 - beta, beta, dalpha)))
    upstream = 0.5 + torch.rand(N, generator=generator)
    return logits.to(dtype), tokens, noise, upstream


def make_certain_case(V: int, k: float, dtype: torch.dtype) -> tuple:
    """make_case with every row at every 1 - p_x of RESTS, and an upstream gradient of 1."""
    logits, tokens, noise, _ = make_case(V, k, torch.float32)
    rows = torch.arange(len(logits)).repeat_interleave(len(RESTS))
    logits, tokens = logits[rows], tokens[rows]
    others = logits.to(F64)
    others[:, [1, V // 3, *range(V, PADDED[V])]] = -torch.inf
    rest = torch.tensor(RESTS, dtype=F64).repeat(len(logits) // len(RESTS))
    logits[:, 1] = others.logsumexp(1) - rest.logit()
    return logits.to(dtype), tokens, noise, torch.ones(len(logits))


def by_brute_force(logits_NP: Tensor, tokens: Tokens, noise: StationaryNoise, upstream_N: Tensor) -> tuple:
    """Loss and gradient in float64, of the same logits and rates, by autograd through the dense loss."""
    leaf = logits_NP.to(F64).requires_grad_()
    rates = (rate.to(F64)[None] for rate in (tokens.alpha_N, tokens.beta_N, tokens.dalpha_N))
    loss = nelbo_density(leaf[None], tokens.zt_N[None], tokens.x0_N[None], *rates, noise)[0]
    (grad,) = torch.autograd.grad(loss, leaf, upstream_N.to(F64))
    return loss.detach(), grad


def by_row_ops(
    ops: RowOps,
    logits_NP: Tensor,
    tokens: Tokens,
    noise: StationaryNoise,
    upstream_N: Tensor | None,
    tp: int,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient over `tp` slices of the columns, as that many ranks would; the gradient in place."""
    P = logits_NP.shape[1] // tp
    slices = [logits_NP[:, r * P : (r + 1) * P] for r in range(tp)]
    shards = [Shard(noise, r * P) for r in range(tp)]
    pairs = list(zip(slices, shards, strict=True))
    merged_5N = ops.merge(torch.stack([ops.stats(x, tokens, shard) for x, shard in pairs]), tokens, noise)
    sums_R2N = None
    if noise.uniform_ratio > 0:
        sums_R2N = torch.stack([ops.sums(x, tokens, merged_5N, shard) for x, shard in pairs])
    loss_N, terms_6N = ops.finish(merged_5N, sums_R2N, tokens, noise)
    for x, shard in pairs:
        ops.grad(x, tokens, terms_6N, upstream_N, shard, x)
    return loss_N, logits_NP


def move(tokens: Tokens, device: str) -> Tokens:
    names = ("zt_N", "x0_N", "alpha_N", "beta_N", "dalpha_N")
    return Tokens(*(getattr(tokens, name).to(device) for name in names))


def check(
    got: tuple, want: tuple, tokens: Tokens, noise: StationaryNoise, upstream: Tensor, tol: float
) -> None:
    (loss, grad), (want_loss, want_grad) = got, want
    # a loss near 0 is compared with the scale of its row, 1 / beta
    floor = 1e-2 * tokens.dalpha_N.abs().to(F64) / tokens.beta_N.clamp_min(1e-30)
    error = ((loss.to(F64) - want_loss).abs() / (want_loss.abs() + floor).clamp_min(1e-30)).max()
    assert error < 1e-4, error
    live = tokens.live(noise)
    size = want_grad.abs().amax(1)
    assert (size[live] > 0).all(), "the check must have something to compare with"
    error = ((grad.to(F64) - want_grad).abs().amax(1) / size.clamp_min(1e-30))[live].max()
    assert error < tol, error
    assert (loss[~live] == 0).all()
    assert (grad[~live] == 0).all()
    assert (grad[:, noise.vocab_size :] == 0).all()
    assert (grad[:, noise.mask_id] == 0).all()


def by_whole(
    ops: RowOps, logits_NP: Tensor, tokens: Tokens, noise: StationaryNoise, upstream_N: Tensor, **options: int
) -> tuple[Tensor, Tensor]:
    """Loss and gradient with one read, the gradient in place and scaled afterwards."""
    loss_N, _ = ops.whole(logits_NP, tokens, Shard(noise), logits_NP, **options)
    ops.rescale(logits_NP, tokens, upstream_N, Shard(noise))
    return loss_N, logits_NP


@pytest.mark.parametrize("dtype", GRAD_TOLERANCE)
@pytest.mark.parametrize("k", RATIOS)
@pytest.mark.parametrize("V", [250, 1000])
def test_a_row_in_the_shared_memory_of_a_cluster(V, k, dtype, ops, library) -> None:
    """Every cluster size; the last blocks of a cluster of 8 have few columns or none."""
    logits, tokens, noise, upstream = make_case(V, k, dtype)
    upstream = torch.ones_like(upstream)
    want = by_brute_force(logits, tokens, noise, upstream)
    on = library.device_type
    for cluster in (0, 2, 4, 8) if library.ask("xdlm_has_clusters", torch.device(on)) else (0, 1):
        arguments = (logits.clone().to(on), move(tokens, on), noise, upstream.to(on))
        got = (x.cpu() for x in by_whole(ops, *arguments, cluster=cluster))
        check(got, want, tokens, noise, upstream, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("V", [32003, 50304, 131072])
@pytest.mark.parametrize("k", RATIOS)
def test_rows_of_trained_vocabularies_in_a_cluster(V, k, ops, library) -> None:
    """The factors of bfloat16 gradients are powers of 2: rescale rounds a second time."""
    on = library.device_type
    for dtype, betas in ((torch.float32, [1e-3]), (torch.bfloat16, [1 - 1e-3])):
        logits, tokens, noise, upstream = make_case(V, k, dtype, betas, scale=2.0)
        if dtype == torch.bfloat16:
            upstream = torch.exp2((4 * upstream).round() - 4)
        want = by_brute_force(logits, tokens, noise, upstream)
        arguments = (logits.clone().to(on), move(tokens, on), noise, upstream.to(on))
        got = (x.cpu() for x in by_whole(ops, *arguments))
        check(got, want, tokens, noise, upstream, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", GRAD_TOLERANCE)
@pytest.mark.parametrize("k", RATIOS)
@pytest.mark.parametrize("V", [250, 1000])
def test_small_vocabularies_split_among_1_2_and_4_ranks(V, k, dtype, ops, library) -> None:
    logits, tokens, noise, upstream = make_case(V, k, dtype)
    want = by_brute_force(logits, tokens, noise, upstream)
    on = library.device_type
    for tp in (1, 2, 4):
        arguments = (logits.clone().to(on), move(tokens, on), noise, upstream.to(on))
        got = (x.cpu() for x in by_row_ops(ops, *arguments, tp))
        check(got, want, tokens, noise, upstream, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("V", [32003, 50304])
@pytest.mark.parametrize("k", RATIOS)
def test_trained_vocabularies_split_among_1_2_and_4_ranks(V, k, ops, library) -> None:
    """Every kind of token; every number of ranks and both dtypes at every beta."""
    on = library.device_type
    for dtype in GRAD_TOLERANCE:
        logits, tokens, noise, upstream = make_case(V, k, dtype, scale=2.0)
        want = by_brute_force(logits, tokens, noise, upstream)
        for tp in (1, 2, 4):
            arguments = (logits.clone().to(on), move(tokens, on), noise, upstream.to(on))
            got = (x.cpu() for x in by_row_ops(ops, *arguments, tp))
            check(got, want, tokens, noise, upstream, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("k", RATIOS)
def test_the_largest_vocabulary_split_among_1_2_and_4_ranks(k, ops, library) -> None:
    """Every kind of token at both ends of the schedule; both dtypes in turn."""
    on = library.device_type
    for dtype, betas in ((torch.float32, [1e-3, 1 - 1e-3]), (torch.bfloat16, [0.5])):
        logits, tokens, noise, upstream = make_case(131072, k, dtype, betas, scale=2.0)
        want = by_brute_force(logits, tokens, noise, upstream)
        for tp in (1, 2, 4):
            arguments = (logits.clone().to(on), move(tokens, on), noise, upstream.to(on))
            got = (x.cpu() for x in by_row_ops(ops, *arguments, tp))
            check(got, want, tokens, noise, upstream, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", GRAD_TOLERANCE)
@pytest.mark.parametrize("k", RATIOS)
def test_a_nearly_certain_token_s_gradient_keeps_its_digits(k, dtype, ops, library) -> None:
    """It vanishes with 1 - p_x. PyTorch and the kernels; x0 is on one of several ranks or blocks."""
    logits, tokens, noise, upstream = make_certain_case(1000, k, dtype)
    want = by_brute_force(logits, tokens, noise, upstream)
    on = library.device_type
    arguments = (move(tokens, on), noise, upstream.to(on))
    got = [
        by_row_ops(each, logits.clone().to(on), *arguments, tp)
        for each in (ops, REFERENCE)
        for tp in (1, 2, 4)
    ]
    clusters = (0, 4) if library.ask("xdlm_has_clusters", torch.device(on)) else (0,)
    got += [by_whole(ops, logits.clone().to(on), *arguments, cluster=cluster) for cluster in clusters]
    for loss, grad in got:
        check((loss.cpu(), grad.cpu()), want, tokens, noise, upstream, GRAD_TOLERANCE[dtype])


@pytest.mark.parametrize("k", RATIOS)
def test_a_certain_token_has_no_gradient(k, ops, library) -> None:
    """p_x = 1 exactly: nothing is left of the others, in any slice."""
    _, tokens, noise, upstream = make_case(250, k, torch.float32)
    on = library.device_type
    logits = torch.full((len(tokens), PADDED[250]), -torch.inf, device=on)
    logits[:, 1] = 3.0
    arguments = (move(tokens, on), noise, upstream.to(on))
    got = [by_row_ops(each, logits.clone(), *arguments, tp) for each in (ops, REFERENCE) for tp in (1, 4)]
    for loss, grad in [*got, by_whole(ops, logits.clone(), *arguments)]:
        assert (loss == 0).all()
        assert (grad == 0).all()
