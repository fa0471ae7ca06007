"""Every sampler ends where an exact enumeration of its rule says, on a model small enough to enumerate.

The model's output at each of three positions depends on all three ids. The rules are written here once more,
one state at a time, with probabilities instead of draws.
"""

import itertools
import math
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from oracle import assert_drawn_from
from saber_rule import Memory, saber_step

from xdlm_megatron.config.samplers import (
    AncestralSampler,
    ConfidenceSampler,
    LeftToRightSampler,
    RefineSampler,
    RemdmLoopSampler,
    RemdmSampler,
    SaberSampler,
)
from xdlm_megatron.diffusion.noise import StationaryNoise
from xdlm_megatron.diffusion.schedule import LogLinear
from xdlm_megatron.samplers import sample

V, MASK, S, ROWS = 4, 3, 3, 40_000
NOISE, SCHEDULE = StationaryNoise(0.2, V, MASK), LogLinear()
TABLE = 1.5 * torch.randn(V, V, V, S, V, generator=torch.Generator().manual_seed(5))
TABLE[..., MASK] += 5  # never probable, whatever the network says
START = (MASK,) * S
STATES = list(itertools.product(range(V), repeat=S))


def network(z_BS):
    return TABLE[tuple(z_BS.unbind(1))]


def laws(state):
    """p of each position, [S][V - 1]."""
    return TABLE[state][:, :MASK].double().softmax(-1).tolist()


def assert_ends(settings, law, noise=NOISE, observed=(-1,) * S):
    """law: {ids: probability}."""
    rows = torch.tensor(observed).expand(ROWS, S)
    ids_BS = sample(network, settings, noise, SCHEDULE, 3, rows).ids_BS
    place = torch.tensor([V**2, V, 1])
    dense = torch.zeros(V**S, dtype=torch.float64)
    for ids, probability in law.items():
        dense[int((torch.tensor(ids) * place).sum())] += probability
    assert abs(float(dense.sum()) - 1) < 1e-9
    assert_drawn_from((ids_BS * place).sum(1), dense)


def follow(start, steps):
    """The law after steps, each a function: state -> [(probability, next state), ...]; start: a state, or its
    law.
    """
    law = start if isinstance(start, dict) else {start: 1.0}
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


def independent(state, law_of_position, positions=range(S)):
    """(probability, next state) where every position moves by a law of its own, {id: probability}."""
    laws_ = [law_of_position(i).items() if i in positions else [(state[i], 1.0)] for i in range(S)]
    for moves in itertools.product(*laws_):
        yield math.prod(p for _, p in moves), tuple(token for token, _ in moves)


def alphas(num_steps, t_end):
    return pairwise(SCHEDULE.alpha(torch.linspace(1, t_end, num_steps + 1, dtype=torch.float64)).tolist())


def stationary(noise):
    """The law of the start."""
    pi = noise.prior_law().tolist()
    return {state: math.prod(pi[z] for z in state) for state in STATES}


# Ancestral sampling, whose ends of the dial have formulas of their own


def test_ancestral_at_0_is_mdlm():
    """MDLM (arXiv 2406.07524), equation 7: a mask is unmasked by (alpha_s - alpha_t) / (1 - alpha_t) of p."""

    def step(state, alpha_t, alpha_s):
        p, share = laws(state), (alpha_s - alpha_t) / (1 - alpha_t)

        def law(i):
            if state[i] != MASK:
                return {state[i]: 1.0}
            return {MASK: 1 - share} | {token: share * p[i][token] for token in range(MASK)}

        yield from independent(state, law)

    noise = StationaryNoise(0.0, V, MASK)
    steps = [lambda state, a=a: step(state, *a) for a in alphas(3, 1e-5)]
    law = follow(START, steps)
    assert_ends(AncestralSampler(num_steps=3, final="none"), law, noise)
    last = SCHEDULE.alpha(torch.tensor(1e-5, dtype=torch.float64)).item()
    law = follow(START, [*steps, lambda state: step(state, last, 1.0)])
    assert_ends(AncestralSampler(num_steps=3), law, noise)
    law = follow(START, [*steps, greedy])
    assert_ends(AncestralSampler(num_steps=3, final="greedy"), law, noise)


def test_ancestral_at_1_is_udlm():
    """UDLM (arXiv 2412.10193), equation 16, on V states of which the network never predicts the mask."""

    def step(state, alpha_t, alpha_s):
        p = [[*row, 0.0] for row in laws(state)]
        ratio = alpha_t / alpha_s

        def law(i):
            z, moved = state[i], {}
            for e in range(V):
                x = p[i][e]
                top = V * alpha_t * x * (e == z) + (ratio - alpha_t) * (e == z) + (alpha_s - alpha_t) * x
                top += (1 - ratio) * (1 - alpha_s) / V
                moved[e] = top / (V * alpha_t * p[i][z] + 1 - alpha_t)
            return moved

        yield from independent(state, law)

    noise = StationaryNoise(1.0, V, MASK)
    steps = [lambda state, a=a: step(state, *a) for a in alphas(3, 1e-5)]
    assert_ends(AncestralSampler(num_steps=3, final="none"), follow(stationary(noise), steps), noise)


