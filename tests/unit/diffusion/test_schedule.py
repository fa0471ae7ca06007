import pytest
import torch

from xdlm_megatron.diffusion.counter_rng import Stream
from xdlm_megatron.diffusion.schedule import SCHEDULES, Cosine, LogLinear, Snr, stratified_t

F64 = torch.float64
every_schedule = pytest.mark.parametrize(
    "schedule", [cls() for cls in SCHEDULES.values()], ids=list(SCHEDULES)
)


@every_schedule
def test_alpha_and_beta_sum_to_one_and_dalpha_is_the_slope(schedule):
    t = torch.linspace(0.01, 0.99, 99, dtype=F64, requires_grad=True)
    alpha = schedule.alpha(t)
    torch.testing.assert_close(alpha + schedule.beta(t), torch.ones_like(t), rtol=0, atol=1e-15)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.dalpha(t), slope, rtol=1e-12, atol=1e-14)
    assert (slope < 0).all()


@every_schedule
def test_ends(schedule):
    alpha = schedule.alpha(torch.tensor([0.0, 1.0], dtype=F64)).tolist()
    start = 1 - 1e-3 if isinstance(schedule, Snr) else 1.0
    assert alpha == pytest.approx([start, 1e-3], rel=1e-12)


@every_schedule
def test_beta_keeps_its_digits_in_float32(schedule):
    t = torch.tensor([1e-5, 1e-4, 1e-3], dtype=F64)
    torch.testing.assert_close(
        schedule.beta(t.float()).double(), schedule.beta(t.float().double()), rtol=1e-6, atol=0
    )


def test_values_of_the_paper_s_schedule():
    t = torch.tensor([0.25], dtype=F64)
    assert LogLinear().alpha(t).item() == pytest.approx(1 - 0.999 * 0.25, abs=1e-15)
    assert Cosine(alpha_min=0.1).beta(t).item() == pytest.approx(0.9 * 0.3826834323650898, abs=1e-15)
    assert Snr().alpha(torch.tensor([0.5], dtype=F64)).item() == 0.5


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("alpha_min", [0.0, 0.5, -1.0])
def test_a_bad_alpha_min_teaches(name, alpha_min):
    with pytest.raises(ValueError, match=rf"alpha_min={alpha_min} must be in \(0, 0.5\)"):
        SCHEDULES[name](alpha_min)


def test_times_are_stratified_over_the_global_batch():
    n, first = 64, 640
    index = torch.arange(n)
    t = stratified_t((5, Stream.TIME), first + index, index, n)
    assert t.dtype == F64
    u = (t - 1e-3) / (1 - 1e-3)
    assert torch.equal((u * n).floor().long(), index)  # exactly one in each of the n strata
    assert (u * n - index).std() > 0.2
    again = stratified_t((5, Stream.TIME), 2 * first + index, index, n)
    assert not torch.equal(t, again)


def test_times_do_not_depend_on_the_slice():
    index = torch.arange(64)
    whole = stratified_t((5, Stream.TIME), 640 + index, index, 64)
    for part in (slice(0, 1), slice(17, 40), slice(63, 64), slice(0, 64, 3)):
        assert torch.equal(stratified_t((5, Stream.TIME), 640 + index[part], index[part], 64), whole[part])


def test_times_reach_no_further_than_their_ends():
    t = stratified_t((0, Stream.TIME), torch.arange(20000), torch.zeros(20000), 1, t_min=0.2)
    assert 0.2 <= t.min() < 0.201
    assert 0.999 < t.max() <= 1
