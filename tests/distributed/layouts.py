"""Trains under every kind of layout and compares with one process; prints the table of worst differences.

python -m tests.distributed.layouts > benchmarks/results/cpu/layouts.md
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import make_tiny_data, make_tiny_recipe
from tests.distributed.launch import launch, read_series, write_recipe

PROGRAM = Path(__file__).with_name("recording_main.py")
LOSS_TOLERANCE = 2e-5
GRAD_NORM_TOLERANCE = 1e-4
NUM_STEPS = 20

TP2 = "parallel.tensor_model_parallel_size=2"
TP4 = "parallel.tensor_model_parallel_size=4"
PP2 = "parallel.pipeline_model_parallel_size=2"
PP4 = "parallel.pipeline_model_parallel_size=4"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
SP = "parallel.sequence_parallel=true"
PLAIN = "optimizer.use_distributed_optimizer=false"
LARGER = "train.micro_batch_size=4"  # instead of 2: half the collectives, and it changes nothing else
LAYOUTS = {
    "tp2": (2, [TP2]),
    "tp2-sp": (2, [TP2, SP]),
    "tp4": (4, [TP4, LARGER]),
    "pp2": (2, [PP2]),
    "pp4": (4, [PP4]),
    "pp2-vpp2": (2, [PP2, VPP2]),
    "cp2": (2, [CP2]),
    "dp2": (2, []),
    "dp2-plain-optimizer": (2, [PLAIN]),
    "dp4": (4, []),
    "dp4-plain-optimizer": (4, [PLAIN]),
    "tp2-pp2": (4, [TP2, PP2]),
    "tp2-pp2-sp": (4, [TP2, PP2, SP]),
    "tp2-cp2": (4, [TP2, CP2, LARGER]),
    "tp2-cp2-sp": (4, [TP2, CP2, SP, LARGER]),
    "pp2-cp2": (4, [PP2, CP2]),
    "tp2-dp2": (4, [TP2, LARGER]),
    "tp2-dp2-plain-optimizer": (4, [TP2, PLAIN, LARGER]),
    "pp2-dp2": (4, [PP2]),
}


@dataclass(frozen=True)
class Trained:
    """What a run logged, and every sample that it noised: {id: (t, z_t)}."""

    nelbo: list[float]
    grad_norm: list[float]
    held_out: list[float]
    samples: dict[str, tuple[str, list[int]]]


@dataclass(frozen=True)
class Row:
    """Worst relative differences to one process."""

    layout: str
    num_processes: int
    num_samples: int
    num_equal: int
    nelbo: float
    grad_norm: float
    held_out: float


def recipe_for_layouts(tiny_recipe: Mapping[str, Any]) -> dict[str, Any]:
    """As many key heads as TP 4 asks for."""
    recipe = copy.deepcopy(dict(tiny_recipe))
    recipe["model"]["num_query_groups"] = 4
    return recipe


def train(folder: Path, recipe: dict, name: str, num_processes: int, overrides: list[str]) -> Trained:
    record = folder / f"record-{name}"
    record.mkdir()
    before = os.environ.get("RECORD_DIR")
    os.environ["RECORD_DIR"] = str(record)
    try:
        launch(num_processes, "train", write_recipe(folder, recipe, name), overrides, PROGRAM)
    finally:
        os.environ.pop("RECORD_DIR")
        os.environ |= {} if before is None else {"RECORD_DIR": before}
    metrics = folder / "runs" / name / "metrics.jsonl"
    return Trained(
        nelbo=read_series(metrics, "train/nelbo"),
        grad_norm=read_series(metrics, "train/grad_norm"),
        held_out=read_series(metrics, "eval/valid/nelbo_per_token"),
        samples=read_samples(record),
    )


def read_samples(record: Path) -> dict[str, tuple[str, list[int]]]:
    """Joins what the ranks recorded: the slices of context parallelism; all else they must agree on."""
    seen: dict[str, dict[str, list]] = {}
    for path in record.iterdir():
        for sample_id, pieces in json.loads(path.read_text()).items():
            known = seen.setdefault(sample_id, {})
            for start, piece in pieces.items():
                assert known.setdefault(start, piece) == piece, "two ranks noised a sample differently"
    return {sample_id: _join(pieces) for sample_id, pieces in seen.items()}


def _join(pieces: dict[str, list]) -> tuple[str, list[int]]:
    (t,) = {piece[0] for piece in pieces.values()}
    return t, [token for start in sorted(pieces, key=int) for token in pieces[start][1:]]


def compare(layout: str, result: Trained, one: Trained) -> Row:
    return Row(
        layout=layout,
        num_processes=LAYOUTS[layout][0],
        num_samples=len(one.samples | result.samples),
        num_equal=sum(result.samples.get(name) == sample for name, sample in one.samples.items()),
        nelbo=worst(result.nelbo, one.nelbo),
        grad_norm=worst(result.grad_norm, one.grad_norm),
        held_out=worst(result.held_out, one.held_out),
    )


def worst(values: list[float], wanted: list[float]) -> float:
    """Largest relative difference of two series of one length."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, wanted, strict=True))


def table(rows: Iterable[Row]) -> str:
    lines = [
        f"| layout | processes | noised samples equal | loss (at most {LOSS_TOLERANCE:g}) | "
        f"gradient norm (at most {GRAD_NORM_TOLERANCE:g}) | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.layout} | {row.num_processes} | {row.num_equal} of {row.num_samples} | "
            f"{row.nelbo:.1e} | {row.grad_norm:.1e} | {row.held_out:.1e} |"
        )
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_for_layouts(make_tiny_recipe(make_tiny_data(folder)))
        one = train(folder, recipe, "one", 1, [])
        rows = [
            compare(layout, train(folder, recipe, layout, num_processes, overrides), one)
            for layout, (num_processes, overrides) in LAYOUTS.items()
        ]
    packages = ("torch", "megatron-core", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(
        "# Layouts against one process\n\n"
        "`python -m tests.distributed.layouts`: worst relative differences over "
        f"{NUM_STEPS} steps of float32 training on gloo. `tests/distributed/test_layouts.py` repeats it with "
        f"the bounds of the heading. {platform.machine()}, Python {platform.python_version()}, "
        f"{versions}.\n\n"
        "A layout's name is its parallel sizes; the rest of the processes is data parallel. `sp`: sequence "
        "parallel. `vpp2`: two chunks a stage. `plain-optimizer`: not sharded over data parallel. "
        "Micro-batches are of 2, of 4 where tensors or sequences are split over four processes without a "
        "pipeline.\n\n"
        f"{table(rows)}"
    )


if __name__ == "__main__":
    main()
