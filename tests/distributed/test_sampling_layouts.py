"""Every sampler writes the same text under every kind of layout, and on every process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import launch, write_recipe

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("sampling_main.py")
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
LAYOUTS = {
    "tp2-pp2-sp": (4, [TP2, PP2, "parallel.sequence_parallel=true"]),
    "tp2-cp2": (4, [TP2, "parallel.context_parallel_size=2"]),
    "pp2-vpp2": (2, [PP2, "parallel.virtual_pipeline_model_parallel_size=2"]),
}


def run(folder: Path, recipe: dict, num_processes: int, overrides: list[str]) -> dict[str, Any]:
    path = write_recipe(folder, recipe, "sampling")
    launch(num_processes, "sample", path, [*overrides, "model.zero_init_head=false"], PROGRAM)
    return json.loads((folder / "samples.json").read_text())


@pytest.fixture(scope="module")
def one(tiny_recipe: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process."""
    found = run(tmp_path_factory.mktemp("one"), tiny_recipe, 1, [])
    mask_id = tiny_recipe["data"]["mask_id"]
    for name, samples in found.items():
        for ids in samples["ids"]:
            assert ids[:3] == [7, 8, 9], name
            assert ids[-1] == 5, name
            assert mask_id not in ids, name
    assert len({json.dumps(samples["ids"]) for samples in found.values()}) == len(found)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_samples_what_one_process_does(
    layout: str, one: dict[str, Any], tiny_recipe: dict, tmp_path: Path
) -> None:
    num_processes, overrides = LAYOUTS[layout]
    assert run(tmp_path, tiny_recipe, num_processes, overrides) == one
