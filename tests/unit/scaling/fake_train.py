"""Stands in for `xdlm_megatron train`: the same files, refusals and answers to signals, without torch.

    python fake_train.py RECIPE [--resume]

Every step takes 20 ms and adds a line "RUN STEP" to `steps` in the sweep's folder. Seed 13 is a mistake, seed
14 fails at step 3, seed 15 waits there for a file `go` in the sweep's folder.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import yaml


def main(recipe: str, resume: bool) -> int:
    config = yaml.safe_load(Path(recipe).read_text())
    name, seed, num_steps = config["run"]["name"], config["run"]["seed"], config["train"]["num_steps"]
    sweep = Path(config["run"]["output_dir"])
    folder = sweep / name
    if resume != (folder / "recipe.yaml").exists():
        print(f"error: {folder}: --resume is {resume}", file=sys.stderr)
        return 2
    if seed == 13:
        print("error: 13 is no seed", file=sys.stderr)
        return 2
    folder.mkdir(exist_ok=True)
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    (folder / "outcome").unlink(missing_ok=True)
    shutil.copy(recipe, folder / "recipe.yaml")
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    metrics = folder / "metrics.jsonl"
    begun = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for step in range(begun + 1, num_steps + 1):
        time.sleep(0.02)
        with (sweep / "steps").open("a") as steps, metrics.open("a") as lines:
            steps.write(f"{name} {step}\n")
            values = {"train/nelbo": 5.0 / step, "perf/tokens_per_second": 1e4}
            lines.write(json.dumps({"step": step, **values}) + "\n")
        if seed == 14 and step == 3:
            (folder / "outcome").write_text("failed: step 3: no luck\n")
            return 1
        while seed == 15 and step == 3 and not asked and not (sweep / "go").exists():
            time.sleep(0.02)
        if asked:
            (folder / "outcome").write_text(f"stopped at step {step}\n")
            return 0
    with metrics.open("a") as lines:
        lines.write(json.dumps({"step": num_steps, "eval/valid/nelbo_per_token": 4.5}) + "\n")
    (folder / "outcome").write_text(f"finished at step {num_steps}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--resume" in sys.argv))
