"""The draw's kernel against its readable twin, and its law against brute force: on the host and on a GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from xdlm_megatron.diffusion import nucleus_draw, token_race
from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.nucleus_draw import draw_share, draw_tokens
from xdlm_megatron.diffusion.posterior import posterior, token_law
from xdlm_megatron.diffusion.posterior_draw import ReverseStep
from xdlm_megatron.diffusion.prediction import Logits
from xdlm_megatron.diffusion.row_ops import Shard
from xdlm_megatron.diffusion.shard_rows import LOG2_E
from xdlm_megatron.diffusion.survey import BinTokens, bins_of
from xdlm_megatron.diffusion.token_race import REFERENCE_DRAW, ChosenRows, Counters, Draw, draw_shard
from xdlm_megatron.kernels.library import Library
from xdlm_megatron.kernels.posterior import PosteriorKernels, posterior_draw

KEY = (4_000_000_011, Stream.SAMPLE_STEP)
# vocabulary -> columns of all shards together, the padding included
PADDED = {250: 256, 1003: 1024, 32003: 32128, 50304: 50304, 131072: 131072}


@pytest.fixture(scope="module")
def draw(library: Library) -> Draw:
    return posterior_draw(library)


def make_case(V: int, rows: int, dtype: torch.dtype, device: str, M: int = 0) -> tuple:
    """(logits with garbage at mask and padding, index, z_t, counters, noise): M draws from `rows` rows."""
    generator = torch.Generator().manual_seed(V)
    noise, M = StationaryNoise(0.3, V, V // 3), M or rows
    logits = 2 * torch.randn(rows, PADDED[V], generator=generator)
    logits[:, V:] = 50.0
    logits[:, V // 3] = 60.0
    index = torch.arange(M) % rows
    z = torch.randint(V, (M,), generator=generator)
    z[0] = V // 3
    counters = Counters(KEY, 5, *(x.to(device) for x in (torch.arange(M), 3_000_000_000 + index)))
    return logits.to(dtype).to(device), index.to(device), z.to(device), counters, noise


def assert_same_draw(got: Tensor, want: Tensor) -> None:
    assert torch.equal(got[1], want[1]), "ids"
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=3e-6)
    torch.testing.assert_close(got[2], want[2], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "rows", "M"), [(250, 40, 400), (1003, 20, 200), (32003, 6, 6), (131072, 2, 2)])
def test_it_draws_the_twin_s_ids(
    draw: Draw, library: Library, V: int, rows: int, M: int, dtype: torch.dtype
) -> None:
    logits, index, z, counters, noise = make_case(V, rows, dtype, library.device_type, M)
    for temperature in (1.0, 0.4):
        chosen = ChosenRows(logits, index, z, counters, Shard(noise), temperature)
        assert_same_draw(draw.shard(chosen), draw_shard(chosen))


NARROWED = ((1.0, 0.9), (0.7, 0.8), (2.0, 0.3), (1.0, 1e-6))  # temperature, top_p


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "rows", "M"), [(250, 40, 80), (1003, 20, 40), (32003, 4, 6), (131072, 1, 1)])
def test_one_read_draws_from_the_nucleus(
    draw: Draw, library: Library, V: int, rows: int, M: int, dtype: torch.dtype
) -> None:
    logits, index, z, counters, noise = make_case(V, rows, dtype, library.device_type, M)
    for temperature, top_p in NARROWED[: 4 if V < 131072 else 2]:
        chosen = ChosenRows(logits, index, z, counters, Shard(noise), temperature)
        got = draw.nucleus(chosen, top_p)
        assert_same_draw(got, draw_share(chosen, top_p, None))
        law = token_law(logits, noise, temperature, top_p)[index]
        assert (law.gather(1, got[1].long()[:, None]) > 0).all()
        assert torch.equal(got[2] > -torch.inf, law.gather(1, z[:, None])[:, 0] > 0)


@pytest.mark.parametrize(
    ("std", "dtype"),
    [(6.0, torch.bfloat16), (0.02, torch.bfloat16), (0.0, torch.bfloat16), (0.02, torch.float32)],
)
def test_a_nucleus_that_ends_among_many_equals(
    draw: Draw, library: Library, std: float, dtype: torch.dtype
) -> None:
    """A few coarse values carry it, or one bin has all of them: of equals those of the lowest ids are inside,
    whatever the number of blocks.
    """
    for V in (250, 2043):
        generator = torch.Generator().manual_seed(V)
        noise, rows = StationaryNoise(0.3, V, V // 3), torch.arange(12)
        logits = (std * torch.randn(12, V + 5, generator=generator)).to(dtype)
        counters = Counters(KEY, 5, *(rows.to(library.device_type) for _ in range(2)))
        z = torch.randint(V, (12,), generator=generator)
        where = [x.to(library.device_type) for x in (logits, rows, z)]
        for temperature, top_p in NARROWED[1:]:
            chosen = ChosenRows(*where, counters, Shard(noise), temperature)
            want = draw_share(chosen, top_p, None)
            drawn = [PosteriorKernels(library).nucleus(chosen, top_p, blocks) for blocks in (0, 2, 4)]
            assert_same_draw(drawn[0], want)
            assert torch.equal(drawn[0], drawn[1])
            assert torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("std", "dtype", "most"),
    [
        (2.0, torch.float32, 0.05),
        (6.0, torch.bfloat16, 0.25),
        (0.02, torch.float32, 1),
        (0, torch.bfloat16, 1),
    ],
)
def test_a_survey_draws_the_same_and_reads_few_rows_again(
    draw: Draw,
    library: Library,
    monkeypatch: pytest.MonkeyPatch,
    std: float,
    dtype: torch.dtype,
    most: float,
) -> None:
    """What several ranks do; one rank never reads a row twice. Coarse logits of std 6 are a bad case; where
    all tokens are about equally probable each row's are all seen again, some rows at a time.
    """
    again = []

    def counted(self: PosteriorKernels, chosen: ChosenRows, at: Tensor, *rest: Tensor) -> BinTokens:
        again.append(len(at))
        return see(self, chosen, at, *rest)

    see = PosteriorKernels._bin_tokens
    monkeypatch.setattr(PosteriorKernels, "_bin_tokens", counted)
    monkeypatch.setattr(nucleus_draw, "TOKENS", 3000)
    logits, index, z, counters, noise = make_case(1003, 60, torch.float32, library.device_type, 240)
    chosen = ChosenRows((logits * (std / 2)).to(dtype), index, z, counters, Shard(noise), 0.7)
    once = draw_tokens(draw, chosen, 0.8, None)
    assert again == []
    surveyed = draw_tokens(draw._replace(nucleus=lambda rows, top_p: None), chosen, 0.8, None)
    assert 0 < sum(again) <= most * 240
    assert len(again) > 1 or most < 1
    reference = draw_tokens(REFERENCE_DRAW, chosen, 0.8, None)
    for one, other, twin in zip(once, surveyed, reference, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, twin, rtol=0, atol=3e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tp", [2, 4])
def test_slices_of_the_vocabulary_are_the_whole(
    draw: Draw, library: Library, tp: int, temperature: float
) -> None:
    """The best of the slices is the whole's, key and all: a tile's number is its place in the vocabulary.

    Of the surveys, so are the masses' sums and the best of all bins above a bin.
    """
    for V, rows in ((250, 20), (1003, 20), (32003, 4)):
        logits, index, z, counters, noise = make_case(V, rows, torch.bfloat16, library.device_type, 2 * rows)
        P = logits.shape[1] // tp
        slices = [(logits[:, r * P : (r + 1) * P], Shard(noise, r * P)) for r in range(tp)]
        rest = (index, z, counters)
        chosen = ChosenRows(logits, *rest, Shard(noise), temperature)
        sliced = [ChosenRows(x, *rest, shard, temperature) for x, shard in slices]
        whole = draw.shard(chosen)
        shares = torch.stack([draw.shard(one) for one in sliced])
        key, rank = shares[:, 0].max(0)
        assert torch.equal(key, whole[0])
        assert torch.equal(shares[:, 1].gather(0, rank[None])[0], whole[1])
        assert torch.equal(shares[:, 2].amax(0), whole[2])
        whole = draw.survey(chosen)
        parts = [draw.survey(one) for one in sliced]
        assert draw.nucleus(sliced[0], 0.9) is None
        assert torch.equal(torch.stack([part.top_M for part in parts]).amax(0), whole.top_M)
        assert torch.equal(torch.stack([part.zt_M for part in parts]).amax(0), whole.zt_M)
        top, scale = bins_of(whole.top_M, LOG2_E / temperature), LOG2_E / temperature
        downwards = [part.downwards(top, bins_of(part.top_M, scale)) for part in (whole, *parts)]
        masses, bests = (torch.stack(x) for x in zip(*downwards, strict=True))
        bests = bests.cummax(2).values
        known = masses[0] > 0  # a level below the whole's last, a slice may know more
        assert torch.equal(masses[1:].sum(0)[known], masses[0][known])
        assert torch.equal(bests[1:].amax(0)[known], bests[0][known])


def test_any_alignment_and_ragged_rows(draw: Draw, library: Library) -> None:
    """Columns that are no multiple of 8, rows that begin anywhere, rows apart."""
    device = library.device_type
    noise, index = StationaryNoise(0.3, 45, 44), torch.arange(200, device=device)
    counters = Counters(KEY, 0, index, index)
    table = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        for logits in (table[:, :45], table[:, 3:50], table[:, 1:].contiguous()[:, :46]):
            chosen = ChosenRows(logits.to(dtype), index, index % 45, counters, Shard(noise))
            assert_same_draw(draw.shard(chosen), draw_shard(chosen))
            some = chosen.only(index[::8])
            assert_same_draw(draw.nucleus(some, 0.7), draw_share(some, 0.7, None))


def test_more_bits_where_the_race_is_won(
    draw: Draw, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are found to have a word below the bound, where 32 bits more decide."""
    V, device = 1003, library.device_type
    rows = torch.arange(60_000, device=device)
    counters = Counters(KEY, 1, rows, rows * 0)
    monkeypatch.setattr(token_race, "REFINE_BELOW", 0)
    coarse = token_race.tile_exponentials(counters, 0, PADDED[V] // 8)
    monkeypatch.undo()
    fine = token_race.tile_exponentials(counters, 0, PADDED[V] // 8)
    row, tile = (coarse != fine).nonzero()[:20].unbind(1)
    assert len(row) >= 3
    # all the weight on that tile: its key is -log2 of its exponential
    logits = torch.full((len(row), PADDED[V]), -1e4, device=device)
    logits[torch.arange(len(row)), 8 * tile] = 0.0
    noise, index = StationaryNoise(0.3, V, V - 1), torch.arange(len(row), device=device)
    got = draw.shard(ChosenRows(logits, index, index, counters[row], Shard(noise)))
    # lg2.approx errs by as much on a device; the bits that are tested move keys by far more
    tolerance = 3e-6 if device == "cpu" else 1e-5
    torch.testing.assert_close(got[0], -fine[row, tile].log2(), rtol=0, atol=tolerance)
    assert ((got[0] + coarse[row, tile].log2()).abs() > 5e-5).any()


def test_nan_and_nothing(draw: Draw, library: Library) -> None:
    logits, index, z, counters, noise = make_case(250, 4, torch.float32, library.device_type)
    logits[1, 77] = torch.nan
    logits[2, 7] = torch.inf
    logits[3, :] = -torch.inf
    chosen = ChosenRows(logits, index, z, counters, Shard(noise))
    got = draw.shard(chosen)
    assert got[0].isnan().tolist() == [False, True, True, False]
    assert ((got[1] >= 0) & (got[1] < 250)).all()
    assert draw.survey(chosen).top_M.isnan().tolist() == [False, True, False, False]
    nucleus = draw.nucleus(chosen, 0.9)
    assert nucleus[0].isnan().tolist() == [False, True, True, False]
    assert nucleus[0, 3] == got[0, 3] == -torch.inf
    beyond = chosen._replace(shard=Shard(noise, 256))
    padding = draw.shard(beyond)
    assert padding[0].tolist() == padding[2].tolist() == [-torch.inf] * 4
    survey = draw.survey(beyond)
    assert survey.top_M.tolist() == survey.zt_M.tolist() == [-torch.inf] * 4
    assert not survey.mass_MS.any()
    none = chosen.only(index[:0])
    assert draw.shard(none).shape == draw.nucleus(none, 0.9).shape == (3, 0)


WAYS = {
    "twin": lambda draw: REFERENCE_DRAW,
    "nucleus": lambda draw: draw,
    "survey": lambda draw: draw._replace(nucleus=lambda rows, top_p: None),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_no_way_draws_from_what_is_not_finite(draw: Draw, library: Library, way: str, top_p: float) -> None:
    logits, index, z, counters, noise = make_case(250, 4, torch.float32, library.device_type)
    for bad in (torch.nan, torch.inf):
        for column in (0, 77, 249):
            logits[1, column] = bad
            logits[3] = -torch.inf
            chosen = ChosenRows(logits, index, z, counters, Shard(noise))
            with pytest.raises(ValueError, match="NaN or infinite at 2 of 4 positions"):
                draw_tokens(WAYS[way](draw), chosen, top_p, None)
            logits[1, column] = 0.0


@pytest.mark.parametrize("way", WAYS)
def test_next_to_no_temperature_takes_the_likeliest(draw: Draw, library: Library, way: str) -> None:
    """Keys of 10^6 and far more: no bound cuts them, though few bits behind the point are left."""
    logits, index, z, counters, noise = make_case(250, 12, torch.float32, library.device_type)
    hidden = logits.clone()
    hidden[:, 250:] = hidden[:, noise.mask_id] = -torch.inf
    for temperature in (1e-5, 3e-6, 1e-12):
        chosen = ChosenRows(logits, index, z, counters, Shard(noise), temperature)
        _, ids, _ = draw_tokens(WAYS[way](draw), chosen, 0.9, None)
        assert torch.equal(ids, hidden.argmax(-1))


def test_who_serves_depends_on_the_vocabulary_alone(draw: Draw, library: Library) -> None:
    """Not on how many columns of it a rank has, or other ids would come of another number of ranks."""
    index, logits = (torch.zeros(n, dtype=torch.int64, device=library.device_type) for n in (1, 600_000))
    logits = logits.bfloat16()[None]
    for V, serves in ((524_224, True), (524_225, False), (600_000, False)):
        noise = StationaryNoise(0.3, V, 0)
        for first, last in ((0, V), (0, 300_000), (300_000, V)):
            rows = (logits[:, first:last], index, index, Counters(KEY, 5, index, index), Shard(noise, first))
            assert (draw.survey(ChosenRows(*rows)) is not None) == serves
            assert serves or draw.nucleus(ChosenRows(*rows), 0.9) is None


NARROW = {"top_p": 0.8, "temperature": 1.5}


@pytest.mark.parametrize(
    ("k", "alpha_s", "options"),
    [(0.3, 0.8, {}), (0.3, 0.8, NARROW), (0.3, 1.0, NARROW), (0.0, 0.8, {}), (0.0, 1.0, {}), (1.0, 0.8, {})],
)
def test_steps_draw_from_the_dense_posterior(
    draw: Draw, library: Library, k: float, alpha_s: float, options: dict
) -> None:
    """For z the mask (where there is such noise), a likely and an unlikely token; the last step too."""
    V, mask, device = 20, 3, library.device_type
    noise = StationaryNoise(k, V, mask)
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(1))
    p = token_law(logits, noise, **options)
    rates = [torch.tensor(alpha, dtype=torch.float64) for alpha in (alpha_s, 0.4)]
    real = logits[0].clone()
    real[mask] = -torch.inf
    for z in (*([mask] if k < 1 else []), int(real.argmax()), int(logits[0].argmin())):
        zt = torch.full((5, 300), z, device=device)
        step = ReverseStep(KEY, 2, torch.arange(5, device=device), noise, *rates, **options, draw=draw)
        zs, undecided = step.settle(zt, torch.ones_like(zt, dtype=torch.bool))
        output = Logits(logits.to(device).expand(5, 300, -1).contiguous())
        zs = output.replace(zs, undecided, partial(step.pick, zt))
        law = posterior(p[None], torch.tensor([[z]]), *(rate[None] for rate in rates), noise)[0, 0]
        counts = torch.bincount(zs.flatten().cpu(), minlength=V)
        common = law * zs.numel() >= 5
        observed = [*counts[common].tolist(), int(counts[~common].sum())]
        expected = [*(law[common] * zs.numel()).tolist(), float(law[~common].sum()) * zs.numel()]
        if expected[-1] < 5:
            observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
        if len(observed) == 1:  # k = 0: a visible token stays
            assert counts[z] == zs.numel()
        else:
            assert chisquare(observed, expected).pvalue > 1e-4


def test_tensors_that_it_cannot_take_are_refused(draw: Draw, library: Library) -> None:
    logits, index, z, counters, noise = make_case(250, 4, torch.float32, library.device_type)
    chosen = ChosenRows(logits, index, z, counters, Shard(noise))
    with pytest.raises(ValueError, match=r"logits of dtype torch.float16: the kernels take float32 and b"):
        draw.shard(chosen._replace(logits_NP=logits.half()))
    with pytest.raises(ValueError, match="columns must be contiguous"):
        draw.nucleus(chosen._replace(logits_NP=logits[:, ::2]), 0.5)
    with pytest.raises(ValueError, match="begins at id 100 cuts a tile; pad it to a multiple of 8"):
        draw.survey(chosen._replace(shard=Shard(noise, 100)))
