"""The benchmarks' meter, and one tiny measurement of every form on a CPU."""

from __future__ import annotations

import argparse
import importlib
import math
import os
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")
needs_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak memory"
)


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


@needs_peak
def test_the_meter_sees_a_peak_that_has_gone_and_forgets_it() -> None:
    meter = importlib.import_module("meter")
    before = meter.baseline_mib(CPU)
    torch.ones(16 << 20)  # 64 MiB, freed at once
    assert 60 <= meter.peak_mib(CPU) - before < 80
    again = meter.baseline_mib(CPU)
    assert meter.peak_mib(CPU) - again < 16


def test_seconds_are_cpu_time(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = importlib.import_module("meter")
    times = iter([1.0, 3.5, 10.0, 11.0])
    monkeypatch.setattr(meter.time, "process_time", lambda: next(times))
    assert meter.best_seconds(lambda: None, 2, CPU) == 1.0


@needs_peak
def test_every_form_of_head_and_loss() -> None:
    head_loss = importlib.import_module("head_loss")
    sizes = {"tokens": 16, "batch": 2, "hidden": 8, "vocab": 512, "uniform_ratio": 0.1}
    options = {"device": "cpu", "threads": 1, "repeats": 1, "dtype": "float32"} | sizes
    impls = [impl for impl in head_loss.IMPLS if impl not in ("compiled", "liger")]
    rows = {impl: head_loss.measure(argparse.Namespace(**options, impl=impl)) for impl in impls}
    losses = [row["loss"] for impl, row in rows.items() if impl != "products"]
    assert all(math.isclose(loss, losses[0], rel_tol=1e-4) for loss in losses)
    assert all(row["seconds"] > 0 for row in rows.values())
    products = 3 * 4 * (16 * 8 + 512 * 8 + 16 * 512)  # each reads two of the matrices and writes the third
    assert rows["products"]["moved_gb"] == products / 1e9
    assert (
        rows["eager"]["moved_gb"]
        > rows["logits"]["moved_gb"]
        > rows["products"]["moved_gb"] + 4 * 4 * 16 * 512e-9
    )


def test_steps_of_an_outage_are_those_within_its_span() -> None:
    outage = importlib.import_module("mlflow_outage")
    times = {1: 10.0, 2: 10.5, 3: 11.5, 4: 12.0, 7: 13.0}
    assert outage.steps_within(times, [(10.0, 10.6), (11.5, 13.0)]) == {2: 0.5, 4: 0.5, 7: 1.0}


@needs_peak
@pytest.mark.parametrize("impl", ["dense", "ancestral", "saber"])
def test_ways_of_sampling(impl: str) -> None:
    sampling = importlib.import_module("sampling")
    sizes = {"layers": 1, "hidden": 16, "vocab": 256, "tokens": 16, "batch": 2, "steps": 2}
    row = sampling.measure(argparse.Namespace(**sizes, threads=1, dtype="float32", impl=impl))
    assert row["seconds"] > 0


@pytest.mark.parametrize("name", ["kernel_nelbo", "kernel_posterior", "loss_reference", "sampling"])
def test_it_imports(name: str) -> None:
    assert importlib.import_module(name).measure
