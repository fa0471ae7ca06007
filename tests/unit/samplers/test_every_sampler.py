"""What holds for every sampler: prompts stay, rows are their own, calls are counted."""

import pytest
import torch
from pydantic import TypeAdapter

from xdlm_megatron.config.samplers import Sampler
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.samplers import SAMPLERS, sample

V, MASK, S = 12, 5, 8
OWN, LEFT = (1.5 * torch.randn(V, V, generator=torch.Generator().manual_seed(i)) for i in range(2))
OWN[:, MASK] += 6  # a mask is never drawn, however probable the network holds it
VARIANTS = [
    *({"kind": kind} for kind in SAMPLERS),
    {"kind": "ancestral", "final": "greedy"},
    {"kind": "remdm", "strategy": "conf", "eta": 1.0},
    {"kind": "remdm", "strategy": "rescale", "eta": 0.5, "remask_below_t": 0.6},
    {"kind": "saber", "variant": "paper"},
    *({"kind": kind, "block_size": 3, "guidance_scale": 0.7} for kind in SAMPLERS),
]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))


def settings_of(variant):
    steps = {} if variant["kind"] in ("saber", "left_to_right") else {"num_steps": 4}
    return TypeAdapter(Sampler).validate_python(steps | variant)


def network(z_BS):
    return OWN[z_BS] + LEFT[z_BS.roll(1, 1)]


def random_prompts(rows):
    """About half of the positions observed, any id among them, the mask's too; some rows wholly."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(V, (rows, S), generator=generator)
    share = torch.rand(rows, 1, generator=generator) * 1.2
    return torch.where(torch.rand(rows, S, generator=generator) < share, ids, -1)


@every_variant
@pytest.mark.parametrize("k", [0.0, 0.4])
def test_prompts_are_bit_identical_after_10_000_draws(variant, k):
    observed = random_prompts(10_000)
    known = observed >= 0
    asked, seen = [], []

    def spy(z_BS):
        asked.append(z_BS.clone())
        return network(z_BS)

    found = sample(
        spy,
        settings_of(variant),
        StationaryNoise(k, V, MASK),
        LogLinear(),
        8,
        observed,
        on_step=lambda t, z: seen.append(z.clone()),
    )
    assert (known.sum(1) == S).any()
    for z in (*seen, found.ids_BS, *([] if "guidance_scale" in variant else asked)):
        assert torch.equal(z[known], observed[known])
    assert (found.last_change_BS[known] == 0).all()
    free = found.ids_BS[~known]
    assert (free != MASK).all()
    assert torch.equal(free.unique(), torch.tensor([i for i in range(V) if i != MASK]))
    assert int(found.evaluations_B.max()) <= len(asked)
    assert (found.evaluations_B[known.all(1)] == 0).all()
    assert (found.evaluations_B[~known.all(1)] > 0).all() or variant["kind"] == "ancestral"


@every_variant
def test_a_row_does_not_depend_on_its_batch(variant):
    observed, noise = random_prompts(40), StationaryNoise(0.3, V, MASK)
    whole = sample(network, settings_of(variant), noise, LogLinear(), 8, observed)
    rows = torch.tensor([31, 7, 12])
    part = sample(network, settings_of(variant), noise, LogLinear(), 8, observed[rows], rows)
    for name in ("ids_BS", "evaluations_B", "steps_B", "last_change_BS"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
    again = sample(network, settings_of(variant), noise, LogLinear(), 9, observed)
    assert not torch.equal(again.ids_BS, whole.ids_BS)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_network_that_fails_is_refused(kind):
    noise = StationaryNoise(0.3, V, MASK)
    with pytest.raises(ValueError, match="the network's output is NaN"):
        sample(
            lambda z: network(z) * torch.nan,
            settings_of({"kind": kind}),
            noise,
            LogLinear(),
            1,
            torch.full((2, S), -1),
        )
