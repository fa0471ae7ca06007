"""The offline bundle: made here without Transformer Engine, assembled in a namespace without a network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from tools.pretend_installed import read_pins

ROOT = Path(__file__).parents[3]
TOOLS = ROOT / "tools"
TORCH = torch.__version__.split("+")[0]


# Brings up the loopback of a new network namespace, then becomes another command.
WITH_LOOPBACK = """
import fcntl, os, socket, struct, sys
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
fcntl.ioctl(socket.socket(type=socket.SOCK_DGRAM), SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
os.execvp(sys.argv[1], sys.argv[1:])
"""


def without_network() -> list[str]:
    """The beginning of a command that is to have loopback alone; empty where this process may not do that."""
    command = ["unshare", "--net", sys.executable, "-c", WITH_LOOPBACK]
    if shutil.which("unshare") is None or run(*command, "true").returncode:
        return []
    return command


def run(*command: str | Path, timeout: float = 400, **environment: str) -> subprocess.CompletedProcess[str]:
    """Away from this checkout, whose package would hide the bundle's."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    words = list(map(str, command))
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=inherited, cwd="/")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts for a node that has all that this environment has, but for this package."""
    folder = tmp_path_factory.mktemp("bundle")
    installed = importlib.metadata.distributions()
    pins = {d.name: d.version for d in installed if d.name not in ("xdlm_megatron", "megatron-core")}
    (folder / "freeze.txt").write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
    options = ["--python", sys.executable, "--have", folder / "freeze.txt", "--without-te", "--part-mib", "2"]
    command = ["bash", TOOLS / "offline_bundle.sh", *options, folder / "parts"]
    made = run(*command, XDLM_BUILD_KERNELS="0")
    assert made.returncode == 0, made.stdout + made.stderr
    return folder / "parts"


def test_it_holds_what_the_node_lacks_and_nothing_else(bundle: Path, tmp_path: Path) -> None:
    parts = sorted(bundle.glob("bundle.tar.*"))
    assert len(parts) >= 2
    assert all(part.stat().st_size <= 2 << 20 for part in parts)
    (tmp_path / "whole.tar").write_bytes(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(tmp_path / "whole.tar") as tar:
        wheels = [Path(name).name for name in tar.getnames() if name.endswith(".whl")]
    assert sorted(wheel.split("-")[0] for wheel in wheels) == ["megatron_core", "xdlm_megatron"]


def test_it_trains_on_a_node_without_network(
    bundle: Path, tmp_path: Path, tiny_recipe: dict[str, dict]
) -> None:
    """The node's Python is this one; its environment holds only what came in the parts."""
    node = tmp_path / "node"
    alone = without_network()
    done = run(*alone, "bash", bundle / "assemble.sh", node, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "imports work: torch" in done.stdout
    recipe = tiny_recipe | {"run": {"name": "offline", "output_dir": str(tmp_path)}}
    recipe |= {"train": tiny_recipe["train"] | {"num_steps": 1}, "lr_schedule": {"kind": "constant"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train = ["-m", "xdlm_megatron", "train", tmp_path / "recipe.yaml"]
    trained = run(*alone, node / "bin/python", *train, OMP_NUM_THREADS="1")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert "finished at step 1" in trained.stdout
    where = run(node / "bin/python", "-c", "import xdlm_megatron, torch; print(xdlm_megatron.__file__)")
    assert where.stdout.startswith(str(node))
    assert (node / "bin/torchrun").read_text().startswith(f"#!{node}/bin/python")
    assert (node / "xdlm_megatron_source/benchmarks/gpu_suite.py").is_file()
    assert not (node / "xdlm_megatron_source/xdlm_megatron").exists()


def test_a_folder_for_pythonpath(bundle: Path, tmp_path: Path) -> None:
    done = run(
        *without_network(), "bash", bundle / "assemble.sh", "--target", tmp_path, PYTHON=sys.executable
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"export PYTHONPATH={tmp_path}" in done.stdout
    assert (tmp_path / "xdlm_megatron/__init__.py").is_file()


# What assemble.sh refuses


def make_parts(folder: Path, made_for: str) -> Path:
    """Parts with nothing in them but what they say they are for."""
    (folder / "made_for").write_text(made_for)
    subprocess.run(["tar", "-cf", "bundle.tar.000", "made_for"], cwd=folder, check=True)
    (folder / "bundle.tar.001").write_bytes(b"")
    sums = run("sha256sum", folder / "bundle.tar.000", folder / "bundle.tar.001").stdout
    (folder / "SHA256SUMS").write_text(sums.replace(f"{folder}/", ""))
    shutil.copy(TOOLS / "assemble.sh", folder)
    return folder


MINE = f"{sys.version_info[0]} {sys.version_info[1]} {platform.machine()}"


@pytest.mark.parametrize(
    ("made_for", "says"),
    [
        (f"3 8 {platform.machine()} {TORCH}", "is for Python 3.8"),
        (f"{sys.version_info[0]} {sys.version_info[1]} riscv64 {TORCH}", "on riscv64"),
        (f"{MINE} 1.0.0", f"make one with --torch {TORCH}"),
    ],
)
def test_another_kind_of_node_is_refused(tmp_path: Path, made_for: str, says: str) -> None:
    done = run(
        "bash", make_parts(tmp_path, made_for) / "assemble.sh", tmp_path / "node", PYTHON=sys.executable
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "node").glob("*"))


def test_missing_and_changed_parts_are_named(tmp_path: Path) -> None:
    parts = make_parts(tmp_path, f"{MINE} {TORCH}")
    with (parts / "bundle.tar.000").open("ab") as stream:
        stream.write(b"x")
    changed = run("bash", parts / "assemble.sh", tmp_path / "node")
    assert changed.returncode == 2
    assert "bundle.tar.000: FAILED" in changed.stdout
    (parts / "bundle.tar.000").unlink()
    missing = run("bash", parts / "assemble.sh", tmp_path / "node")
    assert missing.returncode == 3
    assert "parts are missing" in missing.stderr
    assert "bundle.tar.000" in missing.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--have", "no.txt", "out"], "no.txt: no such file"),
        (["--part-mib", "many", "out"], "no number of MiB"),
        (["--torhc", "2.11.0", "out"], "--torhc: no such option"),
        ([], "which folder"),
        (["one", "two"], "one folder, not one and two"),
    ],
)
def test_mistakes_on_the_command_line(options: list[str], says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(TOOLS / "offline_bundle.sh"), *options], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_extension_is_not_built_for_another_cuda() -> None:
    """This environment's torch has none."""
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = run("bash", TOOLS / "build_te_extension.sh", "wheels", **environment)
    assert done.returncode == 2
    assert "take a torch for 13" in done.stderr


def test_pins_are_read_as_pip_freezes_them(tmp_path: Path) -> None:
    lines = ["Torch==2.11.0+cu130", "a.b_C==1  # why", "-e git+https://x", "plain", ""]
    (tmp_path / "freeze.txt").write_text("\n".join(lines))
    pins = read_pins([str(tmp_path / "freeze.txt"), "torch==2.12.0"])
    assert pins == {"torch": ("torch", "2.12.0"), "a_b_c": ("a.b_C", "1")}
