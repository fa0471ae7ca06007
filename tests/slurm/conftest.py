"""One Slurm of two nodes for all tests of this folder; skipped with the reason where it cannot be had.

XDLM_NEED_SLURM=1, as CI has it, makes a failure of that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.mini_slurm import PACKAGES, MiniSlurm, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    missing = missing_programs()
    if missing:
        reason = f"no Slurm here: {', '.join(missing)} missing; as root: apt-get install {' '.join(PACKAGES)}"
        (pytest.fail if os.environ.get("XDLM_NEED_SLURM") == "1" else pytest.skip)(reason)
    with MiniSlurm(tmp_path_factory.mktemp("slurm"), num_nodes=2) as cluster:
        yield cluster
