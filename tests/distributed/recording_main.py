"""`python -m xdlm_megatron` that also records every noised sample it builds, for tests that compare layouts.

Writes {sample id: {first position: [t, z_t ...]}} to $RECORD_DIR/<rank>.json.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

import xdlm_megatron.parallel  # noqa: F401
from xdlm_megatron.__main__ import main
from xdlm_megatron.data.batch import Batch, NoisedSamples
from xdlm_megatron.diffusion.counter_rng import Stream

seen: dict[str, dict[int, list]] = {}
build = NoisedSamples.build


def recording_build(self, sample_ids, slots, batch_size) -> Batch:
    batch = build(self, sample_ids, slots, batch_size)
    if self.streams[0] is Stream.TIME:
        for row, sample_id in enumerate(sample_ids):
            pieces = seen.setdefault(str(sample_id), {})
            pieces[self.positions.start or 0] = [float(batch.t_BS[row, 0]).hex(), *batch.zt_BS[row].tolist()]
    return batch


def write() -> None:
    (Path(os.environ["RECORD_DIR"]) / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    NoisedSamples.build = recording_build
    atexit.register(write)
    sys.exit(main())
