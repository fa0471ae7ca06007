"""Growing batches: a function of the samples seen, counted right, and shared out under every layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from xdlm_megatron.config.derive import batch_size_at, consumed_after, derive
from xdlm_megatron.config.load import build_config
from xdlm_megatron.config.schema import RunConfig

Change = Callable[[dict[str, Any]], dict[str, Any]]


def config_for(changed: Change, ramp: list[int] | None, size: int, **changes: Any) -> RunConfig:
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return build_config(
        changed({"train.rampup_batch_size": ramp, "train.global_batch_size": size, **changes})
    )


def megatron_size(start: int, increment: int, samples: int, size: int, consumed: int) -> int:
    """As Megatron's RampupBatchsizeNumMicroBatchesCalculator says it, its division exact."""
    if consumed > samples:
        return size
    from fractions import Fraction

    samples_per_increment = Fraction(samples, (size - start) // increment)
    return min(size, start + increment * int(consumed / samples_per_increment))


@pytest.mark.parametrize(
    ("start", "increment", "samples"), [(4, 4, 100), (2, 2, 17), (8, 24, 1), (4, 28, 1000)]
)
def test_sizes_are_megatrons_and_the_count_is_their_sum(
    changed: Change, start: int, increment: int, samples: int
) -> None:
    size = 32
    config = config_for(changed, [start, increment, samples], size, train__micro_batch_size=2)
    train = config.train
    consumed, sizes = 0, []
    for num_steps in range(120):
        assert consumed_after(train, num_steps) == consumed
        sizes.append(batch_size_at(train, consumed))
        assert sizes[-1] == megatron_size(start, increment, samples, size, consumed)
        consumed += sizes[-1]
    assert sizes[0] == start
    assert sizes == sorted(sizes)
    assert set(sizes) <= set(range(start, size + 1, increment))
    total = sum(sizes[: train.num_steps])
    derived = derive(config, 1)
    assert derived.total_tokens == total * config.data.seq_length
    assert derived.tokens_per_step == size * config.data.seq_length


def test_without_a_ramp_every_batch_is_whole(changed: Change) -> None:
    train = config_for(changed, None, 12).train
    assert [batch_size_at(train, consumed) for consumed in (0, 1, 10**12)] == [12] * 3
    assert consumed_after(train, 1000) == 12_000


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        (
            [6, 6, 100],
            "train.rampup_batch_size's start=6 must be a multiple of .* 2 \\* 2 = 4; nearest: 4 or 8",
        ),
        ([4, 2, 100], "train.rampup_batch_size's increment=2 must be a multiple of .* nearest: 4$"),
    ],
)
def test_every_batch_divides(changed: Change, ramp: list[int], message: str) -> None:
    config = config_for(changed, ramp, 24, train__micro_batch_size=2)
    assert derive(config, 1).num_microbatches == 12
    with pytest.raises(ValueError, match=message):
        derive(config, 2)


def test_every_batch_suits_interleaving(changed: Change) -> None:
    pipeline = {
        "parallel__pipeline_model_parallel_size": 2,
        "parallel__virtual_pipeline_model_parallel_size": 2,
        "train__micro_batch_size": 2,
    }
    assert derive(config_for(changed, [4, 4, 9], 24, **pipeline), 2).num_microbatches == 12
    with pytest.raises(ValueError, match=r"per step \(3\) in multiples of .*=2; change .*start=6 or"):
        derive(config_for(changed, [6, 6, 9], 24, **pipeline), 2)