def greedy(state):
    p = laws(state)
    return [(1.0, tuple(max(range(MASK), key=p[i].__getitem__) for i in range(S)))]


# Samplers that start from masks


def test_confidence():
    def step(state, count):
        p = laws(state)
        for probability, drawn in draws(p, masks(state)):
            yield probability, put(state, {i: drawn[i] for i in surest(p, drawn, count)})

    for num_steps, counts in ((1, [3]), (2, [2, 1]), (7, [1, 1, 1])):
        law = follow(START, [lambda state, n=n: step(state, n) for n in counts])
        assert_ends(ConfidenceSampler(kind="confidence", num_steps=num_steps), law)


def test_left_to_right():
    def step(state, position):
        p = laws(state)[position]
        yield from ((p[token], put(state, {position: token})) for token in range(MASK))

    law = follow(START, [lambda state, i=i: step(state, i) for i in range(S)])
    assert_ends(LeftToRightSampler(kind="left_to_right"), law)


def test_refine():
    """k = 0.5: a refinement for every fill; three steps fill, the others spend what is left."""

    def step(place, fills, allowed):
        state, spent = place
        p = laws(state)
        visible = [i for i in range(S) if state[i] != MASK] if allowed > spent else []
        for probability, drawn in draws(p, [*masks(state), *visible]):
            better = {
                i: drawn[i] for i in visible if drawn[i] != state[i] and p[i][drawn[i]] >= p[i][state[i]]
            }
            chosen = surest(p, {i: drawn[i] for i in masks(state)}, fills)
            refined = surest(p, better, allowed - spent)
            after = put(state, {i: drawn[i] for i in [*chosen, *refined]})
            yield probability, (after, spent + len(refined))

    for num_steps, fills in ((2, [2, 1]), (5, [1, 1, 1, 0, 0])):
        done = itertools.accumulate(fills)
        law = follow(
            (START, 0), [lambda s, n=n, a=a: step(s, n, a) for n, a in zip(fills, done, strict=True)]
        )
        settings = RefineSampler(kind="refine", num_steps=num_steps, refine_ratio=0.5)
        assert_ends(settings, forget(law))
    assert_ends(
        RefineSampler(kind="refine", num_steps=3, refine_ratio=0.0),
        follow(START, [confidence_step] * 3),
    )


def confidence_step(state):
    p = laws(state)
    for probability, drawn in draws(p, masks(state)):
        yield probability, put(state, {i: drawn[i] for i in surest(p, drawn, 1)})


@pytest.mark.parametrize("strategy", ["cap", "rescale", "conf"])
def test_remdm(strategy):
    """The posterior of ReMDM, equation 5; psi is a token's probability when it was drawn."""
    num_steps, eta = 4, 0.4

    def step(place, alpha_t, alpha_s):
        state, psi = place
        bound = min(1, (1 - alpha_s) / alpha_t)
        sigma = {"cap": min(eta, bound), "rescale": eta * bound, "conf": 0.0}[strategy]
        p, share = laws(state), (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)
        total = sum(math.exp(-psi[i]) for i in range(S) if state[i] != MASK)

        def law(i):
            if state[i] == MASK:
                return {MASK: 1 - share} | {token: share * p[i][token] for token in range(MASK)}
            own = min(eta, bound) * math.exp(-psi[i]) / total if strategy == "conf" else sigma
            return {MASK: own, state[i]: 1 - own}

        for probability, after in independent(state, law):
            drawn = tuple(
                p[i][after[i]] if state[i] == MASK != after[i] and strategy == "conf" else psi[i]
                for i in range(S)
            )
            yield probability, (after, drawn)

    grid = SCHEDULE.alpha(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)).tolist()
    law = follow((START, (0.0,) * S), [lambda s, a=a: step(s, *a) for a in pairwise(grid)])
    assert_ends(RemdmSampler(kind="remdm", num_steps=num_steps, strategy=strategy, eta=eta), forget(law))


