"""The kernels' source on the host under g++'s sanitizers: bounds, undefined behaviour, races."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from xdlm_megatron.kernels import build

pytestmark = pytest.mark.skipif(build.find_cxx() is None, reason="needs g++")


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
@pytest.mark.parametrize("what", ["nelbo", "posterior"])
def test_no_sanitizer_complains(what: str, sanitizers: str, tmp_path: Path) -> None:
    program = str(tmp_path / "driver")
    driver = Path(__file__).with_name(f"sanitize_{what}.cpp")
    sources = [str(driver), *map(str, sorted(build.CSRC.glob(f"{what}*.cu"))), str(build.CSRC / "api.cu")]
    flags = [
        "-x",
        "c++",
        "-std=c++20",
        "-O1",
        "-g1",  # lines are enough for a report
        "-pthread",
        f"-I{build.CSRC}",
        "-fno-sanitize-recover=all",
    ]
    command = [build.find_cxx(), *flags, f"-fsanitize={sanitizers}", *sources, "-o", program]
    compiled = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "cannot find" in compiled.stderr:
        pytest.skip(f"g++ has no library for -fsanitize={sanitizers}")
    assert compiled.returncode == 0, compiled.stderr
    # the thread sanitizer of older compilers does not know the address layouts of newer kernels
    fixed = ["setarch", "--addr-no-randomize"] if shutil.which("setarch") else []
    done = subprocess.run([*fixed, program], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout == "all sound\n"
