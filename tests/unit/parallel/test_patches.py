"""Each patch is needed: Megatron-Core without it fails. When a test here fails, remove the patch it names."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

from xdlm_megatron.parallel.patches import PATCHES, apply_patches

PROGRAM = Path(__file__).with_name("without_a_patch.py")
STAGES = ("seed", "wrap", "step", "save", "load")

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA no patch of the CPU mode is applied")


@functools.cache
def reports() -> dict[str, Any]:
    """What Megatron-Core does without each patch: {what is left out: {stage: "done" or the error}}."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@on_cpu
def test_with_every_patch_each_stage_ends_well() -> None:
    assert reports()["nothing"] == dict.fromkeys(STAGES, "done") | {"rng_warnings": 0, "helper_processes": 0}
    assert reports()["applied"] == [patch.name for patch in PATCHES]


@on_cpu
def test_cpu_view_is_needed() -> None:
    assert "Torch not compiled with CUDA" in reports()["everything"]["seed"]


@on_cpu
def test_import_without_compile_is_needed() -> None:
    assert reports()["everything"]["compiled_at_import"] > 0
    assert reports()["compiled"] == 0


@on_cpu
def test_tracker_filter_is_needed() -> None:
    assert reports()["tracker-filter"]["rng_warnings"] > 0


@on_cpu
def test_writer_threads_are_needed() -> None:
    assert reports()["writer-threads"]["helper_processes"] > 0
    assert reports()["nothing"]["helper_processes"] == 0


@on_cpu
@pytest.mark.parametrize(
    ("part", "stage", "error"),
    [
        ("tensor-type", "step", "must be one of torch.cuda.FloatTensor"),
        ("tensor-cuda", "save", "Torch not compiled with CUDA"),
        ("group-step-adam", "load", "'step'"),
    ],
)
def test_part_is_needed(part: str, stage: str, error: str) -> None:
    report = reports()[part]
    assert error in report[stage]
    before = STAGES[: STAGES.index(stage)]
    assert [report[name] for name in before] == ["done"] * len(before)  # nothing else stands in its way


def test_the_installed_version_is_one_that_the_patches_were_seen_with() -> None:
    installed = importlib.metadata.version("megatron-core")
    for patch in PATCHES:
        assert installed in SpecifierSet(patch.versions), f"{patch.name}: look whether {installed} needs it"


def test_patches_have_names_and_reasons_of_their_own() -> None:
    assert len({patch.name for patch in PATCHES}) == len({patch.reason for patch in PATCHES}) == len(PATCHES)


@on_cpu
def test_applying_twice_changes_nothing() -> None:
    finders = list(sys.meta_path)
    methods = torch.Tensor.cuda, torch.Tensor.type, torch.compile
    assert apply_patches() == tuple(patch.name for patch in PATCHES)
    for patch in PATCHES[1:]:
        patch.apply()
    assert sys.meta_path == finders
    assert (torch.Tensor.cuda, torch.Tensor.type, torch.compile) == methods
