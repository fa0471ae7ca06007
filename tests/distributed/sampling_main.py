"""Samples by every sampler from an untrained model, whose weights do not depend on the layout.

sampling_main.py VERB RECIPE [a.b=c ...]: rank 0 writes {sampler: {"ids", "evaluations", "last_change"}} to
samples.json beside the recipe; every rank must have found the same.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import TypeAdapter

import xdlm_megatron.parallel  # noqa: F401
from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.config.samplers import Sampler
from xdlm_megatron.data.build import build_noise, build_schedule
from xdlm_megatron.evaluation.generation import SampleOptions, build_denoiser, generate, observe
from xdlm_megatron.model.build import build_model
from xdlm_megatron.parallel.mesh import open_mesh_for

VARIANTS = {
    "ancestral": {"kind": "ancestral", "num_steps": 6},
    "guided": {"kind": "ancestral", "num_steps": 4, "guidance_scale": 1.0},
    "confidence": {"kind": "confidence", "num_steps": 4},
    "refine": {"kind": "refine", "num_steps": 6},
    "remdm": {"kind": "remdm", "num_steps": 6, "strategy": "conf", "eta": 1.0},
    "remdm_loop": {"kind": "remdm_loop", "num_steps": 6, "eta": 0.5},
    "saber": {"kind": "saber", "block_size": 8},
    "left_to_right": {"kind": "left_to_right"},
    "saber-paper": {"kind": "saber", "variant": "paper", "temperature": 0.8, "top_p": 0.9},
}


def main(recipe: str, overrides: list[str]) -> None:
    config = load_recipe(recipe, overrides)
    with open_mesh_for(config.parallel) as mesh:
        denoise = build_denoiser(build_model(config, mesh), mesh)
        observed = observe(config.data.seq_length, [7, 8, 9], [5], mesh.device)
        found: dict[str, Any] = {}
        for name, variant in VARIANTS.items():
            settings = TypeAdapter(Sampler).validate_python(variant)
            samples = generate(
                denoise,
                SampleOptions(num_samples=3),
                settings,
                build_noise(config),
                build_schedule(config.diffusion),
                observed,
                batch_size=2,
            )
            found[name] = {
                "ids": samples.ids.tolist(),
                "evaluations": samples.evaluations.tolist(),
                "last_change": samples.last_change.tolist(),
            }
        others: list[Any] = [None] * mesh.world_size
        dist.all_gather_object(others, found)
        assert all(other == found for other in others)
        if mesh.is_main:
            Path(recipe).with_name("samples.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3:])
