"""What is said and done of Transformer Engine and apex in the states in which machines have them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from xdlm_megatron.parallel import gpu_packages
from xdlm_megatron.parallel.gpu_packages import (
    ADAM,
    FUSION,
    NORM,
    apex,
    hide_unusable_packages,
    transformer_engine,
)

BROKEN = "raise ImportError('amp_C.so: undefined symbol: _ZN3c104cuda')"
NVIDIAS = {
    "apex/__init__.py": "",
    "apex/multi_tensor_apply/__init__.py": "",
    "apex/optimizers/__init__.py": "class FusedAdam: ...",
}
COMPILED = {"amp_C.py": "", "fused_weight_gradient_mlp_cuda.py": "", "fused_layer_norm_cuda.py": ""}
NAMESAKE = {"apex/__init__.py": "raise RuntimeError('its import has effects')", "apex/lib/__init__.py": ""}
NAMES = ("apex", "amp_C", "fused_weight_gradient_mlp_cuda", "fused_layer_norm_cuda", "transformer_engine")

ONE = "parallel.tensor_model_parallel_size=1"
Install = Callable[[dict[str, str]], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """install(files): packages of a machine with a GPU, before anything has looked for them."""
    known = {name: module for name, module in sys.modules.items() if name.split(".")[0] in NAMES}
    for name in known:
        del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for cached in (apex, transformer_engine):
        cached.cache_clear()

    def write(files: dict[str, str]) -> None:
        write_files(tmp_path, files)

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] in NAMES]:
        del sys.modules[name]
    sys.modules.update(known)
    for cached in (apex, transformer_engine):
        cached.cache_clear()


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def can_import(name: str) -> bool:
    return gpu_packages._import_problem(name) is None


def test_nothing_installed(install: Install) -> None:
    assert str(apex()) == "apex: not installed"
    assert str(transformer_engine()) == "Transformer Engine: not installed"
    hide_unusable_packages()
    assert not can_import("apex")


def test_nvidias_apex_whole(install: Install) -> None:
    install(NVIDIAS | COMPILED)
    assert apex().parts == (ADAM, FUSION, NORM)
    assert str(apex()) == "apex with fused Adam, gradient accumulation fusion, layer norm"
    hide_unusable_packages()
    assert all(can_import(name) for name in ("apex", "amp_C", "fused_weight_gradient_mlp_cuda"))


def test_nvidias_gradient_fusion_alone(install: Install) -> None:
    """One part can be built without the rest, and megatron.core looks for it alone."""
    install({"fused_weight_gradient_mlp_cuda.py": ""})
    assert apex().parts == (FUSION,)
    hide_unusable_packages()
    assert can_import("fused_weight_gradient_mlp_cuda")


def test_nvidias_apex_without_compiled_parts_is_hidden(install: Install) -> None:
    """megatron.core would take its Adam, which raises when it is made."""
    install(NVIDIAS)
    assert str(apex()) == "apex: no fused Adam (built without amp_C)"
    hide_unusable_packages()
    assert not can_import("apex")


def test_a_broken_build_is_said_and_hidden(install: Install) -> None:
    install(NVIDIAS | COMPILED | {"amp_C.py": BROKEN})
    assert apex().parts == (FUSION, NORM)
    assert "no fused Adam (broken build, ImportError: amp_C.so: undefined symbol" in str(apex())
    hide_unusable_packages()
    assert not can_import("apex")
    assert not can_import("amp_C")
    assert can_import("fused_weight_gradient_mlp_cuda")


@pytest.mark.parametrize(
    "files", [NAMESAKE, {"apex.py": ""}, {"apex/notes.txt": ""}], ids=["package", "file", "folder"]
)
def test_another_project_of_that_name_is_refused(files: dict[str, str], install: Install) -> None:
    install(files)
    with pytest.raises(ValueError, match=r"'import apex' finds .*not NVIDIA's apex.*pip uninstall apex"):
        apex()


def test_a_broken_transformer_engine_is_said_and_hidden(install: Install) -> None:
    """What its core library alone raises, and megatron.core does not catch."""
    install({"transformer_engine/__init__.py": "raise FileNotFoundError('no shared object')"})
    assert (
        str(transformer_engine()) == "Transformer Engine: broken build, FileNotFoundError: no shared object"
    )
    hide_unusable_packages()
    assert not can_import("transformer_engine")


ENGINE = {"transformer_engine/pytorch.py": ""}


def test_its_version_is_what_megatron_finds(install: Install) -> None:
    install(ENGINE | {"transformer_engine/__init__.py": "__version__ = '2.20.2'"})
    assert str(transformer_engine()).startswith("Transformer Engine 2.20.2 with layers")


@pytest.mark.parametrize(
    ("init", "why"),
    [("", "PackageNotFoundError: No package metadata"), ("__version__ = 'main'", "InvalidVersion: ")],
    ids=["no metadata", "no version"],
)
def test_a_transformer_engine_without_a_version_is_said_and_hidden(
    init: str, why: str, install: Install
) -> None:
    """megatron.core compares it while it is imported."""
    install(ENGINE | {"transformer_engine/__init__.py": init})
    found = str(transformer_engine())
    assert found.startswith(f"Transformer Engine: broken installation without a version, {why}")
    hide_unusable_packages()
    assert not can_import("transformer_engine")


def test_without_a_gpu_all_are_hidden(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install(NVIDIAS | COMPILED | ENGINE | {"transformer_engine/__init__.py": ""})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for package in (apex(), transformer_engine()):
        assert package.parts == ()
        assert package.problem == "needs a GPU, and there is none"
    hide_unusable_packages()
    assert not any(can_import(name) for name in NAMES)


def test_the_namesake_ends_a_command_in_one_line(tmp_path: Path) -> None:
    write_files(tmp_path, NAMESAKE)
    example = Path(__file__).parents[3] / "examples/quickstart.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "xdlm_megatron", "train", str(example), ONE],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: 'import apex' finds {tmp_path}/apex, which is not NVIDIA's")


def test_hiding_is_needed(tmp_path: Path) -> None:
    """A broken Transformer Engine ends plain megatron.core."""
    write_files(tmp_path, {"transformer_engine/__init__.py": "raise FileNotFoundError('no shared object')"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import megatron.core.extensions.transformer_engine"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "TORCHDYNAMO_DISABLE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "FileNotFoundError: no shared object"
