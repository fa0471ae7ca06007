"""Parallelism and order of generation, from the step that last changed each token."""

import math

import numpy as np
import pytest

from xdlm_megatron.evaluation.order import kendall_tau, parallelism

ALL = np.ones(6, dtype=bool)


def tau_by_pairs(steps):
    """Tau-b by its definition: concordant less discordant pairs, ties in steps out of one factor."""
    n, balance, tied = len(steps), 0, 0
    for i in range(n):
        for j in range(i + 1, n):
            balance += (steps[j] > steps[i]) - (steps[j] < steps[i])
            tied += steps[i] == steps[j]
    pairs = n * (n - 1) / 2
    return balance / math.sqrt(pairs * (pairs - tied))


@pytest.mark.parametrize(
    ("steps", "tau"),
    [
        ([1, 2, 3, 4, 5, 6], 1.0),
        ([6, 5, 4, 3, 2, 1], -1.0),
        ([1, 1, 1, 2, 2, 2], tau_by_pairs([1, 1, 1, 2, 2, 2])),
    ],
)
def test_the_order_of_known_runs(steps, tau):
    assert kendall_tau(np.array(steps), ALL) == pytest.approx(tau)


def test_the_order_is_kendalls():
    generator = np.random.default_rng(0)
    for _ in range(5):
        steps = generator.integers(0, 9, 30)
        assert kendall_tau(steps, np.ones(30, dtype=bool)) == pytest.approx(tau_by_pairs(steps.tolist()))


def test_observed_positions_do_not_count():
    steps, free = np.array([0, 0, 3, 2, 1, 0]), np.array([False, False, True, True, True, False])
    assert kendall_tau(steps, free) == pytest.approx(-1.0)
    assert parallelism(free, 6) == 0.5


def test_no_order_and_no_steps():
    assert math.isnan(kendall_tau(np.full(6, 3), ALL))
    assert math.isnan(kendall_tau(np.arange(6), ALL & (np.arange(6) == 2)))
    assert math.isnan(parallelism(~ALL, 0))
