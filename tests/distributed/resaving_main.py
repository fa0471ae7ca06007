"""`python -m xdlm_megatron` that saves once more, to RUN/resaved, what a resume has just loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import xdlm_megatron.parallel  # noqa: F401
from xdlm_megatron.__main__ import main
from xdlm_megatron.checkpoint.writer import CheckpointWriter
from xdlm_megatron.train.run import Run
from xdlm_megatron.train.state import TrainState

load = Run.load


def loading_and_saving(self: Run, path: Path) -> TrainState:
    state = load(self, path)
    CheckpointWriter(self.folder / "resaved", self.mesh, 1).save(state.step, self.state_to_save(state))
    return state


if __name__ == "__main__":
    Run.load = loading_and_saving
    sys.exit(main())
