"""How long training stands still for a checkpoint: saved at once, and by threads from a copy.

One process, float32 tensors of the sizes that a transformer has. The two ways alternate in one run and the
best of each counts; between the start of an asynchronous save and its publication the process sleeps.

    python benchmarks/checkpoint_save.py --mebibytes 512 > benchmarks/results/cpu/checkpoint_save.md
"""

import argparse
import importlib.metadata
import os
import tempfile
import time
from pathlib import Path

import torch

from xdlm_megatron.parallel.mesh import open_mesh  # first: it patches Megatron-Core

# isort: split
from megatron.core.dist_checkpointing import ShardedTensor

from xdlm_megatron.checkpoint.writer import CheckpointWriter

MIB = 2**20


def make_state(mebibytes: int) -> dict[str, ShardedTensor]:
    """Matrices of 4 MiB."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(1024, 1024, generator=generator) for _ in range(mebibytes // 4)]
    return {f"w{i}": ShardedTensor.from_rank_offsets(f"w{i}", weight) for i, weight in enumerate(weights)}


def measure(writer: CheckpointWriter, step: int, mebibytes: int) -> tuple[float, float]:
    """Seconds that training stands still, and seconds until the checkpoint is published."""
    state = make_state(mebibytes)
    started = time.perf_counter()
    writer.begin(step, state)
    stands_still = time.perf_counter() - started
    while not writer.is_written:
        time.sleep(0.01)
    publication = time.perf_counter()
    writer.publish()
    return stands_still + time.perf_counter() - publication, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--mebibytes", type=int, default=512, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    best = {False: (float("inf"),) * 2, True: (float("inf"),) * 2}
    with tempfile.TemporaryDirectory() as folder, open_mesh() as mesh:
        for step in range(2 * options.repeats):
            is_async = step % 2 == 1
            writer = CheckpointWriter(Path(folder), mesh, keep_last=1, is_async=is_async)
            best[is_async] = tuple(map(min, best[is_async], measure(writer, step, options.mebibytes)))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "megatron-core"))
    command = "python benchmarks/checkpoint_save.py"
    command += f" --mebibytes {options.mebibytes} --repeats {options.repeats}"
    print(
        "# Saving a checkpoint\n\n"
        f"`{command}`: "
        f"{options.mebibytes} MiB from one process on {os.cpu_count()} cores, best of {options.repeats}, "
        f"{versions}. The times depend on the disk; the ratio is of one run.\n\n"
        "| save | training stands still, s | ratio | until published, s |\n|---|---|---|---|"
    )
    for name, is_async in (("at once", False), ("`checkpoint.async_save`", True)):
        still, published = best[is_async]
        print(f"| {name} | {still:.2f} | {still / best[False][0]:.2f}x | {published:.2f} |")


if __name__ == "__main__":
    main()
