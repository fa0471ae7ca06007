"""Megatron's pipeline schedules, called the one way this project calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.pipeline_parallel import get_forward_backward_func


def run_schedule(
    forward_step: Callable[..., Any],
    chunks: list[Any],
    batches: Callable[[], Iterator[Any]],
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool = False,
    collect_outputs: bool = False,
) -> list[Any]:
    """Megatron's schedule (none, 1F1B or interleaved) over one batch.

    Args:
        batches: makes an iterator over the micro-batches; each model chunk draws from its own.
        collect_outputs: call the loss function with `non_loss_data=True` and return what it returns.

    Returns:
        what the loss function reported for each micro-batch, on the last stage; an empty list elsewhere.
    """
    several = len(chunks) > 1
    iterators = [batches() for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if several else iterators[0],
        model=chunks if several else chunks[0],
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect_outputs,
    )
