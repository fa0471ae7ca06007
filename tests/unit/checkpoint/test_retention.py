"""What is removed: neither new nor a multiple of the interval that stays."""

from __future__ import annotations

import itertools

import pytest

from xdlm_megatron.checkpoint.retention import to_remove


@pytest.mark.parametrize(
    ("steps", "keep_last", "keep_every", "removed"),
    [
        ([], 2, None, []),
        ([10], 1, None, []),
        ([10, 20, 30], 1, None, [10, 20]),
        ([30, 10, 20], 1, None, [10, 20]),
        ([10, 20, 30, 40], 1, 20, [10, 30]),
        ([10, 20, 30, 40, 45], 2, 20, [10, 30]),
        ([7, 10, 20], 3, 10, []),
    ],
)
def test_by_hand(steps: list[int], keep_last: int, keep_every: int | None, removed: list[int]) -> None:
    assert to_remove(steps, keep_last, keep_every) == removed


@pytest.mark.parametrize(("keep_last", "keep_every"), itertools.product([1, 2, 5], [None, 100, 400]))
def test_over_a_run(keep_last: int, keep_every: int | None) -> None:
    """Pruning after every save leaves what pruning all at once does, and never the newest."""
    present: list[int] = []
    for step in range(100, 2100, 100):
        present.append(step)
        present = [s for s in present if s not in to_remove(present, keep_last, keep_every)]
        saved = range(100, step + 100, 100)
        assert present == [
            s for s in saved if s > step - 100 * keep_last or (keep_every and s % keep_every == 0)
        ]
