"""The batched Saber takes the steps of a scalar port of its rule, on random networks."""

from itertools import pairwise

import pytest
import torch
from saber_rule import Memory, saber_step

from xdlm_megatron.config.samplers import SaberSampler
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.samplers import sample

V, MASK, S, ROWS = 11, 4, 24, 60
NOISE = StationaryNoise(0.1, V, MASK)
OWN, LEFT, ALL = (torch.randn(V, V, generator=torch.Generator().manual_seed(i)) for i in range(3))
PLACE = 2 * torch.randn(ROWS, S, V, generator=torch.Generator().manual_seed(9))


def network(z_BS):
    """Every row is a network of its own; a position sees itself, its neighbour, and how much is filled."""
    filled_B11 = (z_BS != MASK).double().mean(1)[:, None, None]
    around = (OWN[z_BS] + LEFT[z_BS.roll(1, 1)] + ALL[z_BS].mean(1, keepdim=True)).double()
    return (PLACE + around) * (1 + 2 * filled_B11)


def by_the_rule(row, observed, variant, n, mu):
    """The states of one row at temperature 0."""
    free = [i for i in range(S) if observed[i] < 0]
    ids = tuple(MASK if i in free else observed[i] for i in range(S))
    states, memory = [ids], Memory()
    while MASK in [ids[i] for i in free]:
        z = torch.full((ROWS, S), MASK)
        z[row] = torch.tensor(ids)
        logits = network(z)[row]
        logits[:, MASK] = -torch.inf
        p = logits.softmax(-1)
        sure, tokens = (x.tolist() for x in p.max(-1))
        own = [float(p[i, ids[i]]) for i in range(S)]
        ids, memory = saber_step(variant, ids, MASK, free, tokens, sure, own, memory, n, mu)
        states.append(ids)
    return states


@pytest.mark.parametrize("variant", ["release", "paper"])
@pytest.mark.parametrize(("n", "mu"), [(2, 8), (1, 2), (3, 1)])
def test_every_step_is_the_rules(variant, n, mu):
    observed = torch.full((ROWS, S), -1)
    observed[::2, :5] = 2
    observed[::3, 15] = 7
    seen = []
    settings = SaberSampler(kind="saber", variant=variant, min_tokens=n, backtrack_every=mu, temperature=0.0)
    found = sample(
        network, settings, NOISE, LogLinear(), 1, observed, on_step=lambda t, z: seen.append(z.clone())
    )
    taken_back = 0
    for row in range(ROWS):
        states = by_the_rule(row, observed[row].tolist(), variant, n, mu)
        assert [tuple(z[row].tolist()) for z in seen[: len(states)]] == states
        assert tuple(found.ids_BS[row].tolist()) == states[-1]
        assert int(found.evaluations_B[row]) == int(found.steps_B[row]) == len(states) - 1
        for before, after in pairwise(states):
            taken_back += sum(a == MASK != b for b, a in zip(before, after, strict=True))
    assert (found.ids_BS != MASK).all()
    assert len(found.steps_B.unique()) > 2
    assert taken_back > ROWS or n == 1
