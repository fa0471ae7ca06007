"""The image of the GPU path: every line of its two stages is carried out, on a machine without a GPU.

Torch with CUDA, Transformer Engine with its extension compiled, and this package are installed for real; of
apex, which no package index has, a repository of the tests' own. In CI alone: 3 minutes of CPU time, 2 GB
fetched, 6 GB unpacked.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.dockerfile import as_script, copy_context, make_prefix, run_in_prefix
from tests.unit.model import engine_kernels
from tests.unit.test_dockerfile import ROOT, STAGES, apex_stand_in

pytestmark = pytest.mark.skipif(os.environ.get("CI") != "true", reason="fetches 2 GB; CI=true does it")

PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints/gpu.txt").read_text(), re.MULTILINE))
FREE_GB = 15
# For g++: no optimisation, and all files that ninja is told to compile in one pass, at the first of them.
# PyTorch's headers take half a minute in each of the 33. The objects of the other files are empty.
COMPILER = r"""#!/bin/bash
[[ -f build.ninja && " $* " == *" -c "* ]] || exec g++ "$@"
source=all.cpp
(set -o noclobber; sed -n 's/^build .*: compile \(.*\)/#include "\1"/p' build.ninja > all.cpp) 2> /dev/null ||
  { source=none.cpp; touch none.cpp; }
exec g++ "${@/*.cpp/$source}" -O0 -w
"""
NO_GPU = "#!/bin/bash\necho 'GPU 0: of the tests'\n"
# Arguments of what the tests of FP8 compute in the extension's place.
KERNELS = {
    name: list(inspect.signature(kernel).parameters)
    for name, kernel in vars(engine_kernels).items()
    if inspect.isfunction(kernel) and not name.startswith(("_", "layernorm"))
}
# Of what was compiled and linked: it is called, and calls NVIDIA's libraries, as far as they need no GPU.
ASK_THE_EXTENSION = f"""cd /xdlm; /opt/xdlm/bin/python -c '
import json, torch, transformer_engine.pytorch, transformer_engine_torch as library, xdlm_megatron
numbers = [library.get_cublasLt_version(), library.get_cudnn_version()]
signatures = dict((name, getattr(library, name).__doc__) for name in "{" ".join(KERNELS)}".split())
print(json.dumps([torch.version.cuda, numbers, signatures, xdlm_megatron.__file__]))'
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the stages `build` and `gpu` printed, one after the other in one prefix, and then its programs."""
    folder = tmp_path_factory.mktemp("image")
    free = shutil.disk_usage(folder).free / 1e9
    assert free > FREE_GB, (
        f"the image needs {FREE_GB} GB of scratch and {folder} has {free:.0f} GB: make room"
    )
    try:
        yield dict(carry_out(folder))
    finally:
        shutil.rmtree(folder)


def carry_out(folder: Path) -> Iterator[tuple[str, str]]:
    copy_context(ROOT, folder / "context")
    prefix = make_prefix(folder)
    for name, text in (("c++", COMPILER), ("nvidia-smi", NO_GPU)):
        (prefix / "bin" / name).write_text(text)
        (prefix / "bin" / name).chmod(0o755)
    apex = apex_stand_in(folder / "apex")
    arguments = {"APEX_COMMIT": apex["APEX_COMMIT"], "MAX_JOBS": "2"}
    scripts = {
        "kernels": f"XDLM_BUILD_KERNELS=0 python -m pip wheel --no-deps --wheel-dir /wheels {folder}/context",
        "build": as_script(STAGES["build"], folder / "context", arguments, skip=lambda run: False),
        "gpu": as_script(STAGES["gpu"], folder / "context", {}, skip=lambda run: False),
        "versions": "/opt/xdlm/bin/python -m pip list --format json",
        "extension": ASK_THE_EXTENSION,
        "command": "cd /xdlm; PATH=/opt/xdlm/bin:$PATH; ! make gpu-suite",
    }
    for name, script in scripts.items():
        done = run_in_prefix(script, prefix, 3000, **apex, CXX="c++", PIP_COMPILE="0")
        assert done.returncode == 0, f"{name}: {done.stdout[-6000:]}"
        yield name, done.stdout


def test_every_line_is_carried_out(printed: dict[str, str]) -> None:
    for name in ("build", "gpu"):
        assert printed[name].count("RUN ") == len(STAGES[name].of("RUN"))


def test_what_is_installed_has_the_pinned_versions(printed: dict[str, str]) -> None:
    listed = json.loads(printed["versions"].splitlines()[-1])
    found = {item["name"].lower().replace("_", "-"): item["version"] for item in listed}
    assert PINS.items() <= found.items()
    assert found["nvidia-cuda-runtime"].startswith("13.0.")  # nvcc's version in the base image
    assert {"xdlm-megatron", "apex", "pytest", "pytest-xdist"} <= found.keys()


def test_the_extension_calls_the_libraries_that_torch_brought(printed: dict[str, str]) -> None:
    cuda, (cublas, cudnn), _, ours = json.loads(printed["extension"].splitlines()[-1])
    assert cuda == "13.0"
    assert cublas // 10000 == 13
    assert cudnn >= 91200  # the oldest that Transformer Engine takes
    assert "site-packages/xdlm_megatron/" in ours  # the image has no sources of it


def test_the_kernels_of_the_tests_are_called_like_the_compiled_ones(printed: dict[str, str]) -> None:
    *_, signatures, _ = json.loads(printed["extension"].splitlines()[-1])
    for name, ours in KERNELS.items():
        theirs = re.findall(r"(\w+): ", signatures[name].splitlines()[0])
        theirs = [b if re.fullmatch(r"arg\d+", a) else a for a, b in zip(theirs, ours, strict=True)]
        assert theirs == ours, name


def test_the_image_is_healthy_and_its_command_wants_a_gpu(printed: dict[str, str]) -> None:
    assert STAGES["gpu"].of("CMD") == ['["make", "gpu-suite"]']
    assert "GPU 0: of the tests" in printed["gpu"]
    assert "num_parameters" in printed["gpu"]  # of show-config
    assert "error: torch sees no GPU" in printed["command"]
