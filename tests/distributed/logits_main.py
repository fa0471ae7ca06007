"""`logits_main.py VERB RECIPE CHECKPOINT FOLDER [section.field=value ...]`: what the network makes of ids.

Reads FOLDER/ids.pt, int64 [B, S]; the last pipeline stage writes FOLDER/RANK.pt, a tensor-parallel rank's
logits [B, S, P].
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import xdlm_megatron.parallel  # noqa: F401
from xdlm_megatron.config.load import load_recipe
from xdlm_megatron.evaluation.generation import build_denoiser
from xdlm_megatron.evaluation.restore import restore_model
from xdlm_megatron.parallel.mesh import open_mesh_for


def main(recipe: str, checkpoint: str, folder: str, *overrides: str) -> None:
    config = load_recipe(recipe, overrides)
    with open_mesh_for(config.parallel) as mesh:
        chunks, _ = restore_model(config, mesh, Path(checkpoint), use_ema=False)
        predicted = build_denoiser(chunks, mesh)(torch.load(f"{folder}/ids.pt"))
        if predicted.hidden_SBH is not None:
            logits_BSP = (predicted.hidden_SBH @ predicted.weight_PH.t()).transpose(0, 1)
            torch.save(logits_BSP, f"{folder}/{mesh.groups.tp.rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[2:])
