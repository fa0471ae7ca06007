"""`python -m xdlm_megatron` that records every reduction of FP8's largest values, by the rank it ran on.

Writes to $RECORD_DIR/<rank>.json a list of {direction, group, before, reduced, scale}, each of the last three
with a number for every tensor in FP8.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformer_engine.pytorch import quantization
from transformer_engine.pytorch.quantization import FP8GlobalStateManager as Manager

from xdlm_megatron.__main__ import main

seen: list[dict[str, Any]] = []
update, take_over = Manager.reduce_and_update_fp8_tensors, quantization.split_and_copy


def recording_update(forward: bool = True) -> None:
    state = Manager.quantization_state
    keys = [key for key in state.global_amax_buffer if Manager.split_key_in_buffer(key)[0] == forward]
    for key in keys:
        _, group = state.autocast_arguments[Manager.split_key_in_buffer(key)[1]]
        before = torch.cat(state.global_amax_buffer[key]).tolist()
        ranks = dist.get_process_group_ranks(group)
        seen.append({"direction": "forward" if forward else "backward", "group": ranks, "before": before})
    update(forward)
    for key, record in zip(keys, seen[len(seen) - len(keys) :], strict=True):
        record["scale"] = torch.cat(state.global_scale_buffer[key]).tolist()


def recording_copy(reduced: torch.Tensor, *rest: Any) -> None:
    """Where the reduced values take the place of this rank's."""
    next(record for record in seen if "reduced" not in record)["reduced"] = reduced.tolist()
    take_over(reduced, *rest)


def write() -> None:
    (Path(os.environ["RECORD_DIR"]) / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # Transformer Engine's own: Python updates the scales
    Manager.reduce_and_update_fp8_tensors = recording_update
    quantization.split_and_copy = recording_copy
    atexit.register(write)
    sys.exit(main())
