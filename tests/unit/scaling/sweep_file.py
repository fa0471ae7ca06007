"""A small sweep's file for tests: no data are read before a run trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

SIZES = {
    "small": {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2},
    "large": {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 2},
}


def sweep_tree(folder: Path, **section: Any) -> dict[str, Any]:
    """Two sizes, two budgets, two noises; `section` changes fields of `sweep`."""
    sweep = {
        "sizes": SIZES,
        "design": {"kind": "tokens", "numbers": [8192, 32768]},
        "axes": {"diffusion.uniform_ratio": [0, 0.5]},
        "batch": "fixed",
        "lr": "fixed",
        "gpu": None,
    }
    return {
        "run": {"name": "sweep", "output_dir": str(folder)},
        "sweep": sweep | section,
        "data": {
            "train_prefix": "data/text",
            "tokenizer": "data/text.model",
            "seq_length": 32,
            "vocab_size": 256,
            "mask_id": 2,
        },
        "optimizer": {"lr": 1e-3},
        "lr_schedule": {"kind": "wsd"},
        "train": {"micro_batch_size": 4, "global_batch_size": 8},
        "tracking": {"mlflow": None},
    }


def write_sweep(folder: Path, **section: Any) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep_tree(folder, **section), sort_keys=False))
    return path
