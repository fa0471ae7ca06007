"""Every sampler ends where an exact enumeration of its rule says, on a model small enough to enumerate.

The model's output at each of three positions depends on all three ids. The rules are written here once more,
one state at a time, with probabilities instead of draws.
"""

import itertools
from collections import defaultdict

import torch
from oracle import assert_drawn_from

from xdlm_megatron.config.schema import ConfidenceSampler
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.samplers import sample

V, MASK, S, ROWS = 4, 3, 3, 40_000
NOISE = StationaryNoise(0.2, V, MASK)
TABLE = 1.5 * torch.randn(V, V, V, S, V, generator=torch.Generator().manual_seed(5))
TABLE[..., MASK] += 5  # never probable, whatever the network says
START = (MASK,) * S


def network(z_BS):
    return TABLE[tuple(z_BS.unbind(1))]


def laws(state):
    """p of each position, [S, V - 1]."""
    return TABLE[state][:, :MASK].double().softmax(-1).tolist()


def assert_ends(settings, law, noise=NOISE, observed=(-1,) * S):
    """law: {ids: probability}."""
    rows = torch.tensor(observed).expand(ROWS, S)
    ids_BS = sample(network, settings, noise, LogLinear(), 3, rows).ids_BS
    place = torch.tensor([V**2, V, 1])
    dense = torch.zeros(V**S, dtype=torch.float64)
    for ids, probability in law.items():
        dense[int((torch.tensor(ids) * place).sum())] += probability
    assert abs(float(dense.sum()) - 1) < 1e-9
    assert_drawn_from((ids_BS * place).sum(1), dense)


def follow(start, steps):
    """The law after steps, each a function: state -> [(probability, next state), ...]."""
    law = {start: 1.0}
    for step in steps:
        after = defaultdict(float)
        for state, probability in law.items():
            for share, state_after in step(state):
                after[state_after] += probability * share
        law = dict(after)
    return law


def draws(p, positions):
    """(probability, {position: token}) of independent draws at the positions."""
    for tokens in itertools.product(range(MASK), repeat=len(positions)):
        drawn = dict(zip(positions, tokens, strict=True))
        probability = 1.0
        for position, token in drawn.items():
            probability *= p[position][token]
        yield probability, drawn


def put(state, drawn):
    return tuple(drawn.get(i, token) for i, token in enumerate(state))


def masks(state):
    return [i for i, token in enumerate(state) if token == MASK]


def surest(p, drawn, count):
    return sorted(drawn, key=lambda i: -p[i][drawn[i]])[:count]


def test_confidence():
    def step(state, count):
        p = laws(state)
        for probability, drawn in draws(p, masks(state)):
            yield probability, put(state, {i: drawn[i] for i in surest(p, drawn, count)})

    for num_steps, counts in ((1, [3]), (2, [2, 1]), (7, [1, 1, 1])):
        law = follow(START, [lambda state, n=n: step(state, n) for n in counts])
        assert_ends(ConfidenceSampler(kind="confidence", num_steps=num_steps), law)
