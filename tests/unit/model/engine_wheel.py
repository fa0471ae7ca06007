"""The pinned Transformer Engine's Python, without its libraries: what the tests of GPU code import."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PINS = (REPOSITORY / "constraints/gpu.txt").read_text()
(VERSION,) = re.findall(r"^transformer-engine==(\S+)$", PINS, flags=re.MULTILINE)


@functools.cache
def sources() -> Path:
    """A folder for sys.path. Its wheel of 1.2 MB is fetched into the virtual environment once."""
    folder = Path(sys.prefix) / "share" / f"transformer_engine-{VERSION}"
    if not (folder / "transformer_engine").is_dir():
        fetch = f"{sys.executable} -m pip install --quiet --disable-pip-version-check --no-deps --no-compile"
        wheel = f"--only-binary=:all: --target {folder} transformer-engine=={VERSION}"
        done = subprocess.run([*fetch.split(), *wheel.split()], capture_output=True, text=True, timeout=300)
        if done.returncode and os.environ.get("CI") != "true":
            pytest.skip(f"Transformer Engine's wheel cannot be fetched: {done.stderr.strip()[-200:]}")
        assert done.returncode == 0, done.stderr[-2000:]
    return folder
