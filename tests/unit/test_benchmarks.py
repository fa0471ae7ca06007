"""The benchmarks' meter, and one tiny measurement of every form on a CPU."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from xdlm_megatron.kernels.build import find_cxx
from xdlm_megatron.kernels.dispatch import Kernels
from xdlm_megatron.kernels.library import load_host

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


@needs_peak
@pytest.mark.skipif(find_cxx() is None, reason="needs g++")
@pytest.mark.parametrize("vocab", [257, 1024])
def test_what_a_draw_reads_is_counted(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `surveyed` with the rows that it reads again; the kernels by g++."""
    module = importlib.import_module("kernel_posterior")
    monkeypatch.setattr(module, "choose_kernels", lambda *_: Kernels(load_host(), ""))
    sizes = {"tokens": 15, "batch": 3, "vocab": vocab, "dtype": "bfloat16"}
    options = {"device": "cpu", "threads": 1, "repeats": 1, "step": "top-p 0.9"} | sizes
    rows = {impl: module.measure(argparse.Namespace(**options, impl=impl)) for impl in module.OURS}
    bytes_once = 15 * vocab * 2 / 1e9
    for row in rows.values():
        assert row["read_gb"] == bytes_once
        assert row["moved_gb"] == row["reads"] * bytes_once
        assert row["read_gb_s"] > 0
    assert rows["ours"]["reads"] == rows["draw"]["reads"] == 1
    assert 1 <= rows["surveyed"]["reads"] <= 2
    monkeypatch.setattr(module.torch, "randn", lambda *size, **_: torch.zeros(*size))
    equal = module.measure(argparse.Namespace(**options, impl="surveyed"))
    assert equal["reads"] == 2  # of equals every row is read again


@pytest.mark.parametrize("name", ["kernel_nelbo", "kernel_posterior", "loss_reference", "sampling"])
def test_it_imports(name: str) -> None:
    assert importlib.import_module(name).measure


def stopped_after(rows: list[dict | None]) -> Iterator[dict | None]:
    yield from rows
    raise KeyboardInterrupt


def test_a_table_that_is_stopped_keeps_its_rows_and_says_what_is_missing(tmp_path: Path) -> None:
    cases = importlib.import_module("cases")
    args = argparse.Namespace(device="cpu", threads=1, out=tmp_path, command="python it.py")
    table = cases.Table(
        args,
        "it",
        lambda rows: "# It\n\n" + "\n".join(f"| {row['seconds']} |" for row in rows),
        {"tokens": 8},
        {"ratio": 0.1},
        lambda rows: [cases.claim(f"{row['impl']}: speed", row["seconds"], 0.85) for row in rows],
    )
    todo = [{"vocab": 256, "impl": impl} for impl in ("fast", "large", "slow", "late")]
    measured = [todo[0] | {"seconds": 0.9}, None, todo[2] | {"seconds": 0.5}]
    with pytest.raises(KeyboardInterrupt):
        table.fill(todo, lambda cases: stopped_after(measured))
    text, result = (tmp_path / "it.md").read_text(), json.loads((tmp_path / "it.json").read_text())
    assert "| 0.9 |\n| 0.5 |\n\nfast: speed: 90.0%, target at least 85.0%: met.\n" in text
    assert "slow: speed: 50.0%, target at least 85.0%: not met.\n" in text
    assert text.endswith("Missing, 256, large: not enough memory.\n\nMissing, 256, late: not reached.\n")
    assert result["rows"] == [measured[0], measured[2]]
    assert [claim["holds"] for claim in result["claims"]] == [True, False]
    assert result["missing"] == ["256, large: not enough memory.", "256, late: not reached."]
    assert (result["machine"]["tokens"], result["ratio"]) == (8, 0.1)


