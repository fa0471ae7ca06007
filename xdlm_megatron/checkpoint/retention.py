"""Which checkpoints are removed once a newer one is published."""

from __future__ import annotations

from collections.abc import Sequence


def to_remove(steps: Sequence[int], keep_last: int, keep_every: int | None) -> list[int]:
    """The steps, oldest first, that are neither among the `keep_last` newest nor a multiple of `keep_every`.

    With keep_last=2 and keep_every=1000, a run that saves every 100 steps holds 1000, 2000, 2900 and 3000 at
    step 3000, and 1000, 2000, 3000, 3100 and 3200 at step 3200.
    """
    kept = set(sorted(steps)[-keep_last:])
    return [step for step in sorted(steps) if step not in kept and (keep_every is None or step % keep_every)]
