"""Where two curves part."""

from __future__ import annotations

import math

import pytest

from xdlm_megatron.tracking.compare import compare_curves


def records(values: dict[int, float], name: str = "train/nelbo") -> list[dict]:
    return [{"step": step, name: value, "time": 1.0} for step, value in values.items()]


def test_the_same_bits_are_the_same() -> None:
    curve = {1: 7.5, 2: math.nan, 3: math.inf}
    found = compare_curves(records(curve), records(curve), "train/nelbo")
    assert found.first_beyond(0.0) is None
    assert found.largest_absolute.difference == found.largest_relative.relative == 0.0
    assert found.only_a == found.only_b == []


def test_first_and_largest_differences_by_hand() -> None:
    a = records({1: 4.0, 2: 100.0, 3: 1.0, 4: 2.0, 9: 1.0})
    b = records({1: 4.0, 2: 100.5, 3: 0.9, 4: 2.0, 5: 3.0})
    found = compare_curves(a, b, "train/nelbo")
    assert [point.step for point in found.points] == [1, 2, 3, 4]
    assert found.first_beyond(0.0).step == 2
    assert found.first_beyond(0.005).step == 3
    assert found.first_beyond(0.1) is None, "0.1 of the larger value, 1.0"
    assert (found.largest_absolute.step, found.largest_absolute.difference) == (2, 0.5)
    assert (found.largest_relative.step, found.largest_relative.relative) == (3, pytest.approx(0.1))
    assert (found.only_a, found.only_b) == ([9], [5])


def test_one_bit_is_a_difference() -> None:
    found = compare_curves(records({1: 0.1}), records({1: math.nextafter(0.1, 1)}), "train/nelbo")
    assert found.first_beyond(0.0).step == 1
    assert found.first_beyond(1e-15) is None


@pytest.mark.parametrize("other", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_beyond_every_tolerance(other: float) -> None:
    found = compare_curves(records({1: 1.0}), records({1: other}), "train/nelbo")
    assert found.first_beyond(1e9).step == 1


def test_a_step_that_was_logged_again_counts_once() -> None:
    a = records({1: 1.0}) + records({1: 2.0})
    assert compare_curves(a, records({1: 2.0}), "train/nelbo").first_beyond(0.0) is None


def test_what_cannot_be_compared_is_refused() -> None:
    a, b = records({1: 1.0}), records({2: 1.0})
    with pytest.raises(ValueError, match=r"no step of train/nelbo in common: the first logged steps 1 to 1"):
        compare_curves(a, b, "train/nelbo")
    with pytest.raises(ValueError, match=r"the second run has no train/lr; it has train/nelbo"):
        compare_curves(records({1: 1.0}, "train/lr"), b, "train/lr")