def test_comparisons_are_measured_last_and_written_in_their_place(tmp_path: Path) -> None:
    cases = importlib.import_module("cases")
    args = argparse.Namespace(device="cpu", threads=1, out=tmp_path, command="python it.py")
    todo = [{"vocab": vocab, "impl": impl} for vocab in (8, 9) for impl in ("eager", "compiled", "ours")]
    asked = []

    def measured(ordered: list[dict]) -> Iterator[dict | None]:
        asked.extend(ordered)
        return stopped_after([*ordered[:3], None])

    table = cases.Table(args, "it", str, {}, {})
    with pytest.raises(KeyboardInterrupt):
        table.fill(todo, measured, late=("eager", "compiled"))
    assert asked == [todo[at] for at in (2, 5, 0, 3, 1, 4)]
    result = json.loads((tmp_path / "it.json").read_text())
    assert result["rows"] == [todo[0], todo[2], todo[5]]
    assert result["missing"] == [
        "8, compiled: not reached.",
        "9, eager: not enough memory.",
        "9, compiled: not reached.",
    ]
    assert table.fill(todo, iter, late=("compiled",)) == todo


def test_memory_that_ends_leaves_a_gap_and_other_errors_end_the_table() -> None:
    cases = importlib.import_module("cases")

    def measure(case: dict) -> dict:
        if case["x"] == 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return {"y": 1 / (case["x"] - 3)}

    found = list(cases.within_memory(measure, [{"x": x} for x in range(3)]))
    assert found == [{"y": -1 / 3}, None, {"y": -1.0}]
    with pytest.raises(ZeroDivisionError):
        list(cases.within_memory(measure, [{"x": 3}]))


TARGETS = {
    "kernel_nelbo": {
        "split: share of a copy of its bytes": True,
        "split: memory beside the logits": False,
        "whole: share of a copy of its bytes": True,
        "whole: memory beside the logits": False,
        "whole: faster than eager": False,
    },
    "kernel_posterior": {"draw at V = 131072, bfloat16, top-p 0.9: share of a read": True},
    "head_loss": {
        "summed: memory beyond its inputs": True,
        "summed: share of it that the three bare products take": True,
    },
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_report_of_any_first_rows_and_its_targets(name: str) -> None:
    """What a stop leaves: no row, the first ones, a form without the one that it is compared with."""
    module = importlib.import_module(name)
    sizes = {"tokens": 8, "batch": 2, "repeats": 1, "hidden": 4, "vocab": 131072, "uniform_ratio": 0.1}
    args = argparse.Namespace(device="cpu", threads=1, command="python it.py", impls=module.IMPLS, **sizes)
    row = {"vocab": 131072, "dtype": "bfloat16", "step": "top-p 0.9", "seconds": 0.1, "peak_mib": 2.0}
    row |= {"logits_mib": 100.0, "copy_gb_per_second": 3e3, "copy_gb_s": 3e3, "read_gb": 30.0, "loss": 3.0}
    row |= {"bytes_per_logit": 4.0, "share_of_copy": 0.9, "moved_gb": 270.0}
    if name == "kernel_posterior":
        row |= {"copy_gb_s": 2e3, "read_gb_s": 3e3, "reads": 1.0}
    rows = [row | {"impl": impl} for impl in module.IMPLS]
    left_out = () if name == "kernel_posterior" else ({},)
    for some in ([], *[rows[:n] for n in range(1, len(rows) + 1)], rows[-1:]):
        text = module.report(args, some, *left_out)
        assert all(f"| {shown['impl']} |" in text for shown in some)
    assert {claim["what"]: claim["holds"] for claim in module.claims(rows)} == TARGETS[name]
    early = [impl for impl in module.IMPLS if impl not in module.LATE[1:]]
    assert module.claims([r for r in rows if r["impl"] in early]) == module.claims(rows)
    assert module.claims([]) == []


def test_the_tables_of_a_gpu_end_within_eight_minutes() -> None:
    """The build and every limit within what `make bench-gpu` gives, and that below 8 minutes."""
    suite, running = (importlib.import_module(name) for name in ("gpu_suite", "gpu_parts.running"))
    makefile = (BENCHMARKS.parent / "Makefile").read_text()
    (line,) = re.findall(r"^bench-gpu:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    minutes = float(re.search(r"--minutes ([0-9.]+)", line)[1])
    names = re.search(r"--only ([a-z_ ]+)", line)[1].split()
    parts = [part for part in suite.PARTS if part.name in names]
    assert len(parts) == len(names) == 3
    assert suite.VERSIONS.limit + sum(part.limit for part in parts) <= 60 * minutes
    assert 60 * minutes + 2 * running.GRACE_SECONDS < 8 * 60
