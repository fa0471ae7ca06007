"""The Dockerfile: its RUN lines are carried out, as far as a machine without GPU and in a minute can."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest

from tests.unit.dockerfile import (
    Stage,
    as_script,
    copy_context,
    overlay_works,
    read_dockerfile,
    run_in_overlay,
)
from xdlm_megatron.kernels.build import find_nvcc

ROOT = Path(__file__).parents[2]
ARGUMENTS, STAGES = read_dockerfile(ROOT / "Dockerfile")

# RUN lines that are not carried out here, and why.
NOT_HERE = {
    "--constraint constraints/gpu.txt torch numpy": "5 GB of downloads",
    "git clone": "needs GitHub, then half an hour of nvcc",
    "build_te_extension.sh": "half an hour of compilation",
    "--find-links /wheels xdlm_megatron": "needs the three above",
}
needs_overlay = pytest.mark.skipif(not overlay_works(), reason="needs root and overlayfs")


def is_left_out(run: str) -> bool:
    return any(part in run for part in NOT_HERE)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What Docker would be sent."""
    copy_context(ROOT, tmp_path / "context")
    return tmp_path / "context"


def carry_out(stage: Stage, context: Path, arguments: dict[str, str], after: str = "") -> str:
    """Runs the stage and then `after`; returns what was printed."""
    script = as_script(stage, context, arguments, is_left_out) + after
    done = run_in_overlay(script, context.parent, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@needs_overlay
def test_the_cpu_image(context: Path) -> None:
    """Its package is installed with the pinned versions, and its health check passes as its user."""
    where = "\ncd /xdlm; python -c 'import xdlm_megatron; print(\"AT\", xdlm_megatron.__file__)'"
    printed = carry_out(STAGES["cpu"], context, {"PIP_EXTRA_INDEX_URL": ""}, where)
    assert "site-packages/xdlm_megatron/__init__.py" in printed.split("AT ")[1]
    assert "num_parameters" in printed  # of show-config
    assert not Path("/xdlm/examples").exists()  # nothing of it stayed


@needs_overlay
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_the_kernels_wheel(context: Path) -> None:
    listing = "\npython -m zipfile -l /wheels/xdlm_megatron-*.whl | grep libxdlm_cuda; ls /wheels"
    printed = carry_out(STAGES["kernels"], context, {"TORCH_CUDA_ARCH_LIST": "9.0a"}, listing)
    assert re.search(r"kernels/lib/libxdlm_cuda_\w+-sm_90a\.so", printed)
    assert re.search(r"xdlm_megatron-[\d.]+-py3-none-linux_x86_64\.whl", printed)


@needs_overlay
@pytest.mark.parametrize("name", ["build", "gpu"])
def test_the_light_lines_of_the_gpu_image(context: Path, name: str) -> None:
    light = [(kind, v) for kind, v in STAGES[name].instructions if kind != "HEALTHCHECK"]  # needs a GPU
    stage = dataclasses.replace(STAGES[name], instructions=light)
    printed = carry_out(stage, context, {})
    assert printed.count("RUN ") == sum(not is_left_out(run) for run in stage.of("RUN"))


def test_apex_is_not_compiled_for_gpus_that_cuda_13_lacks(tmp_path: Path) -> None:
    """By the line that edits its setup.py, on what the tag has there."""
    (run,) = [run for run in STAGES["build"].of("RUN") if "git clone" in run]
    (edit,) = re.findall(r"sed .*?/src/apex/setup\.py", run)
    (tmp_path / "setup.py").write_text('cc_flag.append("arch=compute_70,code=sm_70")\n')
    subprocess.run(["bash", "-c", edit.replace("/src/apex", str(tmp_path))], check=True)
    assert (tmp_path / "setup.py").read_text() == 'cc_flag.append("arch=compute_75,code=sm_75")\n'


def test_every_exception_is_one() -> None:
    runs = [run for stage in STAGES.values() for run in stage.of("RUN")]
    for part in NOT_HERE:
        assert any(part in run for run in runs), f"{part!r} is no part of a RUN line"


def test_bases_are_pinned_and_users_are_not_root() -> None:
    for stage in STAGES.values():
        base = ARGUMENTS[stage.base.removeprefix("${").removesuffix("}")]
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
    for image in ("cpu", "gpu"):
        assert STAGES[image].of("USER") == ["10001"]
        assert len(STAGES[image].of("HEALTHCHECK")) == 1
    assert list(STAGES)[-1] == "gpu"  # what `docker build` without a target makes
    for stage in ("kernels", "build"):
        assert any(value.startswith("TORCH_CUDA_ARCH_LIST=") for value in STAGES[stage].of("ARG"))


def test_the_context_holds_what_is_copied_and_no_more(context: Path) -> None:
    for stage in STAGES.values():
        for value in stage.of("COPY"):
            if "--from" not in value:
                *sources, _ = value.split()
                assert all((context / s).exists() for s in sources if not s.startswith("--"))
    assert not (context / ".git").exists()
    assert not list(context.rglob("__pycache__"))
    assert (context / "xdlm_megatron/data").is_dir()  # `data` alone is ignored
