"""The Dockerfile: every RUN line is carried out, as far as a machine without GPU and in minutes can."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import zipfile
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

# RUN lines of the stage `build` that are not carried out with the others but one by one, and a part of each.
TORCH = "--constraint constraints/gpu.txt torch numpy"
APEX = "git clone"
ENGINE = "build_te_extension.sh"
OURS = "--find-links /wheels xdlm_megatron"
HEAVY = (TORCH, APEX, ENGINE, OURS)


def is_heavy(run: str) -> bool:
    return any(part in run for part in HEAVY)


def line(part: str) -> str:
    """The RUN line of the stage `build` that has this part."""
    (found,) = [run for run in STAGES["build"].of("RUN") if part in run]
    return found


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
        "prefix",
    ],
)
@pytest.mark.parametrize("name", ["build", "gpu"])
def test_the_light_lines_of_the_gpu_image(context: Path, name: str, place: str) -> None:
    light = [(kind, v) for kind, v in STAGES[name].instructions if kind != "HEALTHCHECK"]  # needs a GPU
    stage = dataclasses.replace(STAGES[name], instructions=light)
    printed = carry_out(stage, context, {}, place=place)
    assert printed.count("RUN ") == sum(not is_heavy(run) for run in stage.of("RUN"))
    assert "xdlm" not in Path("/etc/passwd").read_text()


# The four heavy lines


def begin(folder: Path) -> Path:
    """A prefix that is where the stage `build` is at its first heavy line."""
    copy_context(ROOT, folder / "context")
    prefix = make_prefix(folder)
    done = run_in_prefix(
        f"python -m venv /opt/xdlm; mkdir -p /wheels; cp -a {folder}/context /src", prefix, timeout=300
    )
    assert done.returncode == 0, done.stdout
    return prefix


def run_line(
    run: str, prefix: Path, timeout: float = 300, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A RUN line as it stands there, with the stage's ARGs and ENV."""
    of_build = STAGES["build"]
    settings = [f"export {value}" for value in of_build.of("ARG", "ENV")]
    known = "".join(f"export {name}={value!r}\n" for name, value in variables.items())
    return run_in_prefix("\n".join(["set -e", *settings, known, "cd /src", run]), prefix, timeout)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A prefix behind the first heavy line, and versions by name of what that line would have installed.

    Its 2 GB are fetched and looked at, not unpacked: they are only names to pip from then on.
    """
    if not IN_CI:
        pytest.skip("fetches 2 GB for torch and CUDA; CI=true does it")
    prefix = begin(tmp_path_factory.mktemp("image"))
    found = would_install(line(TORCH), prefix)
    pins = [f"{name}=={version}" for name, version in found.items()]
    pretend = run_line(f"python tools/pretend_installed.py {' '.join(pins)}", prefix)
    assert pretend.returncode == 0, pretend.stdout
    return prefix, found


def would_install(run: str, prefix: Path) -> dict[str, str]:
    """Versions by name that pip fetches for a RUN line; the environment alone tells it to install none."""
    report = prefix / "report.json"
    done = run_line(run, prefix, timeout=900, PIP_DRY_RUN="1", PIP_REPORT=str(report))
    assert done.returncode == 0, done.stdout[-3000:]
    items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    return {item["name"].lower().replace("_", "-"): item["version"] for item in items}


PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints/gpu.txt").read_text(), re.MULTILINE))


def test_the_line_that_installs_torch(image: tuple[Path, dict[str, str]]) -> None:
    _, found = image
    assert found["torch"] == PINS["torch"]
    assert found["nvidia-cuda-runtime"].startswith("13.0.")  # nvcc's version in the base image
    assert int(found.get("setuptools", "0").split(".")[0]) < 82


def test_the_line_that_installs_transformer_engine(image: tuple[Path, dict[str, str]]) -> None:
    """With an empty wheel for its extension, whose compilation takes half an hour."""
    prefix, _ = image
    build, install = map(str.strip, line(ENGINE).split("&&"))
    assert build == "bash tools/build_te_extension.sh /wheels"  # its tests: tests/unit/tools
    write_wheel(prefix / "wheels", "transformer_engine_torch", PINS["transformer-engine-torch"])
    found = would_install(install, prefix)
    for name in ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"):
        assert found[name] == PINS[name]
    assert "torch" not in found  # the one that is there stays


def test_the_line_that_installs_ours(image: tuple[Path, dict[str, str]]) -> None:
    prefix, _ = image
    build = "XDLM_BUILD_KERNELS=0 python -m pip wheel --quiet --no-deps --wheel-dir /wheels ."
    assert run_line(build, prefix).returncode == 0
    install, check = map(str.strip, line(OURS).split("&&"))
    assert check.startswith("python -c ")  # of what was installed
    found = would_install(install, prefix)
    assert found["megatron-core"] == PINS["megatron-core"]
    assert {"xdlm-megatron", "pytest", "pytest-xdist"} <= found.keys()
    assert "torch" not in found


def write_wheel(folder: Path, name: str, version: str) -> None:
    """A wheel with nothing in it."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


# What setup.py of NVIDIA's apex has to do with the line that builds it.
STAND_IN = """
import os
from setuptools import setup
assert os.environ["APEX_CPP_EXT"] == os.environ["APEX_CUDA_EXT"] == "1"
assert "arch=compute_70,code=sm_70" == "arch=compute_" + "75,code=sm_75"
setup(name="apex", version="0.1", py_modules=["amp_C", "fused_weight_gradient_mlp_cuda"])
"""


@pytest.fixture
def remote(tmp_path: Path) -> dict[str, str]:
    """Settings by which git finds a repository of our own at apex's address, with the tag; and its commit."""
    folder = tmp_path / "remote"
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


def test_the_line_that_builds_apex(tmp_path: Path, remote: dict[str, str]) -> None:
    """On a repository of our own in its place: apex is on no package index, and takes half an hour."""
    prefix = make_prefix(tmp_path)
    (prefix / "src").mkdir()
    new_environment(prefix / "opt/xdlm")
    (packages,) = (prefix / "opt/xdlm/lib").glob("python*/site-packages")
    moved = run_line(line(APEX), prefix, **remote | {"APEX_COMMIT": "0" * 40})
    assert moved.returncode == 1
    assert not (packages / "amp_C.py").exists()
    shutil.rmtree(prefix / "src/apex")
    done = run_line(line(APEX), prefix, **remote)
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


def test_every_heavy_line_is_one() -> None:
    assert sorted(map(is_heavy, STAGES["build"].of("RUN"))).count(True) == len({line(part) for part in HEAVY})
    others = [run for name, stage in STAGES.items() if name != "build" for run in stage.of("RUN")]
    assert not any(map(is_heavy, others))


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
