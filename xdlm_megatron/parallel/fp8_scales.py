"""The state of FP8's delayed scaling, which Transformer Engine keeps for the whole process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


@contextmanager
def scales_trusted() -> Iterator[None]:
    """Inside, Transformer Engine takes back the scales that it has pickled; it refuses them otherwise.

    For what a checkpoint of ours held alone: torch has unpickled its index before.
    """
    before = os.environ.get(_TRUST)
    os.environ[_TRUST] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TRUST]
        else:
            os.environ[_TRUST] = before


@contextmanager
def scales_kept() -> Iterator[None]:
    """The largest values seen inside do not enter the scales of the steps behind.

    Without gradients they are noted too, and the next step would take them for its own.
    """
    before = {id(history): history.clone() for history in _histories()}
    try:
        yield
    finally:
        for history in _histories():
            if id(history) in before:
                history.copy_(before[id(history)])
            else:
                history.zero_()


def _histories() -> list[torch.Tensor]:
    """Of every module that has run so far; none without delayed scaling."""
    quantization = sys.modules.get("transformer_engine.pytorch.quantization")
    if quantization is None:
        return []
    manager = quantization.FP8GlobalStateManager
    state = getattr(manager, "quantization_state", manager)  # the manager has them itself in older versions
    buffers = state.global_amax_history_buffer
    return [history for histories in buffers.values() for history in histories]
