"""One Slurm of two nodes for all tests of this folder; skipped with the reason where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.mini_slurm import PACKAGES, MiniSlurm, missing_programs


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniSlurm]:
    missing = missing_programs()
    if missing:
        pytest.skip(
            f"no Slurm here: {', '.join(missing)} missing; as root: apt-get install {' '.join(PACKAGES)}"
        )
    with MiniSlurm(tmp_path_factory.mktemp("slurm"), num_nodes=2) as cluster:
        yield cluster
