"""Show what a checkpoint holds and whether it is whole. Needs neither the recipe nor a GPU.

    python tools/inspect_checkpoint.py runs/quickstart/checkpoints/step_00001200
    python tools/inspect_checkpoint.py runs/quickstart/checkpoints/step_00001200 --stats --part model

Shapes are of whole tensors, whatever layout wrote them. Exit status: 0 whole, 1 damaged, 2 not readable.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdlm_megatron.checkpoint.integrity import MANIFEST, find_damage, write_manifest
from xdlm_megatron.checkpoint.summary import (
    PARTS,
    Stats,
    StoredTensor,
    list_tensors,
    load_stats,
    read_plain_values,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoint", type=Path, help="folder, such as step_00001200")
    parser.add_argument(
        "--stats", action="store_true", help="read every tensor: min, max, rms, values not finite"
    )
    parser.add_argument("--part", choices=PARTS, help="list the tensors of this part alone")
    parser.add_argument(
        "--write-manifest",
        action="store_true",
        help=f"first write {MANIFEST} for the files as they are now: you vouch for them",
    )
    options = parser.parse_args()
    try:
        return inspect(options)
    except (ValueError, OSError) as error:
        print(f"inspect_checkpoint: error: {error}", file=sys.stderr)
        return 2


def inspect(options: argparse.Namespace) -> int:
    """Prints everything; returns the exit status."""
    path = options.checkpoint
    tensors = list_tensors(path)
    if options.write_manifest:
        write_manifest(path)
    damage = find_damage(path)
    print(f"{path}: " + (f"DAMAGED, {damage}" if damage else f"whole, every file is as {MANIFEST} says"))
    if damage and not damage.startswith(MANIFEST):
        return 1  # what a damaged file holds tells nothing
    for line in describe(read_plain_values(path)):
        print(line)
    print()
    listed = [tensor for tensor in tensors if options.part in (None, tensor.part)]
    rows = load_stats(path, listed) if options.stats else ((tensor, None) for tensor in listed)
    for line in table(rows, max((len(tensor.name) for tensor in listed), default=0)):
        print(line, flush=True)
    print()
    for line in totals(tensors):
        print(line)
    return 1 if damage else 0


def describe(values: dict[str, Any]) -> list[str]:
    """Counters and the recipe in a few lines."""
    state, recipe = values["train_state"], values["recipe"]
    model, data, parallel = recipe["model"], recipe["data"], recipe["parallel"]
    sizes = {
        name.removesuffix("_parallel_size"): n
        for name, n in parallel.items()
        if name.endswith("_parallel_size")
    }
    layout = " x ".join(f"{name.removesuffix('_model')} {n}" for name, n in sizes.items() if n)
    return [
        f"  step {state['step']:,} of {recipe['train']['num_steps']:,}, "
        f"{state['consumed_samples']:,} samples, {state['consumed_tokens']:,} tokens, "
        f"{state['skipped_steps']} skipped steps, "
        + (f"{values['ema_updates']:,} EMA updates" if "ema_updates" in values else "no EMA"),
        f"  {recipe['run']['name']}, seed {recipe['run']['seed']}: uniform_ratio "
        f"{recipe['diffusion']['uniform_ratio']}, {recipe['diffusion']['schedule']}, "
        f"{recipe['precision']['dtype']}; written by {layout} x data parallel",
        f"  {model['num_layers']} layers of {model['hidden_size']}, {model['num_attention_heads']} heads; "
        f"vocabulary {data['vocab_size']}, sequences of {data['seq_length']}, "
        f"{recipe['train']['global_batch_size']} a step",
    ]


def table(rows: Iterator[tuple[StoredTensor, Stats | None]], width: int) -> Iterator[str]:
    """One line a tensor."""
    for tensor, found in rows:
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        dtype = str(tensor.dtype).removeprefix("torch.")
        line = f"{tensor.name:<{width}}  {shape:>14}  {dtype:<8}  {tensor.num_bytes:>14,} B"
        if found is not None:
            line += f"  min {found.minimum:>10.3g}  max {found.maximum:>10.3g}  rms {found.rms:>9.3g}"
            line += f"  NOT FINITE: {found.num_bad:,}" if found.num_bad else ""
        yield line


def totals(tensors: list[StoredTensor]) -> Iterator[str]:
    """Values and bytes by part, and of all."""
    for part in (*PARTS, "all"):
        chosen = [tensor for tensor in tensors if part in ("all", tensor.part)]
        values, size = (sum(getattr(t, name) for t in chosen) for name in ("num_values", "num_bytes"))
        yield f"{part:<9}  {len(chosen):>4} tensors  {values:>15,} values  {size:>18,} B"


if __name__ == "__main__":
    sys.exit(main())