def test_remdm_loop():
    """The loop of ReMDM: alpha up to alpha_on before t_on, held to t_off, then up to 1; sigma in between. And
    its calls: a step asks the network where a mask is filled, and not otherwise.
    """
    on, off, held, eta, num_steps = 0.7, 0.2, 0.6, 0.5, 6

    def alpha(t):
        if t > on:
            return held * (1 - t) / (1 - on)
        return held if t > off else 1 - (1 - held) * t / off

    def step(place, t, s):
        state, calls = place
        alpha_t, alpha_s = alpha(t), alpha(s)
        sigma = min(eta, (1 - alpha_s) / alpha_t) if off < t <= on else 0.0
        p, share = laws(state), (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t)

        def law(i):
            if state[i] == MASK:
                return {MASK: 1 - share} | {token: share * p[i][token] for token in range(MASK)}
            return {MASK: sigma, state[i]: 1 - sigma}

        for probability, after in independent(state, law):
            filled = any(a == MASK != b for a, b in zip(state, after, strict=True))
            yield probability, (after, calls + filled)

    times = [1 - i / num_steps for i in range(num_steps)] + [0.0]
    law = follow((START, 0), [lambda place, t=t: step(place, *t) for t in pairwise(times)])
    settings = RemdmLoopSampler(
        kind="remdm_loop", num_steps=num_steps, eta=eta, t_on=on, t_off=off, alpha_on=held
    )
    assert_ends(settings, forget(law))
    wanted = torch.zeros(num_steps + 1, dtype=torch.float64)
    for (_, calls), probability in law.items():
        wanted[calls] += probability
    found = sample(network, settings, NOISE, SCHEDULE, 3, torch.full((ROWS, S), -1))
    assert_drawn_from(found.evaluations_B, wanted)
    assert (found.steps_B == num_steps).all()


@pytest.mark.parametrize("variant", ["release", "paper"])
def test_saber(variant):
    def step(place):
        state, memory = place
        if MASK not in state:
            return [(1.0, place)]
        p = laws(state)
        own = [p[i][state[i]] if state[i] != MASK else 0.0 for i in range(S)]
        known = Memory(dict(memory[0]), dict(memory[1]))
        after = []
        for probability, drawn in draws(p, range(S)):
            sure = [p[i][drawn[i]] for i in range(S)]
            ids, new = saber_step(variant, state, MASK, range(S), drawn, sure, own, known, 2, 8)
            frozen = (tuple(new.when_kept.items()), tuple(new.before.items()))
            after.append((probability, (ids, frozen if MASK in ids else ((), ()))))
        return after

    law = follow((START, ((), ())), [step] * S)
    assert_ends(SaberSampler(kind="saber", variant=variant), forget(law))


def forget(law):
    """The ids alone, of states that remember more."""
    ids = defaultdict(float)
    for (state, _), probability in law.items():
        ids[state] += probability
    return ids


# What every sampler can be asked for


def test_blocks_of_one_position_go_from_left_to_right():
    def step(state, i):
        return [(laws(state)[i][token], put(state, {i: token})) for token in range(MASK)]

    law = follow(START, [lambda state, i=i: step(state, i) for i in range(S)])
    assert_ends(ConfidenceSampler(kind="confidence", num_steps=2, block_size=1), law)
    assert_ends(RefineSampler(kind="refine", num_steps=1, block_size=1), law)
    assert_ends(SaberSampler(kind="saber", block_size=1), law)


def test_guidance_mixes_the_logits():
    scale, observed = 1.5, (-1, 2, -1)
    noise = StationaryNoise(0.0, V, MASK)  # what is unknown is a mask
    with_it, without = TABLE[MASK, 2, MASK], TABLE[MASK, MASK, MASK]
    mixed = ((1 + scale) * with_it - scale * without)[:, :MASK].double().softmax(-1)
    law = {(a, 2, b): float(mixed[0, a] * mixed[2, b]) for a in range(MASK) for b in range(MASK)}
    settings = ConfidenceSampler(kind="confidence", num_steps=1, guidance_scale=scale)
    assert_ends(settings, law, noise, observed)
    found = sample(network, settings, noise, SCHEDULE, 3, torch.tensor([observed, (0, 1, 2)]))
    assert found.evaluations_B.tolist() == [2, 0]


def test_temperature_and_nucleus_reshape_what_is_drawn():
    def law(reshape):
        p = [reshape(torch.tensor(row, dtype=torch.float64)) for row in laws(START)]
        return {
            s: math.prod(float(p[i][s[i]]) for i in range(S))
            for s in itertools.product(range(MASK), repeat=S)
        }

    def nucleus(p):
        order = p.argsort(descending=True)
        kept = p[order].cumsum(0) <= 0.95
        kept[0] = True
        cut = torch.zeros_like(p).scatter(0, order, kept * p[order])
        return cut / cut.sum()

    assert_ends(ConfidenceSampler(kind="confidence", num_steps=1, top_p=0.95), law(nucleus))
    cold = law(lambda p: p.square() / p.square().sum())
    assert_ends(ConfidenceSampler(kind="confidence", num_steps=1, temperature=0.5), cold)
