"""The Dockerfile: its RUN lines are carried out, all that take seconds; the others in test_gpu_image.py."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.dockerfile import (
    Stage,
    as_script,
    copy_context,
    make_prefix,
    new_environment,
    overlay_works,
    read_dockerfile,
    run_in_overlay,
    run_in_prefix,
)
from xdlm_megatron.kernels.build import find_nvcc

ROOT = Path(__file__).parents[2]
ARGUMENTS, STAGES = read_dockerfile(ROOT / "Dockerfile")

IN_CI = os.environ.get("CI") == "true"
# RUN lines of the stage `build` that have a gigabyte to fetch or an hour to compile: test_gpu_image.py's.
APEX = "git clone"
HEAVY = (APEX, "constraints/gpu.txt")


def is_heavy(run: str) -> bool:
    return any(part in run for part in HEAVY)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What Docker would be sent."""
    copy_context(ROOT, tmp_path / "context")
    return tmp_path / "context"


def carry_out(
    stage: Stage, context: Path, arguments: dict[str, str], after: str = "", place: str | None = None
) -> str:
    """Runs the stage and then `after`, in an overlay where that works, else in a prefix; what was printed."""
    script = as_script(stage, context, arguments, is_heavy) + after
    if (place or ("overlay" if overlay_works() else "prefix")) == "overlay":
        done = run_in_overlay(script, context.parent, timeout=500)
    else:
        done = run_in_prefix(script, make_prefix(context.parent), timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_the_cpu_image(context: Path) -> None:
    """Its package is installed with the pinned versions, and its health check passes as its user."""
    where = "\ncd /xdlm; python -c 'import xdlm_megatron; print(\"AT\", xdlm_megatron.__file__)'"
    printed = carry_out(STAGES["cpu"], context, {"PIP_EXTRA_INDEX_URL": ""}, where)
    assert "site-packages/xdlm_megatron/__init__.py" in printed.split("AT ")[1]
    assert "num_parameters" in printed  # of show-config
    assert not Path("/xdlm/examples").exists()  # nothing of it stayed


@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_the_kernels_wheel(context: Path) -> None:
    listing = "\npython -m zipfile -l /wheels/xdlm_megatron-*.whl | grep libxdlm_cuda; ls /wheels"
    printed = carry_out(STAGES["kernels"], context, {"TORCH_CUDA_ARCH_LIST": "9.0a"}, listing)
    assert re.search(r"kernels/lib/libxdlm_cuda_\w+-sm_90a\.so", printed)
    assert re.search(r"xdlm_megatron-[\d.]+-py3-none-linux_x86_64\.whl", printed)


@pytest.mark.parametrize(
    "place",
    [
        pytest.param(
            "overlay", marks=pytest.mark.skipif(not overlay_works(), reason="no overlay; the prefix follows")
        ),
        pytest.param("prefix", marks=pytest.mark.skipif(IN_CI, reason="test_gpu_image.py, all lines")),
    ],
)
@pytest.mark.parametrize("name", ["build", "gpu"])
def test_the_light_lines_of_the_gpu_image(context: Path, name: str, place: str) -> None:
    light = [(kind, v) for kind, v in STAGES[name].instructions if kind != "HEALTHCHECK"]  # needs a GPU
    stage = dataclasses.replace(STAGES[name], instructions=light)
    printed = carry_out(stage, context, {}, place=place)
    assert printed.count("RUN ") == sum(not is_heavy(run) for run in stage.of("RUN"))
    assert "xdlm" not in Path("/etc/passwd").read_text()


# What setup.py of NVIDIA's apex has to do with the line that builds it.
STAND_IN = """
import os
from setuptools import setup
assert os.environ["APEX_CPP_EXT"] == os.environ["APEX_CUDA_EXT"] == "1"
assert "arch=compute_70,code=sm_70" == "arch=compute_" + "75,code=sm_75"
setup(name="apex", version="0.1", py_modules=["amp_C", "fused_weight_gradient_mlp_cuda"])
"""


def apex_stand_in(folder: Path) -> dict[str, str]:
    """Settings by which git finds a repository of our own at apex's address, with the tag; and its commit."""
    folder.mkdir()
    (folder / "setup.py").write_text(STAND_IN)
    for module in ("amp_C", "fused_weight_gradient_mlp_cuda"):
        (folder / f"{module}.py").touch()
    (tag,) = (arg.partition("=")[2] for arg in STAGES["build"].of("ARG") if arg.startswith("APEX_TAG="))
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "x"], ["tag", tag]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", "-C", folder, *identity, *words], check=True)
    head = subprocess.run(
        ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{folder}.insteadOf",
        "GIT_CONFIG_VALUE_0": "https://github.com/NVIDIA/apex",
        "APEX_COMMIT": head.stdout.strip(),
    }


def test_the_line_that_builds_apex(tmp_path: Path) -> None:
    """On a repository of our own in its place: apex is on no package index, and takes half an hour."""
    (run,) = [run for run in STAGES["build"].of("RUN") if APEX in run]
    remote = apex_stand_in(tmp_path / "remote")
    prefix = make_prefix(tmp_path)
    (prefix / "src").mkdir()
    new_environment(prefix / "opt/xdlm")
    (packages,) = (prefix / "opt/xdlm/lib").glob("python*/site-packages")

    def carry_it_out(commit: str) -> subprocess.CompletedProcess[str]:
        settings = [f"export {value}" for value in STAGES["build"].of("ARG", "ENV")]
        script = "\n".join(["set -e", *settings, f"export APEX_COMMIT={commit}", run])
        return run_in_prefix(script, prefix, 300, **remote)

    assert carry_it_out("0" * 40).returncode == 1  # the tag has moved
    assert not (packages / "amp_C.py").exists()
    shutil.rmtree(prefix / "src/apex")
    done = carry_it_out(remote["APEX_COMMIT"])
    assert done.returncode == 0, done.stdout[-3000:]
    assert (packages / "amp_C.py").exists()


def test_the_tag_of_apex_is_that_commit() -> None:
    arguments = dict(value.split("=", 1) for value in STAGES["build"].of("ARG") if "=" in value)
    tag = f"refs/tags/{arguments['APEX_TAG']}"
    asked = ["git", "ls-remote", "https://github.com/NVIDIA/apex", tag, f"{tag}^{{}}"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"GitHub cannot be reached from here: {error}")
    assert arguments["APEX_COMMIT"] in done.stdout


def test_four_lines_are_heavy() -> None:
    heavy = [name for name, stage in STAGES.items() for run in stage.of("RUN") if is_heavy(run)]
    assert heavy == ["build"] * 4


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
